"""What some tests need from outside: the real checkpoints, and packages that are optional."""

import gc
import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    """Gives all workers, and the commands that tests start, one compilation cache for this run."""
    if hasattr(config, "workerinput") or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return  # a worker of pytest-xdist inherits the folder; a cache of the user's own outlives us
    folder = tempfile.mkdtemp(prefix="s3d-compiled-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


@pytest.fixture
def compiled_here() -> Iterator[None]:
    """Compiles in this process what the test runs.

    An executable read from the compilation cache does not know all that a test may ask, such as its
    memory, and compiling it takes no time.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    jax.clear_caches()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real checkpoints, configs and texts. Where they are absent tests skip, but not in CI."""
    path = Path(os.environ.get("S3D_TEST_DATA", ROOT.parent / "shared" / "data")).resolve()
    if not (path / "checkpoints").is_dir():
        _missing(f"no test data at {path}: set S3D_TEST_DATA to the folder with checkpoints/")
    return path


@pytest.fixture(autouse=True, scope="module")
def few_programs() -> Iterator[None]:
    """Lets go of the programs that a test file compiled.

    Each takes tens of memory maps, and a Linux process may have 65,530: XLA, refused one more, ends
    in a segmentation fault.
    """
    yield
    if "jax" in sys.modules:
        gc.collect()  # models hold their programs
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.fixture
def hf_silent(caplog) -> Callable[[], AbstractContextManager[None]]:
    """A context in which transformers must not warn."""

    @contextmanager
    def silent() -> Iterator[None]:
        transformers = need("transformers")
        caplog.clear()
        transformers.logging.enable_propagation()
        transformers.utils.logging.warning_once.cache_clear()
        with caplog.at_level("WARNING"):
            yield
        transformers.logging.disable_propagation()
        assert [record.message for record in caplog.records] == []

    return silent


def need(module: str) -> Any:
    """An optional module, for a whole test file or one test. Skips without it, but not in CI."""
    try:
        return importlib.import_module(module)
    except ImportError:
        _missing(f"this test needs {module}: pip install {module}")


def _missing(reason: str) -> None:
    if os.environ.get("CI"):  # where nobody would notice a test that is not run
        pytest.fail(reason)
    pytest.skip(reason, allow_module_level=True)
