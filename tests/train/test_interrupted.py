"""Ctrl-C in the commands, and resuming."""

import json
import signal

import pytest

from s3d_jax.train import runs, session
from s3d_jax.train.data import Batches
from tests.sampled import sampled
from tests.train.command import run


class Interrupted(Batches):
    """Ctrl-C before the sixth step."""

    def __call__(self, step):
        if step == 5:
            signal.raise_signal(signal.SIGINT)
        return super().__call__(step)


@pytest.mark.parametrize("command", sampled(["train", "pretrain"], ["train"]))
def test_an_interrupted_command_resumes_as_if_nothing_had_happened(
    command, model, texts, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(runs, "warn_if_useless", lambda *arguments: None)
    settings = """--steps 7 --save-every 2 --validate-every 4 --batch-size 4 --log-every 1
        --row-length 32 --anchors 2 --gamma 2 --valid-prompts 2 --valid-tokens 4 --rank 2
        --bridge-rank 2"""
    options = settings.split()
    if command == "train":
        options += ["--model", model / "model", "--data", model / "own.jsonl"]
    else:
        options += ["--data", texts, "--vocab-size", "280", "--layers", "4", "--width", "16"]
        options += ["--heads", "2", "--kv-heads", "1", "--joint-draft"]

    def call(name, *more):
        out = ("--name", f"cut-{name}") if command == "train" else ("--out", tmp_path / name)
        return run(command, *options, *out, "--run", tmp_path / f"run-{name}", *more)

    assert call("whole") == 0
    with monkeypatch.context() as patched:
        patched.setattr(session, "Batches", Interrupted)
        assert call("cut") == 130
    assert "interrupted" in capsys.readouterr().err
    states = sorted(p.name for p in (tmp_path / "run-cut" / "states").iterdir())
    assert [name for name in states if name.isdigit()] == ["2", "4"]
    assert not (tmp_path / "cut").exists()
    assert call("cut", "--resume") == 0
    curves = [
        [json.loads(x) for x in (tmp_path / f"run-{name}/metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "cut")
    ]
    assert curves[0] == curves[1] and len(curves[0]) == 7 + 3
