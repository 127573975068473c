"""Models that all tests of `LM` share."""

from pathlib import Path

import pytest

import convert
import s3d_jax
from tests.tiny import tiny_lm

REAL = ("babyllama-1m", "stories260k")


@pytest.fixture(scope="session")
def native(data_dir, tmp_path_factory) -> dict[str, Path]:
    """Real checkpoints, converted."""
    folders = {name: tmp_path_factory.mktemp(name) / "native" for name in REAL}
    for name, folder in folders.items():
        convert.convert(data_dir / "checkpoints" / name, folder, parity=False, progress=False)
    return folders


@pytest.fixture(scope="module")
def real(native) -> dict[str, s3d_jax.LM]:
    return {name: s3d_jax.load(folder) for name, folder in native.items()}


@pytest.fixture(scope="module")
def baby(real) -> s3d_jax.LM:
    return real["babyllama-1m"]


@pytest.fixture(scope="module")
def tiny() -> s3d_jax.LM:
    return tiny_lm()
