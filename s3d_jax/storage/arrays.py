"""Arrays on disk: one orbax checkpoint per model or draft, written and read array by array.

    manifest.ocdbt, d/   a key-value store (OCDBT), which holds each array in the zarr format
    _METADATA            the tree of the arrays, as orbax reads it

`orbax.checkpoint.PyTreeCheckpointer().restore` reads the folder. Orbax itself writes and reads only
whole trees. This module therefore uses tensorstore, which orbax is built on: a conversion holds a
few arrays in memory, not the model.
"""

import json
import os
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from s3d_jax.errors import CheckpointError
from s3d_jax.storage.json_files import AGAIN
from s3d_jax.storage.trees import bullets

# Arrays are written together once they have this many bytes: each batch makes one file.
_BATCH_BYTES = 2**25
# What tensorstore raises for files that it cannot read, by the kind of damage.
_REFUSALS = (ValueError, IndexError, KeyError, NotImplementedError, OSError)
_MANIFEST = "manifest.ocdbt"
_INT4 = "int4"  # a type of jax and ml_dtypes; numpy gives each number a byte


class ArrayRecord(NamedTuple):
    """What the index of a store says about one array."""

    shape: tuple[int, ...]
    crc32: int


class ArrayWriter:
    """Writes arrays into one store.

    Args:
        folder: the store, inside a staged folder. Staging flushes it to disk.

    Attributes:
        index: the record of each array added so far, by its path.
    """

    def __init__(self, folder: Path) -> None:
        self.index: dict[str, ArrayRecord] = {}
        self._folder = folder
        self._batch: dict[str, np.ndarray] = {}

    def add(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Adds arrays, by their paths. They must not change before `finish`.

        Raises:
            OSError: they cannot be written.
        """
        self._batch |= arrays
        for path, array in arrays.items():
            self.index[path] = ArrayRecord(array.shape, crc32(array))
        if sum(array.nbytes for array in self._batch.values()) >= _BATCH_BYTES:
            self._write_batch()

    def finish(self) -> None:
        """Writes the last arrays and the description of the tree.

        Raises:
            OSError: they cannot be written.
        """
        self._write_batch()
        tree = {
            str(tuple(path.split("/"))): {
                "key_metadata": [{"key": key, "key_type": 2} for key in path.split("/")],  # dicts
                "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
            }
            for path in self.index
        }
        fields = {"tree_metadata": tree, "use_ocdbt": True, "use_zarr3": True}
        fields |= {"store_array_data_equal_to_fill_value": True, "custom_metadata": None}
        (self._folder / "_METADATA").write_text(json.dumps(fields), encoding="utf-8")

    def _write_batch(self) -> None:
        import tensorstore as ts

        context = ts.Context({"file_io_sync": False})
        # Without a transaction each array is a commit, with files of its own.
        commit = ts.Transaction(atomic=True)
        try:
            for path, array in self._batch.items():
                # Values stay out of the tree's nodes: a damaged node would hide many arrays.
                place = _in_store(self._folder, path) | {"config": {"max_inline_value_bytes": 0}}
                array = _packed(array)
                spec = {
                    "driver": "zarr3",
                    "kvstore": place,
                    "metadata": _layout(array),
                    "store_data_equal_to_fill_value": True,
                }
                store = ts.open(spec, create=True, context=context, transaction=commit).result()
                store.write(array, can_reference_source_data_indefinitely=True).result()
            commit.commit_async().result()
        except ValueError as error:
            if (cause := _os_error(error)) is not None:
                raise cause from error
            raise
        self._batch = {}


def read_array(
    folder: Path,
    path: str,
    record: ArrayRecord,
    dtype: np.dtype | None = None,
    *,
    advice: str = AGAIN,
) -> np.ndarray:
    """Reads one array of a store.

    Args:
        folder: the store.
        path: the array's path in the tree.
        record: its shape and checksum.
        dtype: the dtype it must have; None accepts any.
        advice: what the user can do about a damaged array.

    Raises:
        CheckpointError: it is missing or damaged, or the system refuses to read it.
    """
    import tensorstore as ts

    spec = {"driver": "zarr3", "kvstore": _location(folder, path)}
    try:
        array = ts.open(spec, open=True).result().read().result()
    except _REFUSALS as error:
        cause = _os_error(error)
        if cause is not None and not isinstance(cause, FileNotFoundError):
            raise CheckpointError(f"cannot read {path} in {folder}: {cause.strerror}") from error
        raise CheckpointError(f"cannot read {path} in {folder}: {advice} ({error})") from error
    if dtype is not None and dtype.name == _INT4 and array.dtype == np.uint8:
        array = _unpacked(array)
    fits = array.shape == record.shape and (dtype is None or array.dtype == dtype)
    if not fits or crc32(array) != record.crc32:
        raise CheckpointError(f"{path} in {folder} is damaged: {advice}")
    return array


def _os_error(error: Exception) -> OSError | None:
    """The system's error that an error of tensorstore reports, if there is one."""
    match = re.search(r"os_error_code='(\d+)'", str(error))
    return OSError(int(match[1]), os.strerror(int(match[1]))) if match else None


def index_to_json(index: Mapping[str, ArrayRecord]) -> dict[str, dict[str, Any]]:
    """The index of a store as JSON."""
    return {path: {"shape": list(x.shape), "crc32": x.crc32} for path, x in index.items()}


def index_from_json(fields: Mapping[str, Any]) -> dict[str, ArrayRecord]:
    """The index of a store from JSON.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: it is not what `index_to_json` returns.
    """
    return {
        path: ArrayRecord(tuple(int(n) for n in x["shape"]), int(x["crc32"]))
        for path, x in fields.items()
    }


def missing_arrays(folder: Path, paths: Iterable[str]) -> list[str]:
    """Arrays without files. Does not look into a store."""
    if (folder / _MANIFEST).is_file():
        return []
    return [path for path in paths if not os.path.isdir(_location(folder, path)["path"])]


class Overflow(CheckpointError):
    """Values of some arrays, `names`, that are too large for a dtype."""

    def __init__(self, names: Sequence[str], dtype: np.dtype) -> None:
        self.names = tuple(names)
        others = " or bfloat16 (float16 ends at 65504)" if dtype == np.float16 else ""
        subject, more = f"{names[0]} holds", ""
        if len(names) > 1:
            subject, more = f"{len(names)} arrays hold", "\n" + bullets(list(names))
        super().__init__(
            f"{subject} values too large for {dtype.name}: use --dtype float32{others}{more}"
        )


def cast(values: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """`values` in another dtype.

    Raises:
        Overflow: a finite value becomes infinite (float16 ends at 65504).
    """
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore"):
        result = values.astype(dtype)
    if dtype.itemsize <= 2 and not np.array_equal(
        np.isfinite(result.astype(np.float32)), np.isfinite(values.astype(np.float32))
    ):
        raise Overflow([name], dtype)
    return result


def _location(folder: Path, path: str) -> dict[str, Any]:
    """The place of an array, as tensorstore spells it."""
    if (folder / _MANIFEST).is_file():
        return _in_store(folder, path)
    # Before format version 3: files of its own, for a model in one folder per group.
    parts = path.split("/")
    if not (own := folder / ".".join(parts)).is_dir():
        own = folder / parts[0] / ".".join(parts[1:])
    return {"driver": "file", "path": f"{own.absolute().as_posix()}/"}


def _in_store(folder: Path, path: str) -> dict[str, Any]:
    base = {"driver": "file", "path": f"{folder.absolute().as_posix()}/"}
    return {"driver": "ocdbt", "base": base, "path": f"{path.replace('/', '.')}/"}


def _layout(array: np.ndarray) -> dict[str, Any]:
    """One chunk without compression: weights hardly compress, and it doubled time and memory."""
    chunks = {"name": "regular", "configuration": {"chunk_shape": list(array.shape)}}
    codec = {"name": "bytes", "configuration": {"endian": "little"}}
    return {
        "shape": list(array.shape),
        "data_type": array.dtype.name,
        "chunk_grid": chunks,
        "codecs": [codec],
    }


def _packed(array: np.ndarray) -> np.ndarray:
    """An array as it is stored: int4 numbers lie two in a byte, the first of a pair lowest."""
    if array.dtype.name != _INT4:
        return array
    pairs = array.view(np.uint8).reshape(*array.shape[:-1], -1, 2)
    return pairs[..., 0] & 15 | pairs[..., 1] << 4


def _unpacked(packed: np.ndarray) -> np.ndarray:
    """int4 numbers of an array that `_packed` made."""
    import ml_dtypes

    signed = packed.view(np.int8)
    pairs = np.stack([np.left_shift(signed, 4) >> 4, signed >> 4], axis=-1)
    return pairs.reshape(*packed.shape[:-1], -1).astype(ml_dtypes.int4)


def crc32(array: np.ndarray) -> int:
    """The checksum of an array's bytes."""
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
