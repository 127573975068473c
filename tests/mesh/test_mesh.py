"""Several devices: `cases.py`, in a process of its own; and two hosts, which are two processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import s3d_jax
from s3d_jax.storage import native
from tests.tiny import tiny_config, tiny_params

CASES = Path(__file__).with_name("cases.py")


def with_devices(count: int) -> dict[str, str]:
    """The environment of a process with so many devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    return os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(CASES.parents[2])}


def run(*arguments: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    done = subprocess.run(
        [*command, *arguments],
        env=with_devices(8),
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


def test_two_hosts_give_the_tokens_of_one(tmp_path):
    config = tiny_config(num_heads=8, num_kv_heads=2, vocab_size=32, num_layers=2)
    native.save(tmp_path / "model", config, tiny_params(config))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    script = str(CASES.with_name("hosts.py"))
    hosts = [
        subprocess.Popen(
            [sys.executable, script, str(port), str(i), str(tmp_path / "model")],
            env=with_devices(2),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        said = [host.communicate(timeout=600) for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == [0, 0], said[0][1][-3000:] + said[1][1][-3000:]
    outputs = [json.loads(out.splitlines()[-1]) for out, _ in said]
    assert outputs[0] == outputs[1]
    *found, refusal = outputs[0]
    lm = s3d_jax.load(tmp_path / "model")
    plain, sampled = (
        [r.tokens for r in lm.generate([[1, 2, 3], [4, 5]], max_new_tokens=12, **options)]
        for options in ({}, dict(temperature=0.9, seed=1))
    )
    assert found == [plain, plain, sampled]
    assert "has 2 devices, and the 2 hosts have 4: each must be in the mesh" in refusal
