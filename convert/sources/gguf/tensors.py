"""The tensors of a GGUF file, under HF's names and in HF's order."""

from pathlib import Path
from typing import Any

import numpy as np

from convert.sources.base import AGAIN, CHUNK, FLOATS, STORED_AS, StoredTensor, cast_into
from convert.sources.gguf.blocks import KINDS, Groups, groups_of
from convert.sources.gguf.config import Architecture
from convert.sources.gguf.metadata import damage_named
from s3d_jax.errors import ConversionError
from s3d_jax.weights.blocks import Blocks

# llama.cpp's names of the types that are read; float types under ours.
_FLOAT_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_BLOCK_TYPES = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL",
)  # fmt: skip


def stored_dtype(tensor: Any) -> str:
    """The type of a tensor: "float32" and so on, or llama.cpp's name, such as "Q4_K"."""
    kind = tensor.tensor_type.name
    return _FLOAT_TYPES.get(kind, kind)


class GgufSource:
    """Tensors of a GGUF file.

    Args:
        path: the file.
        tensors: the gguf package's, by the names that they have here.
        num_heads: of each query and key projection whose rows are in pairs: its heads.
        architecture: says what is stored otherwise than in HF's files.
    """

    def __init__(
        self,
        path: Path,
        tensors: dict[str, Any],
        num_heads: dict[str, int],
        architecture: Architecture,
    ) -> None:
        self.tensors = {name: _describe(path, tensor) for name, tensor in tensors.items()}
        known = ", ".join((*_FLOAT_TYPES, *_BLOCK_TYPES))
        self.faults = {
            name: f"{STORED_AS} {tensor.dtype}, and supported are {known}"
            for name, tensor in self.tensors.items()
            if tensor.values is None
        }
        self._path, self._raw = path, tensors
        self._num_heads, self._norm_offset = num_heads, architecture.norm_offset

    def read(self, name: str, out: np.ndarray, first_row: int = 0) -> None:
        """As `Source.read`; a few rows at a time are widened from blocks."""
        columns = max(1, out.size // max(1, len(out)))
        step = max(1, CHUNK // columns)
        order = self._row_order(name)
        for start in range(0, len(out), step):
            end = min(start + step, len(out))
            rows = order[first_row + start : first_row + end]
            with damage_named(self._path):
                values = _widen(self._raw[name], rows)
            if self._norm_offset and name.endswith("norm.weight"):
                values = values.astype(np.float32) - np.float32(self._norm_offset)
            cast_into(out[start:end], values, name)

    def block_kind(self, name: str) -> Blocks | None:
        """The kind of group that holds a tensor's blocks exactly; None for floats.

        Raises:
            ConversionError: no kind does.
        """
        if (dtype := self.tensors[name].dtype) in FLOATS:
            return None
        if dtype not in KINDS:
            raise ConversionError(
                f"{name} is {STORED_AS} {dtype}, and the blocks that can be kept are those of "
                f"{', '.join(KINDS)}: convert to int8 or a float type instead"
            )
        return KINDS[dtype]

    def read_blocks(self, name: str) -> Groups:
        """All rows of a tensor of blocks, without widening them.

        Raises:
            ConversionError: scales are no numbers.
        """
        with damage_named(self._path):
            groups = groups_of(
                self._raw[name].data[self._row_order(name)], self.tensors[name].dtype
            )
        for part in (groups.scale, groups.offset):
            if part is not None and not np.isfinite(part).all():
                raise ConversionError(
                    f"{name} in {self._path} holds infinities or NaN: it is damaged; {AGAIN}"
                )
        return groups

    def _row_order(self, name: str) -> np.ndarray:
        """The file's row for each row of the HF tensor."""
        count = self.tensors[name].shape[0]
        rows = np.arange(count)
        if (heads := self._num_heads.get(name)) is None:
            return rows
        return rows.reshape(heads, -1, 2).swapaxes(1, 2).reshape(count)


def _describe(path: Path, tensor: Any) -> StoredTensor:
    dtype = stored_dtype(tensor)
    shape = tuple(int(size) for size in reversed(tensor.shape))
    is_known = dtype in FLOATS or dtype in _BLOCK_TYPES
    values = FLOATS.get(dtype, FLOATS["float32"]) if is_known else None
    return StoredTensor(
        dtype, shape, path, int(tensor.n_bytes), values, offset=int(tensor.data_offset)
    )


def _widen(tensor: Any, rows: np.ndarray) -> np.ndarray:
    """Some rows as floats; exactly the numbers that the blocks stand for."""
    import gguf

    is_range = len(rows) and rows[-1] - rows[0] == len(rows) - 1 and np.all(np.diff(rows) == 1)
    packed = tensor.data[rows[0] : rows[-1] + 1] if is_range else tensor.data[rows]
    if (dtype := FLOATS.get(stored_dtype(tensor))) is not None:
        return np.ascontiguousarray(packed).view(dtype)
    return gguf.dequantize(np.ascontiguousarray(packed), tensor.tensor_type)
