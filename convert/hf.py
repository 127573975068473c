"""HF checkpoint folders: their tensors, read and written one by one in bounded memory.

A `Source` is a set of named tensors, whatever the files. Safetensors are read without torch and by
position, not mapped: mapped pages would count as memory, and a file that is truncated meanwhile
would kill the process.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from s3d_jax.errors import ConversionError
from s3d_jax.storage.arrays import cast
from s3d_jax.storage.trees import bullets

DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
_SAFETENSORS_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library itself
_MAX_DIMENSIONS, _MAX_SIZE = 64, 2**63  # numpy's; their products stay cheap
AGAIN = "get a good copy of it, and convert again"
CHUNK = 1 << 22  # elements converted or compared at a time


@dataclasses.dataclass(frozen=True)
class Tensor:
    """What is known of a stored tensor without reading it.

    Attributes:
        dtype: "float32", "bfloat16" or "float16"; other dtypes by the name the file has for them.
        shape: its shape.
        file: the file that holds it.
        offset: bytes before its data in a safetensors file.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int = 0


class Source(Protocol):
    """Named tensors to be read one at a time."""

    @property
    def tensors(self) -> Mapping[str, Tensor]: ...

    @property
    def faults(self) -> Mapping[str, str]:
        """Tensors whose place is wrong (in two files, or in none): what is wrong with it."""

    def read(self, name: str, out: np.ndarray, first_row: int = 0) -> None:
        """Fills the contiguous array `out` with the tensor's rows from `first_row` on, as many as
        `out` has, casting to its dtype.

        Raises:
            ConversionError: the data cannot be read.
            CheckpointError: a value overflows in `out`'s dtype.
        """


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ConversionError: the file is missing, no JSON object, names a field twice, or is too large.
    """
    try:
        if not path.is_file():  # a pipe or a device could be read forever
            raise ConversionError(f"{path.parent} has no {path.name}: is it a HF checkpoint?")
        if (size := path.stat().st_size) > _MAX_HEADER:
            raise ConversionError(f"{path} has {size:,} bytes, and is damaged: {AGAIN}")
        fields = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except OSError as error:
        raise ConversionError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # bad UTF-8 and bad JSON are ValueErrors
        raise ConversionError(f"{path} is not valid JSON ({error}): {AGAIN}") from error
    if not isinstance(fields, dict):
        raise ConversionError(f"{path} must hold a JSON object: {AGAIN}")
    return fields


def open_source(folder: Path) -> Source:
    """The weights of a HF folder: safetensors if there are any, else torch's .bin files.

    Raises:
        ConversionError: there are no weights, or files are missing or damaged. All of these are in
            the one message. What contradicts in sound files is in the source's `faults`.
    """
    return open_files(*weight_files(folder))


def open_files(files: Sequence[Path], index: Mapping[str, str]) -> Source:
    """The weights in these files, as `weight_files` gives them; raises as `open_source`."""
    if files[0].suffix == ".safetensors":
        return SafetensorsSource(files, index)
    from convert.torch_bin import TorchSource

    return TorchSource(files, index)


def weight_files(
    folder: Path, remote: Collection[str] | None = None
) -> tuple[list[Path], dict[str, str]]:
    """The files that hold the weights, in order; and the index.

    The index says for each tensor the name of its file. It is empty where there is only one file.

    Args:
        folder: the HF folder.
        remote: None where each file must be there; else names of files that can be had, and what
            the index names need not be there.

    Raises:
        ConversionError: there are none, or the index names files that cannot be used.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        single = folder / f"{stem}.{suffix}"
        index = folder / f"{stem}.{suffix}.index.json"
        if single.is_file() or single.name in (remote or ()):  # transformers prefers it as well
            return [single], {}
        if index.is_file():
            return _shards(index, f".{suffix}", complete=remote is None)
    raise ConversionError(
        f"{folder} holds no weights: expected model.safetensors, model.safetensors.index.json with "
        "its shards, pytorch_model.bin, or pytorch_model.bin.index.json with its shards"
    )


def _shards(index: Path, suffix: str, *, complete: bool) -> tuple[list[Path], dict[str, str]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{index}: weight_map is missing or empty: {AGAIN}")
    weight_map = {str(tensor): str(file) for tensor, file in weight_map.items()}
    problems, files = [], []
    for name in dict.fromkeys(weight_map.values()):
        path = index.parent / name
        if name != Path(name).name or name == "..":
            problems.append(f"{name}: points outside of the folder")
        elif path.suffix != suffix:
            problems.append(f"{name}: no {suffix} file")
        elif complete and not is_file(path):
            problems.append(f"{name}: no such file")
        files.append(path)
    if problems:
        raise ConversionError(
            f"{index} names shards that cannot be used: get a good copy of it and of all its "
            f"shards, into one folder\n{bullets(problems)}"
        )
    return files, weight_map


def is_file(path: Path) -> bool:
    """Whether there is such a file, whatever the name."""
    try:
        return path.is_file()
    except OSError:  # the name is too long
        return False


class SafetensorsSource:
    """Tensors of one or many safetensors files.

    Args:
        files: all of them.
        index: for each tensor the name of its file, or empty.

    Raises:
        ConversionError: files are damaged.
    """

    def __init__(self, files: Sequence[Path], index: Mapping[str, str] | None = None) -> None:
        self.tensors, self.faults = collect(files, index or {}, read_safetensors_header)

    def read(self, name: str, out: np.ndarray, first_row: int = 0) -> None:
        tensor = self.tensors[name]
        stored = DTYPES[tensor.dtype]
        skipped = first_row * math.prod(tensor.shape[1:]) * stored.itemsize
        try:
            with open(tensor.file, "rb", buffering=0) as file:
                file.seek(tensor.offset + skipped)
                if stored == out.dtype:
                    _fill(file, out, name)
                    return
                flat = out.reshape(-1)
                buffer = np.empty(min(CHUNK, flat.size), stored)
                for start in range(0, flat.size, CHUNK):
                    piece = buffer[: min(CHUNK, flat.size - start)]
                    _fill(file, piece, name)
                    flat[start : start + piece.size] = cast(piece, out.dtype, name)
        except OSError as error:
            raise ConversionError(f"cannot read {tensor.file}: {error.strerror}") from error


def collect(
    files: Sequence[Path],
    index: Mapping[str, str],
    read_header: Callable[[Path], Mapping[str, Tensor]],
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of all files; and those whose place is wrong, with what is wrong with it.

    Raises:
        ConversionError: names every damaged file. What such a file holds is not known, so nothing
            can be said of the tensors.
    """
    tensors: dict[str, Tensor] = {}
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


def _fill(file: Any, out: np.ndarray, name: str) -> None:
    view = memoryview(out.reshape(-1).view(np.uint8).data)
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise ConversionError(f"{file.name} ended in the middle of {name}: it is truncated")
        done += count


def read_safetensors_header(path: Path) -> dict[str, Tensor]:
    """Names, dtypes, shapes and places of the tensors in a file; checks that they fill it exactly.

    The format: 8 bytes with the header's length (little endian), the header (JSON), the data.

    Raises:
        ConversionError: the file is damaged.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise ConversionError(
                    f"{path} is truncated or no safetensors file: its header would be {length} "
                    f"bytes long, in a file of {size}"
                )
            header = json.loads(file.read(length), object_pairs_hook=_unique)
    except OSError as error:
        raise ConversionError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # bad UTF-8 and bad JSON are ValueErrors
        raise ConversionError(f"{path} has a damaged header: {error}") from error
    if not isinstance(header, dict):
        raise ConversionError(f"{path} has a damaged header: no JSON object")
    header.pop("__metadata__", None)

    tensors, ranges = {}, []
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            natural = len(shape) <= _MAX_DIMENSIONS and all(
                type(n) is int and 0 <= n < _MAX_SIZE for n in (*shape, begin, end)
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConversionError(f"{path} has a damaged header: entry {name!r:.80}") from error
        known = _SAFETENSORS_DTYPES.get(dtype) if isinstance(dtype, str) else None
        itemsize = DTYPES[known].itemsize if known else None
        if not natural or begin > end or (itemsize and math.prod(shape) * itemsize != end - begin):
            raise ConversionError(
                f"{path} has a damaged header: {name:.200} of dtype {dtype!r:.20} and shape "
                f"{shape!r:.80} cannot lie at bytes {begin!r:.40} to {end!r:.40}"
            )
        tensors[name] = Tensor(known or str(dtype), tuple(shape), path, 8 + length + begin)
        ranges.append((begin, end, name))

    # The data must be what the header says, without holes, overlaps or a missing end.
    position = 0
    for begin, end, name in sorted(ranges):
        if begin != position:
            raise ConversionError(
                f"{path} has a damaged header: {name:.200} overlaps, or follows a hole"
            )
        position = end
    if 8 + length + position != size:
        raise ConversionError(
            f"{path} is truncated or has trailing data: its header describes "
            f"{8 + length + position} bytes, and the file has {size}"
        )
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"{name!r:.200} occurs twice")
        fields[name] = value
    return fields


class SafetensorsWriter:
    """Writes one safetensors file, tensor by tensor in the order announced.

    Args:
        path: the file.
        tensors: dtype name and shape of each tensor, in the order in which `write` will get them.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        codes = {name: code for code, name in _SAFETENSORS_DTYPES.items()}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name, (dtype, shape) in tensors.items():
            end = position + math.prod(shape) * DTYPES[dtype].itemsize
            header[name] = {"dtype": codes[dtype], "shape": shape, "data_offsets": [position, end]}
            position = end
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)  # aligns the data
        self._expected = iter([(name, dtype, shape) for name, (dtype, shape) in tensors.items()])
        self._file = open(path, "wb")  # noqa: SIM115 (closed by `close`)
        self._file.write(len(encoded).to_bytes(8, "little") + encoded)

    def write(self, name: str, array: np.ndarray) -> None:
        expected = next(self._expected)
        assert (name, array.dtype.name, array.shape) == expected, (name, expected)
        self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def close(self) -> None:
        self._file.close()
