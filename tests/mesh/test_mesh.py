"""Several devices: `cases.py`, in a process of its own; and two hosts, which are two processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import s3d_jax
from s3d_jax.commands.main import main
from s3d_jax.storage import native
from tests.mesh.tiny_run import assert_close, config_of, losses, train
from tests.tiny import tiny_params

CASES = Path(__file__).with_name("cases.py")
TRAINING = CASES.with_name("training.py")


def with_devices(count: int) -> dict[str, str]:
    """The environment of a process with so many devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    return os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(CASES.parents[2])}


def run(file: Path, devices: int, *arguments: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(
        [*command, *arguments],
        env=with_devices(devices),
        cwd=CASES.parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_on_eight_devices():
    run(CASES, 8, "-m", "not exhaustive")


@pytest.mark.exhaustive
def test_all_on_eight_devices():
    run(CASES, 8, "-m", "exhaustive")


def test_training_on_four_devices():
    run(TRAINING, 4, "-m", "not exhaustive")


@pytest.mark.exhaustive
def test_all_training_on_four_devices():
    run(TRAINING, 4, "-m", "exhaustive")


@pytest.fixture
def start():
    """Starts a program twice, as two hosts: (arguments of host i) -> both processes."""
    started = []

    def begin(arguments: Callable[[int, int], list[str]]) -> list[subprocess.Popen[str]]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        hosts = [
            subprocess.Popen(
                [sys.executable, *arguments(port, i)],
                env=with_devices(2),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for i in range(2)
        ]
        started.extend(hosts)
        return hosts

    yield begin
    for host in started:
        host.kill()
        host.wait()


def outputs_of(hosts: list[subprocess.Popen[str]]) -> list[tuple[str, str]]:
    said = [host.communicate(timeout=600) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], said[0][1][-3000:] + said[1][1][-3000:]
    return said


def test_two_hosts_compute_what_one_does(tmp_path, start):
    """Ten steps, in the seventh of which both are killed; and texts."""
    config = config_of()
    native.save(tmp_path / "model", config, tiny_params(config))

    def arguments(port: int, i: int) -> list[str]:
        return [str(CASES.with_name("hosts.py")), str(port), str(i), str(tmp_path)]

    hosts, deadline = start(arguments), time.monotonic() + 300
    train(tmp_path / "model", tmp_path / "one")  # meanwhile
    metrics = tmp_path / "run/metrics.jsonl"
    # A step is noted while the next one is computed, and the seventh one's batch never comes.
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 5:
        assert time.monotonic() < deadline and all(host.poll() is None for host in hosts)
        time.sleep(0.05)
    for host in hosts:
        host.send_signal(signal.SIGKILL)
        host.wait()
    assert [state.name for state in (tmp_path / "run/states").iterdir()] == ["4"]
    outputs = [json.loads(out.splitlines()[-1]) for out, _ in outputs_of(start(arguments))]
    assert outputs[0] == outputs[1]
    *found, refusal, learnt = outputs[0]
    assert_close(losses(tmp_path / "run"), losses(tmp_path / "one"))
    trained = train(tmp_path / "model", tmp_path / "one", resume=True)["draft"].bridges
    np.testing.assert_allclose(learnt, trained["final_norm"]["up"], atol=2e-5)
    lm = s3d_jax.load(tmp_path / "model")
    plain, sampled = (
        [r.tokens for r in lm.generate([[1, 2, 3], [4, 5]], max_new_tokens=12, **options)]
        for options in ({}, dict(temperature=0.9, seed=1))
    )
    assert found == [plain, plain, sampled]
    assert "has 2 devices, and the 2 hosts have 4: each must be in the mesh" in refusal


@pytest.mark.parametrize(
    "words, message",
    [
        ("--host-id 0", "--host-count and --host-id are of --hosts: give that too"),
        ("--hosts localhost:1234", "--hosts needs --mesh, a mesh of all devices"),
        ("--mesh data=2 --hosts auto --host-id 0", "--hosts auto takes no --host-count"),
        ("--mesh data=2 --hosts localhost", 'an address and a port, "10.0.0.1:1234", got'),
        ("--mesh data=2 --hosts localhost:99999", "an address and a port"),
        ("--mesh data=2 --hosts localhost:1234 --host-count 2", "needs --host-count, how many"),
        (
            "--mesh data=2 --hosts localhost:1234 --host-count 2 --host-id 2",
            "--host-id 2: 2 hosts are 0 to 1",
        ),
    ],
)
def test_hosts_that_do_not_fit_together_are_refused_before_anything_else(words, message, capsys):
    assert main(["generate", "text", *words.split()]) == 2
    assert message in capsys.readouterr().err
