"""The protocol of a source: named tensors that are read one at a time, in bounded memory."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from s3d_jax.errors import ConversionError
from s3d_jax.storage.arrays import cast
from s3d_jax.storage.json_files import read_json_object
from s3d_jax.storage.trees import bullets

FLOATS: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
UNKNOWN = "?"  # type of a tensor that an index names, and the config does not ask for
STORED_AS = "stored as"  # begins the fault of a tensor whose type cannot be read
CHUNK = 1 << 22  # elements converted or compared at a time
AGAIN = "get a good copy of it, and convert again"


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """What is known of a stored tensor without reading it.

    Attributes:
        dtype: the type that it is stored in: "float32", "bfloat16", "float16", or the file's own
            name for any other.
        shape: its shape.
        file: the file that holds it.
        num_bytes: its size in the file.
        values: the numpy type that holds each of its values exactly, and that `Source.read` can
            give; None if its values cannot be read.
        offset: the position of its data in the file, in bytes, if the format has one.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path
    num_bytes: int
    values: np.dtype | None
    offset: int = 0


class Source(Protocol):
    """Named tensors to be read one at a time."""

    @property
    def tensors(self) -> Mapping[str, StoredTensor]: ...

    @property
    def faults(self) -> Mapping[str, str]:
        """What is wrong with tensors that are in two files, or in none."""

    def read(self, name: str, out: np.ndarray, first_row: int = 0) -> None:
        """Fills the contiguous array `out` with rows of a tensor, cast to its dtype.

        Reads as many rows as `out` has, from `first_row` on.

        Raises:
            ConversionError: the data cannot be read.
            CheckpointError: a value overflows in `out`'s dtype.
        """


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns an OSError of the block into a ConversionError that names the file."""
    try:
        yield
    except OSError as error:
        raise ConversionError(f"cannot read {path}: {error.strerror or error}") from error


def is_file(path: Path) -> bool:
    """Whether there is such a file, whatever the name."""
    try:
        return path.is_file()
    except OSError:  # the name is too long
        return False


def read_hf_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a HF folder.

    Raises:
        ConversionError: the file is missing, no JSON object, names a field twice, or is too large.
    """
    missing = f"{path.parent} has no {path.name}: is it a HF checkpoint?"
    return read_json_object(path, ConversionError, advice=AGAIN, if_missing=missing)


def cast_into(out: np.ndarray, values: np.ndarray, name: str) -> None:
    """Fills the contiguous array `out`; casts a few of the values at a time.

    Raises:
        CheckpointError: a value overflows in `out`'s dtype.
    """
    flat, values = out.reshape(-1), values.reshape(-1)
    for start in range(0, flat.size, CHUNK):
        piece = slice(start, start + CHUNK)
        flat[piece] = cast(values[piece], out.dtype, name)


def first_line(error: Exception) -> str:
    """The first line of an error's message: libraries append pages of advice."""
    return str(error).strip().partition("\n")[0]


def collect(
    files: Sequence[Path],
    index: Mapping[str, str],
    read_header: Callable[[Path], Mapping[str, StoredTensor]],
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of all files, and what is wrong with the place of some.

    Args:
        files: all of them.
        index: the file name of each tensor; empty if there is no index.
        read_header: lists the tensors of one file.

    Raises:
        ConversionError: names every damaged file. The tensors of such a file are unknown, so
            nothing can be said of any tensor.
    """
    tensors: dict[str, StoredTensor] = {}
    places: dict[str, list[str]] = {}
    damaged: list[str] = []
    for file in files:
        try:
            found = read_header(file)
        except ConversionError as error:
            damaged.append(str(error))
            continue
        for name, tensor in found.items():
            tensors[name] = tensor
            places.setdefault(name, []).append(file.name)
    if damaged:
        raise ConversionError(
            "damaged weights: get good copies of these files, and convert again\n"
            + bullets(damaged, limit=len(damaged))
        )
    faults = {
        name: f"in more than one file: {', '.join(names)}"
        for name, names in places.items()
        if len(names) > 1
    }
    faults |= {
        name: f"missing, and the index says that it is in {file}"
        for name, file in index.items()
        if name not in tensors
    }
    return tensors, faults
