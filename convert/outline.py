"""Sources whose weights need not be there yet: for `--dry-run` and `inspect`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert import hf
from convert.families import family_of
from s3d_jax.errors import ConversionError
from s3d_jax.settings.model import DTYPES

UNKNOWN = "?"  # dtype of a tensor that an index names, and the config does not ask for


class Outline:
    """Tensors of which some are expected in files that are not here.

    Args:
        here: those that are, or None.
        expected: those that are not.
    """

    def __init__(self, here: hf.Source | None, expected: Mapping[str, hf.Tensor]) -> None:
        self._here = here
        self.tensors = {**(here.tensors if here else {}), **expected}
        self.faults = here.faults if here else {}

    def read(self, name: str, out: np.ndarray, first_row: int = 0) -> None:
        if self._here is None or name not in self._here.tensors:
            raise ConversionError(f"{self.tensors[name].file} is not here: get it first")
        self._here.read(name, out, first_row)


def open_outline(folder: Path, remote: Mapping[str, int], fields: Mapping[str, Any]) -> hf.Source:
    """The weights of a HF folder, of which no more need be there than config.json and the index.

    What files hold that are not here is taken from the index, or is all of the model where there
    is one file; dtypes and shapes are those of the config.

    Args:
        folder: the HF folder.
        remote: names of files that can be fetched.
        fields: HF's config.json.

    Raises:
        ConversionError: files are damaged, or there is neither a weight file nor an index.
        ConfigError: the config is wrong or not supported.
    """
    files, index = hf.weight_files(folder, remote)
    here = [file for file in files if hf.is_file(file)]
    family = family_of(fields)
    table = family.table(family.config(fields), index)
    shapes = {part.name: part.shape for parts in table.values() for part in parts}
    place = {n: folder / file for n, file in index.items()} or dict.fromkeys(shapes, files[0])
    dtype = named_dtype(fields)
    expected = {
        name: hf.Tensor(dtype if name in shapes else UNKNOWN, shapes.get(name, ()), file)
        for name, file in place.items()
        if file not in here
    }
    opened = {name: file for name, file in index.items() if folder / file in here}
    return Outline(hf.open_files(here, opened) if here else None, expected)


def named_dtype(fields: Mapping[str, Any]) -> str:
    """The dtype that config.json names, else float32."""
    named = fields.get("dtype") or fields.get("torch_dtype")
    return named if named in DTYPES else "float32"
