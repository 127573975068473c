"""A native checkpoint as a source, to be written in another dtype or quantised."""

import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from convert.sources.base import StoredTensor
from s3d_jax.errors import ConversionError
from s3d_jax.storage.native import Header, array_dtypes, cast, flatten, read_group, read_header


class NativeSource:
    """The arrays of a native checkpoint, under their native paths.

    One group of arrays is in memory at a time, and each of its arrays until it has been read.

    Args:
        header: the checkpoint's.
    """

    def __init__(self, header: Header) -> None:
        self._header = header
        self._group: dict[str, np.ndarray] = {}
        weights, dtypes = header.path / "weights", array_dtypes(header.config)
        self.tensors: Mapping[str, StoredTensor] = {
            path: StoredTensor(
                dtypes[path].name,
                shape,
                weights,
                math.prod(shape) * dtypes[path].itemsize,
                dtypes[path],
            )
            for path, shape in header.arrays.items()
        }
        self.faults: Mapping[str, str] = {}

    def read(self, name: str, out: np.ndarray, first_row: int = 0) -> None:
        if name not in self._group:
            self._group.clear()  # before the next one is read
            group = name.partition("/")[0]
            self._group = flatten(read_group(self._header, group), group)
        array = self._group.pop(name)
        out[...] = cast(array[first_row : first_row + len(out)], out.dtype, name)


def open_native(folder: str | os.PathLike[str]) -> tuple[Header, NativeSource]:
    """Opens a native checkpoint.

    Raises:
        ConversionError: it is quantised already.
        CheckpointError: its header is damaged.
    """
    header = read_header(Path(folder))
    if header.config.quantization:
        raise ConversionError(
            f"{folder} is in {header.config.quantization}, which is rounded already: convert what "
            "it was made from; or, to have these weights in a float type, write a HF folder "
            "(s3d-convert export) and convert that"
        )
    return header, NativeSource(header)
