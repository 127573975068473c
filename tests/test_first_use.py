"""What people meet first on a GPU gets a sentence that says what to do; by stand-ins."""

import sys
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import s3d_jax
from s3d_jax import machine
from s3d_jax.bench import external
from s3d_jax.commands import info
from s3d_jax.commands.main import main
from s3d_jax.engine.programs import Program
from s3d_jax.errors import DeviceError
from s3d_jax.settings.training import LoopConfig, OptimizerConfig
from s3d_jax.train import loop
from tests.tiny import tiny_lm
from tests.train.test_loop import Line

GB = 10**9


def exhaust(*_, **__):
    """What an allocation that cannot be had raises: jax's own error."""
    jnp.zeros(1 << 45, jnp.int8).block_until_ready()


class OutOfMemoryError(RuntimeError):
    """As torch's."""


@pytest.fixture
def gpu_unused(monkeypatch):
    """A machine with a GPU that jax does not compute on, and the packages that are installed."""
    versions = {"jax": "0.7.2", "jaxlib": "0.7.2"}
    assert machine._installed("jax") == jax.__version__ and machine._installed("no-such") == ""
    monkeypatch.setattr(machine, "_installed", lambda package: versions.get(package, ""))
    monkeypatch.setattr(machine, "_has_nvidia_gpu", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", None)
    machine._warn_of_an_idle_gpu.cache_clear()
    yield versions
    jax.config.update("jax_platforms", before)
    machine._warn_of_an_idle_gpu.cache_clear()


def said(action) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="jax computes on a GPU here")
@pytest.mark.parametrize(
    "plugins, words",
    [
        ({}, ["plugin is not installed: pip install 'jax[cuda12]==0.7.2'"]),
        (
            {"jax-cuda12-plugin": "0.7.1"},
            ["jax-cuda12-plugin 0.7.1 does not fit jaxlib 0.7.2: pip install 'jax[cuda12]==0.7.2'"],
        ),
        ({"jax-cuda13-plugin": "0.7.1"}, ["does not fit", "'jax[cuda13]==0.7.2'"]),
        ({"jax-cuda12-plugin": "0.7.2.dev1"}, ["fits: nvidia-smi", "525 or newer"]),
        ({"jax-cuda12-plugin": "0.7.1", "jax-cuda13-plugin": "0.7.2"}, ["580", "JAX_PLATFORMS="]),
    ],
)
def test_a_cpu_next_to_a_gpu_is_warned_of_once(gpu_unused, plugins, words):
    gpu_unused.update(plugins)
    texts = said(lambda: (machine.default_device(), machine.default_device()))
    assert len(texts) == 1 and "computes on the CPU, though" in texts[0]
    assert all(word in texts[0] for word in words)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="jax computes on a GPU here")
def test_load_and_the_commands_say_so(gpu_unused):
    (text,) = said(s3d_jax.load)
    assert "jax 0." in text and "computes on the CPU" in text
    machine._warn_of_an_idle_gpu.cache_clear()
    assert said(lambda: main(["generate", "Once", "--max-new-tokens", "1"])) == [text]


def test_who_chose_the_cpu_hears_nothing(gpu_unused, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert said(machine.default_device) == []
    machine._warn_of_an_idle_gpu.cache_clear()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    jax.config.update("jax_platforms", "cpu")
    assert said(machine.default_device) == []


def test_a_gpu_that_was_asked_for_and_is_not_there(gpu_unused, monkeypatch):
    def refuse():
        raise RuntimeError("Unknown backend: 'cuda' requested")

    monkeypatch.setattr(jax, "local_devices", refuse)
    gpu_unused["jax-cuda12-plugin"] = "0.6.0"
    with pytest.raises(DeviceError, match=r"does not fit jaxlib 0\.7\.2: pip install 'jax\[cuda12"):
        s3d_jax.load()


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
@pytest.mark.parametrize("output, found", [("GPU 0: Tesla T4", True), ("No devices", False)])
def test_nvidia_smi_says_whether_there_is_a_gpu(tmp_path, monkeypatch, output, found):
    monkeypatch.setattr(machine, "Path", lambda _: tmp_path)  # no /dev/nvidia0
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not machine._has_nvidia_gpu()
    command = tmp_path / "nvidia-smi"
    command.write_text(f"#!/bin/sh\necho '{output}'\n")
    command.chmod(0o755)
    assert machine._has_nvidia_gpu() is found
    command.unlink()
    (tmp_path / "nvidia0").touch()
    assert machine._has_nvidia_gpu()


@pytest.fixture
def gpu(monkeypatch):
    stats = {"bytes_limit": 11 * GB, "bytes_in_use": 4 * GB}
    device = SimpleNamespace(
        platform="gpu",
        device_kind="Tesla T4",
        compute_capability="7.5",
        memory_stats=lambda: stats,
    )
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION",
                 "XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_ALLOCATOR"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    return device


def test_jax_can_have_more_of_a_gpu(gpu, monkeypatch):
    with pytest.raises(DeviceError, match=r"12\.00 GB .* 7\.00 GB are free: do less; or let jax"):
        machine.check_memory(12 * GB, "it needs", "do less")
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.95")
    with pytest.raises(DeviceError, match=r"do less$"):
        machine.check_memory(12 * GB, "it needs", "do less")


def test_torch_on_the_same_gpu_is_warned_of(gpu, monkeypatch):
    used = SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: True))
    idle = SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: False))

    def check() -> list[str]:
        return said(lambda: machine.warn_of_the_device("float16"))

    monkeypatch.setitem(sys.modules, "torch", idle)
    assert check() == []
    monkeypatch.setitem(sys.modules, "torch", used)
    (text,) = check()
    assert "torch uses the GPU" in text and "XLA_PYTHON_CLIENT_PREALLOCATE=false" in text
    for name, value in (("PREALLOCATE", "false"), ("MEM_FRACTION", ".5"), ("ALLOCATOR", "bfc")):
        monkeypatch.setenv(f"XLA_PYTHON_CLIENT_{name}", value)
        assert check() == [] or name == "ALLOCATOR"
        monkeypatch.delenv(f"XLA_PYTHON_CLIENT_{name}")


def test_torch_that_gets_no_memory_is_told_of_jax(monkeypatch, gpu):
    def refuse():
        raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with (
        pytest.raises(DeviceError, match=r"of --methods; jax reserves 75 % .*PREALLOCATE=false"),
        machine.out_of_memory_explained(lambda: external._NO_ROOM),
    ):
        refuse()


def test_a_batch_without_memory_says_what_fits(monkeypatch):
    lm = tiny_lm()
    monkeypatch.setattr(Program, "__call__", exhaust)
    monkeypatch.setattr("s3d_jax.engine.runner.memory_limit_bytes", lambda: 250_000)
    needs = (
        r"2 rows of \d+ tokens in float32 need, in GB: weights .*, draft .*, cache .*, scratch .*"
    )
    fits = r"jax may use 0\.00\. It has room for 2 rows of \d+ tokens: lower max_new_tokens"
    with pytest.raises(DeviceError, match=rf"^out of memory: {needs}; {fits}"):
        lm.generate([[1], [2]], max_new_tokens=100)


def test_every_way_of_running_prompts_says_so(monkeypatch):
    lm = s3d_jax.load()
    conversation = lm.conversation()
    usual = Program.__call__
    calls = 0

    def exhaust_later(self, **arrays):
        nonlocal calls
        calls += 1
        return usual(self, **arrays) if calls < 2 else exhaust()

    monkeypatch.setattr(Program, "__call__", exhaust_later)
    for run in (
        lambda: lm.generate("Once"),
        lambda: list(lm.generate_many(["Once", "One"], rows=1)),
        lambda: list(lm.stream("Once")),
        lambda: conversation.send("Hi"),
    ):
        calls = 0
        with pytest.raises(DeviceError, match=r"^out of memory: 1 row of"):
            run()
    assert conversation.messages == []


def test_the_commands_say_so_too(monkeypatch, capsys):
    monkeypatch.setattr(Program, "__call__", exhaust)
    assert main(["generate", "Once"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: out of memory: 1 row of ") and error.count("\n") == 1
    monkeypatch.setattr(info, "_draft_facts", exhaust)
    assert main(["info"]) == 2
    assert "s3d info --context N" in capsys.readouterr().err


def test_weights_that_get_no_memory(monkeypatch, capsys):
    monkeypatch.setattr(jax, "device_put", exhaust)
    with pytest.raises(DeviceError, match=r"out of memory: the weights of .* in int8-plain need"):
        s3d_jax.load()
    assert main(["generate", "Once"]) == 2
    assert "out of memory: the weights of" in capsys.readouterr().err


def test_a_step_of_training_without_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(loop, "make_step", lambda *_: exhaust)
    config = LoopConfig(OptimizerConfig(4), batch_size=4, accumulate=2)
    with pytest.raises(DeviceError, match=r"4 rows in 2 parts: .*--accumulate.*--remat"):
        loop.fit(Line(), lambda _: {}, config, tmp_path, options={})


def test_other_errors_stay_what_they_are():
    with (
        pytest.raises(RuntimeError, match=r"^RESOURCE_EXHAUSTED by somebody else"),
        machine.out_of_memory_explained(lambda: "never"),
    ):
        raise RuntimeError("RESOURCE_EXHAUSTED by somebody else")
