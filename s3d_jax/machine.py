"""The machine that jax computes on: its device, its name, its cores, and its memory."""

import contextlib
import ctypes
import functools
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from s3d_jax.errors import DeviceError


def default_device() -> Any:
    """The `jax.Device` that jax computes on; of several hosts, this host's first.

    Raises:
        DeviceError: there is none, as where JAX_PLATFORMS names a kind that this machine lacks.

    Warns:
        UserWarning: it is the CPU, though the machine has an NVIDIA GPU; once in a process.
    """
    import jax

    try:
        device = jax.local_devices()[0]
    except (RuntimeError, AssertionError) as error:  # the second has no text: jax 0.10 and CUDA
        wanted = jax.config.jax_platforms  # type: ignore[attr-defined]
        named = f" of the kind that JAX_PLATFORMS={wanted} names" if wanted else ""
        reason = f" ({str(error).splitlines()[0]})" if str(error) else ""
        raise DeviceError(
            f"jax finds no device{named}{reason}: unset JAX_PLATFORMS or set it to cpu, or install "
            f"jax for the device (for NVIDIA's: {_plugin_advice()})"
        ) from error
    if device.platform == "cpu":
        _warn_of_an_idle_gpu()
    return device


@functools.cache
def _warn_of_an_idle_gpu() -> None:
    import jax

    wanted = jax.config.jax_platforms or ""  # type: ignore[attr-defined]
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if wanted.startswith("cpu") or hidden or not _has_nvidia_gpu():  # or the user chose the CPU
        return
    warnings.warn(
        f"jax {jax.__version__} computes on the CPU, though this machine has an NVIDIA GPU: "
        f"{_plugin_advice()}. JAX_PLATFORMS=cpu says that the CPU is meant",
        stacklevel=3,
    )


def _has_nvidia_gpu() -> bool:
    if any(Path("/dev").glob("nvidia[0-9]*")):
        return True
    if (command := shutil.which("nvidia-smi")) is None:  # Windows and WSL have no such files
        return False
    try:
        listed = subprocess.run([command, "-L"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return "GPU 0" in listed.stdout


_DRIVERS = {"cuda12": 525, "cuda13": 580}  # the oldest that jax's wheels work with


def _plugin_advice() -> str:
    """What is wrong with jax's CUDA plugin, and what to do about it."""
    jax_version, jaxlib = _installed("jax"), _installed("jaxlib")
    found = {cuda: _installed(f"jax-{cuda}-plugin") for cuda in _DRIVERS}
    found = {cuda: version for cuda, version in found.items() if version}
    again = f"pip install 'jax[{{}}]=={jax_version}', and start Python again"
    if not found:
        return f"jax's CUDA plugin is not installed: {again.format('cuda12')}"
    for cuda, version in found.items():
        if _release(version) == _release(jaxlib):
            return (
                f"jax-{cuda}-plugin {version} is installed and fits: nvidia-smi shows whether the "
                f"driver runs and is new enough ({_DRIVERS[cuda]} or newer), and "
                "JAX_PLATFORMS=cuda makes jax say what it lacks"
            )
    cuda, version = next(iter(found.items()))
    return f"jax-{cuda}-plugin {version} does not fit jaxlib {jaxlib}: {again.format(cuda)}"


def _installed(package: str) -> str:
    """Its version; empty if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _release(version: str) -> str:
    """The numbers of a version, which jax compares: "0.7.2" of "0.7.2.dev1"."""
    match = re.match(r"\d+(\.\d+)*", version)
    return match[0] if match else version


def compute_capability() -> float | None:
    """NVIDIA's number for what a GPU can do: 7.5 is a T4, 8.0 an A100, 8.9 an L4.

    None of another device, and without one.
    """
    try:
        device = default_device()
    except DeviceError:  # shapes can be computed without one
        return None
    text = str(getattr(device, "compute_capability", ""))
    return float(text) if re.fullmatch(r"\d+\.\d", text) else None


def is_before_ampere() -> bool:
    """Whether the GPU multiplies float16 and int8 fast, and bfloat16 not (T4, V100)."""
    capability = compute_capability()
    return capability is not None and capability < 8.0


def warn_of_the_device(dtype: str) -> None:
    """Warns of what makes computing in a type slow, or takes memory, on the device.

    Args:
        dtype: of the weights, or of what is not int8.

    Warns:
        UserWarning: the GPU has no fast bfloat16 (`is_before_ampere`); or torch, which uses it in
            this process, has what jax leaves.
    """
    device = default_device()  # the stack levels below are those of who calls s3d_jax.load
    if dtype == "bfloat16" and is_before_ampere():
        warnings.warn(
            f"{device.device_kind} has no fast bfloat16: load the model with dtype='float16' "
            "(--dtype float16)",
            stacklevel=6,
        )
    torch = sys.modules.get("torch")
    if device.platform == "gpu" and torch and torch.cuda.is_initialized() and _preallocates():
        warnings.warn(f"torch uses the GPU in this process too, and {_TORCH_ADVICE}", stacklevel=6)


_TORCH_ADVICE = (
    "jax reserves 75 % of the GPU's memory for itself: set XLA_PYTHON_CLIENT_PREALLOCATE=false "
    "before Python starts, and jax takes what it needs"
)


def _preallocates() -> bool:
    asked = os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "").lower()
    default = os.environ.get("XLA_PYTHON_CLIENT_ALLOCATOR", "default").lower() == "default"
    return default and asked not in ("false", "0") and not _has_fraction()


def _has_fraction() -> bool:
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    return any(os.environ.get(name) for name in names)


def machine_name() -> str:
    """The device that jax computes on, in words: "2 cores of Intel Xeon, Linux"."""
    device = default_device()
    if device.platform != "cpu":
        return f"{device.device_kind}, {platform.system()}"
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        name = next((x.partition(":")[2].strip() for x in lines if "model name" in x), name)
    cores = core_count()
    return f"{cores} core{'s' * (cores != 1)} of {name}, {platform.system()}"


def core_count() -> int:
    """Cores that XLA computes on: all that the process may use, or fewer if NPROC says so."""
    usable = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if usable else os.cpu_count() or 1
    limit = os.environ.get("NPROC", "")
    return min(cores, int(limit)) if limit.isdecimal() and int(limit) else cores


def check_memory(needed: int, what: str, advice: str) -> None:
    """Refuses what cannot fit, before any of it is allocated.

    Args:
        needed: bytes of the device's memory.
        what: what needs them, with its verb: "the weights need".
        advice: what the user can do.

    Raises:
        DeviceError: more is needed than is free. Not where that is unknown.
    """
    if needed < _ALWAYS_TRIED:
        return
    free = free_memory_bytes()
    if free is not None and needed > free:
        raise DeviceError(
            f"{what} {needed / 1e9:.2f} GB of memory, and {free / 1e9:.2f} GB are free: {advice}"
            f"{_share_advice()}"
        )


@contextlib.contextmanager
def out_of_memory_explained(words: Callable[[], str]) -> Iterator[None]:
    """Runs its body; says what to do where that runs out of the device's memory.

    Args:
        words: what did not fit, and what the user can do; called after the failure.

    Raises:
        DeviceError: jax, or torch, got no memory.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        advice = f"; {_TORCH_ADVICE}" if type(error).__name__ == _TORCH else _share_advice()
        raise DeviceError(f"out of memory: {words()}{advice}") from error


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether jax or torch says by this error that a device has no memory left."""
    # By name, since neither may be imported here; the first is jax's before 0.8.
    name = type(error).__name__
    of_jax = name in ("XlaRuntimeError", "JaxRuntimeError") and "RESOURCE_EXHAUSTED" in str(error)
    return of_jax or name == _TORCH


_TORCH = "OutOfMemoryError"


def _share_advice() -> str:
    """How jax gets more of a GPU's memory, if it can."""
    if default_device().platform != "gpu" or _has_fraction():
        return ""
    return (
        "; or let jax use more than 75 % of the GPU, with XLA_CLIENT_MEM_FRACTION=0.95 set before "
        "Python starts"
    )


_ALWAYS_TRIED = 64 * 2**20  # bytes; looking takes longer than it takes to allocate fewer


def memory_limit_bytes() -> int | None:
    """Bytes that jax may use of the device's memory; None if unknown, as on CPUs."""
    limit = (default_device().memory_stats() or {}).get("bytes_limit")
    return None if limit is None else int(limit)


def free_memory_bytes() -> int | None:
    """Bytes that the device can still give; of a CPU those of the process. None if unknown."""
    device = default_device()
    if device.platform == "cpu":
        return free_host_memory_bytes()
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats or "bytes_in_use" not in stats:
        return None
    return int(stats["bytes_limit"]) - int(stats["bytes_in_use"])


def free_host_memory_bytes() -> int | None:
    """Bytes of main memory that the process can still take; None where nothing says so.

    The least of what the system, the process's limit (ulimit -v) and its control groups leave.
    """
    return min(_host_limits(), default=None)


def _host_limits() -> Iterator[int]:
    system = _fields(Path("/proc/meminfo"))
    if "MemAvailable:" in system:  # a swapped cache is slow, but not impossible
        yield 1024 * (system["MemAvailable:"] + system.get("SwapFree:", 0))
    try:
        import resource
    except ImportError:  # Windows
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    used = _fields(Path("/proc/self/status")).get("VmSize:")
    if limit != resource.RLIM_INFINITY and used is not None:
        yield max(0, limit - 1024 * used)
    for folder, maximum, current in _control_groups():
        allowed, taken = _number(folder / maximum), _number(folder / current)
        if allowed is not None and taken is not None:
            # The system gives up cached files before it refuses memory.
            cached = _fields(folder / "memory.stat").get("inactive_file", 0)
            yield max(0, allowed - taken + cached)


def _control_groups() -> Iterator[tuple[Path, str, str]]:
    """Folders that may limit this process's memory, with the names of limit and use."""
    root = Path("/sys/fs/cgroup")
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds == "":  # version 2
            base, names = root, ("memory.max", "memory.current")
        elif "memory" in kinds.split(","):
            base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        own = base / path.lstrip("/")
        for folder in (own, *own.parents):  # a parent's limit holds too
            yield folder, *names
            if folder == base:
                break


def _fields(path: Path) -> dict[str, int]:
    """The numbers of a file of lines "name number ..."; empty if there is none."""
    try:
        rows = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}


def _number(path: Path) -> int | None:
    """The number that a file holds; None if it holds another word ("max"), or is missing."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def peak_memory_bytes() -> int:
    """Peak memory of the device's allocator, otherwise of the process's resident set.

    Returns:
        Bytes; 0 where the system reports neither.
    """
    if (peak := _allocator_peak()) is not None:
        return peak
    # Linux's getrusage would include what the parent had when it started this process.
    if status := _fields(Path("/proc/self/status")):
        return 1024 * status.get("VmHWM:", 0)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def reset_peak_memory() -> bool:
    """Lets `peak_memory_bytes` start again from the memory that is in use now.

    Returns:
        Whether that worked. Linux can reset the peak of a resident set. A device's allocator
        cannot, nor can a container without a writable /proc.
    """
    if _allocator_peak() is not None:
        return False
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory_kind(was_reset: bool) -> str:
    """What `peak_memory_bytes` measures, in words.

    Args:
        was_reset: what `reset_peak_memory` returned.
    """
    if was_reset:
        return "the process's resident set"
    if _allocator_peak() is not None:
        return "the device's allocator since the start of the process"
    return "the process's resident set since its start"


class MemoryMaps(NamedTuple):
    """Memory maps of this process.

    Attributes:
        used: how many it has.
        most: how many the system allows.
    """

    used: int
    most: int


def memory_maps() -> MemoryMaps | None:
    """How many memory maps the process has and may have; None where that is not known or unlimited.

    Linux alone limits them, and aborts what XLA compiles beyond the limit.
    """
    try:
        most = int(Path("/proc/sys/vm/max_map_count").read_text())
        return MemoryMaps(Path("/proc/self/maps").read_bytes().count(b"\n"), most)
    except (OSError, ValueError):
        return None


def return_free_memory() -> None:
    """Returns to the system what the process has freed; does nothing where that is not possible.

    glibc keeps it, since it lies between blocks in use: of 32 compiled programs that were freed,
    all 2.4 GiB.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc; Windows
        ctypes.CDLL(None).malloc_trim(0)


def _allocator_peak() -> int | None:
    """Peak bytes of the device's allocator; None where it does not report them (CPUs)."""
    peak = (default_device().memory_stats() or {}).get("peak_bytes_in_use")
    return None if peak is None else int(peak)
