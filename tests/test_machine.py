"""What is measured of the machine, and what it is called."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import convert
import s3d_jax.engine.batch
from s3d_jax import machine
from s3d_jax.commands.main import main
from s3d_jax.engine.batch import Batch
from s3d_jax.errors import DeviceError
from s3d_jax.lm import EMBEDDED
from tests.convert.hf_folder import write_folder
from tests.tiny import tiny_lm


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


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's count of pages")
def test_what_is_freed_returns_to_the_system():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    pieces = [bytearray(1000) for _ in range(200_000)]
    pieces = pieces[::1000]  # they lie between the freed ones
    before = resident()
    machine.return_free_memory()
    assert before - resident() > 100 * 2**20
    assert len(pieces) == 200


@pytest.fixture
def no_device(monkeypatch):
    """As on a machine without what JAX_PLATFORMS names."""

    def refuse(*_):
        raise AssertionError  # jax's own

    monkeypatch.setattr(jax, "local_devices", refuse)


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


def test_the_least_limit_counts(tmp_path, monkeypatch):
    """The system, `ulimit -v` and the control group, each the tightest in turn."""
    files = {
        "/proc/meminfo": "MemTotal: 99 kB\nMemAvailable: 7000 kB\nSwapFree: 1000 kB\n",
        "/proc/self/status": "Name: x\nVmSize: 2000 kB\n",
        "/proc/self/cgroup": "0::/jobs/mine\n",
        "/sys/fs/cgroup/jobs/mine/memory.max": "max\n",
        "/sys/fs/cgroup/jobs/memory.max": "max\n",
    }

    def read(path, *_, **__):
        if str(path) not in files:
            raise FileNotFoundError
        return files[str(path)]

    monkeypatch.setattr(machine.Path, "read_text", read)
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    limit = resource.RLIM_INFINITY
    assert machine.free_host_memory_bytes() == 8000 * 1024
    limit = 3000 * 1024
    assert machine.free_host_memory_bytes() == 1000 * 1024
    files["/sys/fs/cgroup/jobs/memory.max"] = "5000"
    files["/sys/fs/cgroup/jobs/memory.current"] = "4800"
    files["/sys/fs/cgroup/jobs/memory.stat"] = "anon 1\ninactive_file 100\n"
    assert machine.free_host_memory_bytes() == 300
    files.clear()
    limit = resource.RLIM_INFINITY
    assert machine.free_host_memory_bytes() is None
    machine.check_memory(10**15, "it needs", "do less")  # unknown: never refused


def test_what_cannot_fit_is_refused_before_it_is_allocated(monkeypatch):
    with pytest.warns(UserWarning, match="is 20000000, and the model was made for 512 tokens"):
        lm = s3d_jax.load(max_length=20_000_000)
    monkeypatch.setattr(machine, "free_memory_bytes", lambda: 10**10)
    many = dict(max_new_tokens=19_000_000)
    with pytest.raises(
        DeviceError, match=r"1 row of .* tokens needs \d+\.\d\d GB .* 10\.00 GB are"
    ) as e:
        lm.generate("Once", **many)
    assert "--max-new-tokens" in str(e.value) and "--max-length" in str(e.value)
    with pytest.raises(DeviceError, match="2 rows of"):
        next(iter(s3d_jax.engine.batch.Batch(lm.engine, lm.token_ids(["a", "b"]), **many).run()))
    conversation = lm.conversation(**many)
    with pytest.raises(DeviceError, match="1 row of"):
        conversation.send("Hi")
    assert conversation.messages == []
    monkeypatch.setattr(machine, "free_memory_bytes", lambda: 0)
    lm.generate("Once", max_new_tokens=1)  # a few MB are always tried
    monkeypatch.setattr(machine, "_ALWAYS_TRIED", 2**20)
    with pytest.raises(DeviceError, match=r"the weights of .* in int8-plain need"):
        s3d_jax.load()


def test_penalties_and_biases_are_counted(monkeypatch):
    """For each row and word: a flag and a count of 4 bytes; a float32 here and on the device."""
    asked, engine = [], tiny_lm().engine
    for place in ("runner", "options"):
        monkeypatch.setattr(f"s3d_jax.engine.{place}.check_memory", lambda *a: asked.append(a[0]))
    for options in ({}, {"repetition_penalty": 1.2}, {"logit_bias": {3: 1.0}}):
        Batch(engine, [np.arange(4, dtype=np.int32)] * 3, max_new_tokens=4, **options)
    usual, penalized, bias, biased = asked
    assert (penalized - usual, bias, biased) == (3 * 31 * 5, 3 * 31 * 8, usual)


@pytest.mark.skipif(sys.platform != "linux", reason="ulimit -v")
def test_a_limit_of_the_shell_is_respected():
    sizes = "--max-length 20000000 --max-new-tokens 19000000"
    command = f"ulimit -v 12000000; exec {sys.executable} -m s3d_jax generate Once {sizes}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "GB of memory" in done.stderr and "lower max_new_tokens" in done.stderr
