"""What is measured of the machine, and what it is called."""

import os

import jax
import numpy as np
import pytest

from s3d_jax import machine


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


def test_memory_maps_are_counted(monkeypatch, tmp_path):
    if (maps := machine.memory_maps()) is not None:  # Linux
        assert 50 < maps.used < maps.most
    monkeypatch.setattr(machine, "Path", lambda path: tmp_path / "none")
    assert machine.memory_maps() is None
