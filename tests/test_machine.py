"""What is measured of the machine, and what it is called."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import convert
from s3d_jax import machine
from s3d_jax.commands.main import main
from s3d_jax.lm import EMBEDDED
from tests.convert.hf_folder import write_folder


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a GPU's name has no threads in it")
def test_the_name_counts_the_cores_that_xla_uses(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(2), raising=False)
    monkeypatch.delenv("NPROC", raising=False)
    assert machine.machine_name().startswith("2 cores of ")
    for limit, name in (("1", "1 core of "), ("2", "2 cores of "), ("9", "2 cores"), ("x", "2 ")):
        monkeypatch.setenv("NPROC", limit)
        assert machine.machine_name().startswith(name)


def test_the_peak_of_memory_can_be_reset(monkeypatch):
    if not machine.reset_peak_memory():
        pytest.skip("this system, or a device's allocator, cannot reset its peak")
    before = machine.peak_memory_bytes()
    block = np.ones(2**25)
    high = machine.peak_memory_bytes()
    assert high - before > 0.9 * block.nbytes
    size = block.nbytes
    del block
    machine.reset_peak_memory()
    assert high - machine.peak_memory_bytes() > 0.9 * size
    assert machine.peak_memory_kind(True) == "the process's resident set"

    def refused(*_):
        raise PermissionError

    monkeypatch.setattr(machine.Path, "write_text", refused)
    assert not machine.reset_peak_memory()
    assert machine.peak_memory_kind(False).endswith("since its start")


@pytest.fixture
def no_device(monkeypatch):
    """As on a machine without what JAX_PLATFORMS names."""

    def refuse(*_):
        raise AssertionError  # jax's own

    monkeypatch.setattr(jax, "devices", refuse)


COMMANDS = ("generate Once", "chat", "bench --limit 1", "tune --no-save", "train --data x --run r",
            "distill --prompts x --out o", "pretrain --data x --out o --run r")  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_a_missing_device_is_named(no_device, tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    model = ["--model", str(EMBEDDED)] if command.split()[0] in ("train", "distill") else []
    extra = ["--overwrite"] if command.startswith("train") else []
    assert main([*command.split(), *model, *extra]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: jax finds no device") and error.count("\n") == 1
    assert "set it to cpu" in error


def test_what_needs_no_device_does_without(no_device, tmp_path, capsys):
    assert main(["info"]) == 0
    folder = write_folder(tmp_path / "hf")
    report = convert.convert(folder, tmp_path / "out", quantization="int8", progress=False)
    assert "DeviceError: jax finds no device" in report.loss_skipped
    convert.export(tmp_path / "out", tmp_path / "back", progress=False)


def test_the_platform_is_named():
    command = [sys.executable, "-m", "s3d_jax", "generate", "Once"]
    env = os.environ | {"JAX_PLATFORMS": "nonsense"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "JAX_PLATFORMS=nonsense" in done.stderr and "Traceback" not in done.stderr
