"""PyTorch's `.bin` checkpoints, read without executing code that pickles may hold."""

import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert.sources.base import (
    FLOATS,
    StoredTensor,
    cast_into,
    collect,
    first_line,
    reading,
)
from s3d_jax.errors import ConversionError

_MAGIC = (b"PK\x03\x04", b"\x80\x02\x8a\x0a")  # zip, and the pickle of torch before 1.6


def is_torch_file(path: Path) -> bool:
    """Whether it is one of torch's files, by its name in a HF folder or by its content."""
    with reading(path), open(path, "rb") as file:
        return path.name.startswith("pytorch_model") or file.read(4) in _MAGIC


class TorchSource:
    """Tensors of one or many `.bin` files, one of which is open at a time.

    The open file is mapped, so only the tensor that is read takes memory. The format before torch
    1.6 cannot be mapped: there one whole file is in memory.

    Args:
        files: all of them.
        index: the file name of each tensor, or empty.

    Raises:
        ConversionError: torch is missing, or files are damaged.
    """

    def __init__(self, files: Sequence[Path], index: Mapping[str, str] | None = None) -> None:
        self._sound: set[Path] = set()
        self._path: Path | None = None
        self._state: dict[str, Any] = {}
        self.tensors, self.faults = collect(files, index or {}, self._header)

    def _load(self, file: Path) -> dict[str, Any]:
        if file != self._path:
            # Dropped before the next one is loaded: a file of the old format is wholly in memory.
            self._path, self._state = None, {}
            self._state = load(file)
            self._path = file
        return self._state

    def _header(self, file: Path) -> dict[str, StoredTensor]:
        tensors = {}
        for name, tensor in self._load(file).items():
            dtype, size = str(tensor.dtype).removeprefix("torch."), tensor.nbytes
            tensors[name] = StoredTensor(dtype, tuple(tensor.shape), file, size, FLOATS.get(dtype))
        return tensors

    def read(self, name: str, out: np.ndarray, first_row: int = 0) -> None:
        import torch

        file = self.tensors[name].file
        if file not in self._sound:
            _check_sums(file)
            self._sound.add(file)
        tensor = self._load(file)[name]
        if tensor.ndim:
            tensor = tensor[first_row : first_row + len(out)]
        tensor = tensor.contiguous().reshape(-1)
        is_bfloat16 = tensor.dtype == torch.bfloat16  # which numpy knows only by ml_dtypes
        values = tensor.view(torch.int16).numpy() if is_bfloat16 else tensor.numpy()
        values = values.view(ml_dtypes.bfloat16) if is_bfloat16 else values
        cast_into(out, values, name)


def load(path: Path) -> dict[str, Any]:
    """The tensors of one file, mapped into memory where its format allows.

    Raises:
        ConversionError: torch is missing, or the file is damaged or holds more than tensors.
    """
    try:
        import torch
    except ImportError as error:
        raise ConversionError(
            f"{path} needs torch to be read: pip install 's3d-jax[torch]', or use a checkpoint in "
            "safetensors"
        ) from error
    options: dict[str, Any] = dict(map_location="cpu", weights_only=True)
    try:
        _check_stored(path)
        with warnings.catch_warnings(action="ignore"):  # what it warns of ends in an error here
            try:
                state = torch.load(path, mmap=True, **options)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                state = torch.load(path, **options)  # the format before torch 1.6
    except OSError as error:
        raise ConversionError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # unpickling raises most kinds
        raise ConversionError(
            f"{path} is damaged, or holds more than tensors, which is not loaded because it could "
            f"execute code ({first_line(error):.300}): get a good copy, or a checkpoint in "
            "safetensors"
        ) from error
    named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not named or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise ConversionError(
            f"{path} must hold a dict of tensors: save the model's state_dict() alone, and convert "
            "again"
        )
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise ConversionError(
                f"{path}: {name} is no plain tensor ({tensor.layout}, {tensor.device}): save it as "
                "one, and convert again"
            )
    return {name: tensor.detach() for name, tensor in state.items()}


def _check_stored(path: Path) -> None:
    """Refuses compressed records, which torch never writes: a few bytes could fill the memory."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                raise ValueError("it is compressed")


def _check_sums(path: Path) -> None:
    """Compares a file with its own CRC-32 sums, because torch does not.

    Raises:
        ConversionError: they differ.
    """
    if not zipfile.is_zipfile(path):  # the format before torch 1.6 has none
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
        damaged = str(error)
    if damaged:
        raise ConversionError(
            f"{path} is damaged ({damaged}): get a good copy of it, and convert again"
        )
