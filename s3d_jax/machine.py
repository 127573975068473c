"""The machine that jax computes on: its device, its name, its cores, and its memory."""

import os
import platform
from pathlib import Path
from typing import Any

from s3d_jax.errors import DeviceError


def default_device() -> Any:
    """The `jax.Device` that jax computes on.

    Raises:
        DeviceError: there is none, as where JAX_PLATFORMS names a kind that this machine lacks.
    """
    import jax

    try:
        return jax.devices()[0]
    except (RuntimeError, AssertionError) as error:  # the second has no text: jax 0.10 and CUDA
        wanted = jax.config.jax_platforms  # type: ignore[attr-defined]
        named = f" of the kind that JAX_PLATFORMS={wanted} names" if wanted else ""
        reason = f" ({str(error).splitlines()[0]})" if str(error) else ""
        raise DeviceError(
            f"jax finds no device{named}{reason}: unset JAX_PLATFORMS or set it to cpu, or install "
            "jax for the device (for NVIDIA's: pip install 's3d-jax[cuda]')"
        ) from error


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


def peak_memory_bytes() -> int:
    """Peak memory of the device's allocator, otherwise of the process's resident set.

    Returns:
        Bytes; 0 where the system reports neither.
    """
    if (peak := _allocator_peak()) is not None:
        return peak
    # Linux's getrusage would include what the parent had when it started this process.
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text().splitlines()
        return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("VmHWM")), 0)
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


def _allocator_peak() -> int | None:
    """Peak bytes of the device's allocator; None where it does not report them (CPUs)."""
    peak = (default_device().memory_stats() or {}).get("peak_bytes_in_use")
    return None if peak is None else int(peak)
