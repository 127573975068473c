"""Several devices: `cases.py`, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("cases.py")


def run(*arguments: str) -> None:
    flags = "--xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    done = subprocess.run(
        [*command, *arguments],
        env=environment,
        cwd=CASES.parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_on_eight_devices():
    run("-m", "not exhaustive")


@pytest.mark.exhaustive
def test_all_on_eight_devices():
    run("-m", "exhaustive")
