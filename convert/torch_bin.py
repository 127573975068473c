"""PyTorch's `.bin` checkpoints, read without executing the code that pickles can hold."""

import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert.hf import CHUNK, Tensor, collect
from s3d_jax.errors import ConversionError
from s3d_jax.storage.arrays import cast


class TorchSource:
    """Tensors of one or many `.bin` files, one of which is open at a time.

    The open file is mapped, so that only the tensor that is read takes memory. The format before
    torch 1.6 cannot be mapped: there the whole of one file is in memory.

    Args:
        files: all of them.
        index: for each tensor the name of its file, or empty.

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
            # Dropped before the next is loaded: a file of the old format is in memory as a whole.
            self._path, self._state = None, {}
            self._state = load(file)
            self._path = file
        return self._state

    def _header(self, file: Path) -> dict[str, Tensor]:
        return {
            name: Tensor(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), file)
            for name, tensor in self._load(file).items()
        }

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
        flat = out.reshape(-1)
        for start in range(0, flat.size, CHUNK):
            piece = slice(start, start + CHUNK)
            flat[piece] = cast(values[piece], out.dtype, name)


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
    try:
        _check_stored(path)
        options: dict[str, Any] = dict(map_location="cpu", weights_only=True)
        with warnings.catch_warnings(action="ignore"):  # of what then ends in an error anyway
            try:
                state = torch.load(path, mmap=True, **options)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                state = torch.load(path, **options)  # the format before torch 1.6
    except OSError as error:
        raise ConversionError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # unpickling raises most kinds
        reason = str(error).strip().partition("\n")[0]
        raise ConversionError(
            f"{path} is damaged, or holds more than tensors, which is not loaded because it could "
            f"execute code ({reason:.300}): get a good copy, or a checkpoint in safetensors"
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
    """Refuses compressed records, which torch never writes: a few bytes may fill the memory."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                raise ValueError("it is compressed")


def _check_sums(path: Path) -> None:
    """Compares a file with its own CRC-32 sums, which torch does not.

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
