"""Where the real checkpoints are."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real checkpoints, configs and texts. Where they are absent tests skip, but not in CI."""
    path = Path(os.environ.get("S3D_TEST_DATA", ROOT.parent / "shared" / "data")).resolve()
    if not (path / "checkpoints").is_dir():
        reason = f"no test data at {path}: set S3D_TEST_DATA to the folder with checkpoints/"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    return path
