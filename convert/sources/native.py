"""A native checkpoint as a source, to be written in another dtype or quantised."""

import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from convert.sources.base import FLOATS, StoredTensor, cast_into
from s3d_jax.errors import ConversionError
from s3d_jax.storage.arrays import read_array
from s3d_jax.storage.native import Header, read_header


class NativeSource:
    """The arrays of a native checkpoint in a float type, under their native paths.

    Args:
        header: the checkpoint's.
    """

    def __init__(self, header: Header) -> None:
        self._records = header.arrays
        weights, dtype = header.path / "weights", FLOATS[header.config.dtype]
        self.tensors: dict[str, StoredTensor] = {}
        for path, record in header.arrays.items():
            size = math.prod(record.shape) * dtype.itemsize
            self.tensors[path] = StoredTensor(dtype.name, record.shape, weights, size, dtype)
        self.faults: Mapping[str, str] = {}

    def read(self, name: str, out: np.ndarray, first_row: int = 0) -> None:
        tensor = self.tensors[name]
        array = read_array(tensor.file, name, self._records[name], tensor.values)
        cast_into(out, array[first_row : first_row + len(out)], name)


def open_native(folder: str | os.PathLike[str]) -> tuple[Header, NativeSource]:
    """Opens a native checkpoint.

    Raises:
        ConversionError: it is quantised already.
        CheckpointError: its header is damaged.
    """
    header = read_header(Path(folder))
    if header.config.quantization:
        raise ConversionError(
            f"{folder} is in {header.config.quantization}, which is no float type: convert what "
            "it was made from; or, to have these weights in a float type, write a HF folder "
            "(s3d-convert export) and convert that"
        )
    return header, NativeSource(header)
