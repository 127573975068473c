"""What all tests share: one compilation cache, real checkpoints, and packages that are optional."""

import gc
import importlib
import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    """Makes one compilation cache for this run: for workers and for commands that tests start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a background job of a shell
        signal.signal(signal.SIGINT, signal.default_int_handler)  # some tests interrupt commands
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return  # the user's own, or this process is a worker, which inherits the cache of the run
    folder = tempfile.mkdtemp(prefix="s3d-compiled-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


# Files of more than a minute. They begin first, or one of two workers would end with them alone.
LONG = (
    "test_mesh.py", "test_runs.py", "test_step.py", "test_int8.py", "test_methods.py",
    "test_adaptive.py",
    "test_options.py", "test_sampling.py", "test_conversation.py", "test_lossless.py",
    "test_interrupted.py", "test_reports.py", "test_objective.py", "test_families.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Moves the long files to the front."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line for each reason to skip."""
    reports = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in reports)
    for reason, count in reasons.items():
        terminalreporter.write_line(f"{count} tests skipped: {reason}", yellow=True)


@pytest.fixture
def compiled_here() -> Iterator[None]:
    """Compiles all programs of a test in this process, without the cache.

    For tests of memory and copies: what a test asks of an executable must not depend on the way
    that it took through a file.
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
    """Real checkpoints, configs and texts. Tests skip where they are absent, except in CI."""
    path = Path(os.environ.get("S3D_TEST_DATA", ROOT.parent / "shared" / "data")).resolve()
    if not (path / "checkpoints").is_dir():
        _missing(f"they need the real checkpoints of {path} (S3D_TEST_DATA), which are absent")
    return path


# Tests of arithmetic, bits, copies and memory: they ask how XLA optimizes a program. All others
# compile without most optimizations, which takes half of the time.
OPTIMIZED = (
    "decoding", "drafters/test_methods.py", "engine", "nn", "parity", "lm/test_lossless.py",
    "storage/test_embedded.py", "weights/test_dense.py", "weights/test_exact.py",
    "weights/test_int8.py",
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def quick_compilation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compiles the programs of most files quickly, also in the commands that they start."""
    import jax

    name = "JAX_DISABLE_MOST_OPTIMIZATIONS"
    path = request.path.relative_to(ROOT / "tests").as_posix()
    if path.startswith(OPTIMIZED) or name in os.environ:
        yield
        return
    os.environ[name] = "1"
    jax.config.update(name.lower(), True)
    yield
    del os.environ[name]
    jax.config.update(name.lower(), False)


@pytest.fixture(autouse=True, scope="module")
def few_programs() -> Iterator[None]:
    """Frees the programs of a test file.

    Each takes tens of memory maps, of which a Linux process may have 65,530. XLA crashes when it is
    refused one.
    """
    yield
    if "jax" in sys.modules:
        gc.collect()  # models hold their programs
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.fixture
def hf_silent(caplog) -> Callable[[], AbstractContextManager[None]]:
    """A context in which a warning of transformers is an error."""

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
    """Imports an optional module for a test file or a test. Skips without it, except in CI."""
    try:
        return importlib.import_module(module)
    except ImportError:
        _missing(f"this test needs {module}: pip install {module}")


def _missing(reason: str) -> None:
    if os.environ.get("CI"):  # nobody would notice there that a test is not run
        pytest.fail(reason)
    pytest.skip(reason, allow_module_level=True)
