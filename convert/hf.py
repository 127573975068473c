"""HF checkpoint folders: their tensors, read and written one by one in bounded memory.

A `Source` is a set of named tensors, whatever the files. Safetensors are read without torch and by
position, not mapped: mapped pages would count as memory, and a file that is truncated meanwhile
would kill the process.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from s3d_jax.checkpoint import bullets, cast
from s3d_jax.errors import ConversionError

DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
_SAFETENSORS_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library itself
_CHUNK = 1 << 22  # elements converted at a time


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

    def read(self, name: str, out: np.ndarray) -> None:
        """Fills the contiguous array `out`, which has the tensor's shape, casting to its dtype.

        Raises:
            ConversionError: the data cannot be read.
            CheckpointError: a value overflows in `out`'s dtype.
        """


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ConversionError: the file is missing or no JSON object.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConversionError(
            f"{path.parent} has no {path.name}: is it a HF checkpoint?"
        ) from error
    except OSError as error:
        raise ConversionError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConversionError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ConversionError(f"{path} must hold a JSON object")
    return fields


def open_source(folder: Path) -> Source:
    """The weights of a HF folder: safetensors if there are any, else torch's .bin files.

    Raises:
        ConversionError: there are no weights, or files are missing, damaged or contradict each
            other. All faults of all files are in the one message.
    """
    files = weight_files(folder)
    if files[0].suffix == ".safetensors":
        return SafetensorsSource(files)
    from convert.torch_bin import TorchSource

    return TorchSource(files)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights, the shards of an index in order; each is there."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        single = folder / f"{stem}.{suffix}"
        index = folder / f"{stem}.{suffix}.index.json"
        if single.is_file():  # the one that transformers prefers as well
            return [single]
        if index.is_file():
            return _shards(index)
    raise ConversionError(
        f"{folder} holds no weights: expected model.safetensors, model.safetensors.index.json with "
        "its shards, pytorch_model.bin, or pytorch_model.bin.index.json with its shards"
    )


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{index}: weight_map is missing or empty")
    problems, files = [], []
    for name in dict.fromkeys(map(str, weight_map.values())):
        path = index.parent / name
        if name != Path(name).name:
            problems.append(f"{name}: points outside of the folder")
        elif not path.is_file():
            problems.append(f"{name}: no such file")
        files.append(path)
    if problems:
        raise ConversionError(f"{index} names shards that cannot be used:\n{bullets(problems)}")
    return files


class SafetensorsSource:
    """Tensors of one or many safetensors files.

    Raises:
        ConversionError: a file is damaged, or a tensor is in two files.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.tensors, problems = collect(files, read_safetensors_header)
        if problems:
            raise ConversionError(f"damaged or contradicting weights:\n{bullets(problems)}")

    def read(self, name: str, out: np.ndarray) -> None:
        tensor = self.tensors[name]
        stored = DTYPES[tensor.dtype]
        try:
            with open(tensor.file, "rb", buffering=0) as file:
                file.seek(tensor.offset)
                if stored == out.dtype:
                    _fill(file, out, name)
                    return
                flat = out.reshape(-1)
                buffer = np.empty(min(_CHUNK, flat.size), stored)
                for start in range(0, flat.size, _CHUNK):
                    piece = buffer[: min(_CHUNK, flat.size - start)]
                    _fill(file, piece, name)
                    flat[start : start + piece.size] = cast(piece, out.dtype, name)
        except OSError as error:
            raise ConversionError(f"cannot read {tensor.file}: {error.strerror}") from error


def collect(files: Sequence[Path], read_header: Any) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of all files, and one line per damaged file and per tensor that is in two."""
    tensors: dict[str, Tensor] = {}
    problems: list[str] = []
    for file in files:
        try:
            found = read_header(file)
        except ConversionError as error:
            problems.append(str(error))
            continue
        for name, tensor in found.items():
            if name in tensors:
                problems.append(f"{name}: in both {tensors[name].file.name} and {file.name}")
            tensors[name] = tensor
    return tensors, problems


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
            natural = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        except (KeyError, TypeError, ValueError) as error:
            raise ConversionError(f"{path} has a damaged header: entry {name!r:.80}") from error
        known = _SAFETENSORS_DTYPES.get(dtype) if isinstance(dtype, str) else None
        itemsize = DTYPES[known].itemsize if known else None
        if not natural or begin > end or (itemsize and math.prod(shape) * itemsize != end - begin):
            raise ConversionError(
                f"{path} has a damaged header: {name} of dtype {dtype!r:.20} and shape "
                f"{shape!r:.80} cannot lie at bytes {begin!r:.40} to {end!r:.40}"
            )
        tensors[name] = Tensor(known or str(dtype), tuple(shape), path, 8 + length + begin)
        ranges.append((begin, end, name))

    # The data must be what the header says, without holes, overlaps or a missing end.
    position = 0
    for begin, end, name in sorted(ranges):
        if begin != position:
            raise ConversionError(
                f"{path} has a damaged header: {name} overlaps, or follows a hole"
            )
        position = end
    if 8 + length + position != size:
        raise ConversionError(
            f"{path} is truncated or has trailing data: its header describes "
            f"{8 + length + position} bytes, and the file has {size}"
        )
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a name occurs twice")
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
