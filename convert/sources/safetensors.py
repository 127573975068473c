"""Safetensors files, read and written tensor by tensor in bounded memory, without torch.

They are read by position and not mapped: mapped pages would count as memory, and a file that is
truncated meanwhile would kill the process.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convert.sources.base import (
    CHUNK,
    FLOATS,
    StoredTensor,
    collect,
    reading,
)
from s3d_jax.errors import ConversionError
from s3d_jax.storage.arrays import cast
from s3d_jax.storage.json_files import unique_fields

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_MAX_HEADER = 100_000_000  # bytes; the safetensors library's own limit
_MAX_DIMENSIONS, _MAX_SIZE = 64, 2**63  # numpy's limits, which keep products of sizes cheap


class SafetensorsSource:
    """Tensors of one or many safetensors files.

    Args:
        files: all of them.
        index: the file name of each tensor, or empty.

    Raises:
        ConversionError: files are damaged.
    """

    def __init__(self, files: Sequence[Path], index: Mapping[str, str] | None = None) -> None:
        self.tensors, self.faults = collect(files, index or {}, read_safetensors_header)

    def read(self, name: str, out: np.ndarray, first_row: int = 0) -> None:
        tensor = self.tensors[name]
        stored = FLOATS[tensor.dtype]
        skipped = first_row * math.prod(tensor.shape[1:]) * stored.itemsize
        with reading(tensor.file), open(tensor.file, "rb", buffering=0) as file:
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


def _fill(file: Any, out: np.ndarray, name: str) -> None:
    view = memoryview(out.reshape(-1).view(np.uint8).data)
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise ConversionError(f"{file.name} ended in the middle of {name}: it is truncated")
        done += count


def read_safetensors_header(path: Path) -> dict[str, StoredTensor]:
    """Lists the tensors of a file, and checks that they fill it exactly.

    The format: 8 bytes with the header's length (little endian), the header (JSON), the data.

    Raises:
        ConversionError: the file is damaged.
    """
    with reading(path):
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise ConversionError(
                    f"{path} is truncated or no safetensors file: its header would be {length} "
                    f"bytes long, in a file of {size}"
                )
            encoded = file.read(length)
    try:
        header = json.loads(encoded, object_pairs_hook=unique_fields)
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
        known = _DTYPES.get(dtype, "") if isinstance(dtype, str) else ""
        values = FLOATS.get(known)
        misfits = values and natural and math.prod(shape) * values.itemsize != end - begin
        if not natural or begin > end or misfits:
            raise ConversionError(
                f"{path} has a damaged header: {name:.200} of dtype {dtype!r:.20} and shape "
                f"{shape!r:.80} cannot lie at bytes {begin!r:.40} to {end!r:.40}"
            )
        place = 8 + length + begin
        tensors[name] = StoredTensor(
            known or str(dtype), tuple(shape), path, end - begin, values, place
        )
        ranges.append((begin, end, name))

    # The data must fill the file, without holes, overlaps or a missing end.
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


class SafetensorsWriter:
    """Writes one safetensors file, tensor by tensor in the announced order.

    Args:
        path: the file.
        tensors: dtype name and shape of each tensor, in the order in which `write` gets them.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        codes = {name: code for code, name in _DTYPES.items()}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name, (dtype, shape) in tensors.items():
            end = position + math.prod(shape) * FLOATS[dtype].itemsize
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
