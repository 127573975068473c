"""Sources whose weights need not be there yet, for `--dry-run` and `inspect`."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convert.families import Family
from convert.sources.base import FLOATS, UNKNOWN, Source, StoredTensor, is_file
from convert.sources.hf_folder import open_files, weight_files
from convert.sources.wrappers import plain_names, wrappers_of
from s3d_jax.errors import ConversionError
from s3d_jax.settings.model import DTYPES


class Outline:
    """Tensors of which some are expected in files that are not here.

    Args:
        here: the source of the tensors that are here, or None.
        expected: the tensors that are not.
        wrappers: what wrapped the model, in words.
    """

    def __init__(
        self, here: Source | None, expected: Mapping[str, StoredTensor], wrappers: tuple[str, ...]
    ) -> None:
        self._here, self.wrappers = here, wrappers
        self.tensors = {**(here.tensors if here else {}), **expected}
        self.faults = here.faults if here else {}

    def read(self, name: str, out: np.ndarray, first_row: int = 0) -> None:
        if self._here is None or name not in self._here.tensors:
            raise ConversionError(f"{self.tensors[name].file} is not here: get it first")
        self._here.read(name, out, first_row)


def open_outline(
    folder: Path,
    remote: Mapping[str, int],
    family: Family,
    fields: Mapping[str, Any],
    ignored: Sequence[str] = (),
) -> Outline:
    """The weights of a HF folder, of which no more need be there than config.json and the index.

    The index says what the absent files hold. Without an index there is one file, which holds the
    whole model. The config gives types and shapes of the tensors.

    Args:
        folder: the HF folder.
        remote: names of files that can be fetched.
        family: the kind of model.
        fields: HF's config.json.
        ignored: its fields that are not understood and may be.

    Raises:
        ConversionError: files are damaged, or there is neither a weight file nor an index.
        ConfigError: the config is wrong or not supported.
    """
    files, index = weight_files(folder, remote)
    here = [file for file in files if is_file(file)]
    names = plain_names(index)
    plain = {names[name]: folder / file for name, file in index.items()}
    table = family.table(family.config(fields, ignored), plain)
    shapes = {part.name: part.shape for parts in table.values() for part in parts}
    place = plain or dict.fromkeys(shapes, files[0])
    dtype = named_dtype(fields)

    def expect(name: str, file: Path) -> StoredTensor:
        if (shape := shapes.get(name)) is None:
            return StoredTensor(UNKNOWN, (), file, 0, None)
        size = math.prod(shape) * FLOATS[dtype].itemsize
        return StoredTensor(dtype, shape, file, size, FLOATS[dtype])

    expected = {name: expect(name, file) for name, file in place.items() if file not in here}
    opened = {name: file for name, file in index.items() if folder / file in here}
    source = open_files(here, opened, index) if here else None
    return Outline(source, expected, source.wrappers if source else wrappers_of(names))


def named_dtype(fields: Mapping[str, Any]) -> str:
    """The dtype that config.json names, else float32."""
    named = fields.get("dtype") or fields.get("torch_dtype")
    return named if named in DTYPES else "float32"
