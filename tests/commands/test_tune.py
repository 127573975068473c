"""The command `s3d tune`, small; and what it refuses before it measures."""

import json
import os
import shutil

import pytest

import s3d_jax
from s3d_jax import lm as generate
from s3d_jax.commands.main import main
from s3d_jax.commands.tune import parse_gammas
from s3d_jax.errors import InputError
from s3d_jax.storage import native as checkpoint
from tests.bench.test_measure import full_disk
from tests.tiny import tiny_config, tiny_params


@pytest.fixture
def tiny(tmp_path):
    config = tiny_config(num_layers=2)
    suite = tmp_path / "ids.jsonl"
    rows = [{"prompt_tokens": [*range(1, n)]} for n in (3, 5, 8, 13)]
    suite.write_text("\n".join(map(json.dumps, rows)))
    return str(checkpoint.save(tmp_path / "model", config, tiny_params(config))), str(suite)


def test_settings_are_chosen_shown_and_kept(tiny, capsys):
    model, suite = tiny
    command = ["tune", "--model", model, "--suite", suite, "--max-new-tokens", "8"]
    command += ["--gammas", "2,1", "--search", "greedy", "--check", "0"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "| draft pass, 1 layers |" in shown and "Chosen: γ=" in shown
    assert "take --method ar" in shown and "Kept in " in shown
    lm = s3d_jax.load(model)
    assert lm.tuning is not None and lm.tuning.gamma in (1, 2) and sum(lm.tuning.skip) == 1
    assert lm.tuning.improvement_factor < 1
    assert main(["info", "--model", model]) == 0
    shown = capsys.readouterr().out
    assert f"γ={lm.tuning.gamma}" in shown and "tuned" in shown
    assert main(["info", "--model", model, "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["tuning"]
    assert entry["tuning"]["gamma"] == lm.tuning.gamma and entry["key"]["draft"] is None


def test_what_was_measured_is_kept_before_it_is_drawn(tiny, tmp_path, monkeypatch, capsys):
    model, suite = tiny
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full_disk)
    command = ["tune", "--model", model, "--suite", suite, "--limit", "1", "--check", "1"]
    command += ["--max-new-tokens", "8", "--gammas", "1", "--plot", str(tmp_path / "t.png")]
    assert main(command) == 2
    shown, errors = capsys.readouterr()
    assert "Predictions and measurements, on the same prompt, since" in shown
    assert "Kept in " in shown and s3d_jax.load(model).tuning is not None
    assert "cannot write" in errors and "give --plot another place" in errors


@pytest.mark.exhaustive
def test_the_embedded_model(tmp_path, monkeypatch, capsys):
    copy = tmp_path / "model"
    shutil.copytree(generate.EMBEDDED, copy)
    monkeypatch.setattr(generate, "EMBEDDED", copy)
    command = ["tune", "--limit", "2", "--max-new-tokens", "16", "--gammas", "2", "--check", "0"]
    command += ["--suite", "stories", "--suite", "dialogues"]  # the copy would get chat questions
    plot = tmp_path / "tuning.png"
    assert main([*command, "--no-save", "--json", "--plot", str(plot)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert plot.stat().st_size > 10_000 and not (copy / "tuning.json").exists()
    assert found["draft"] == "default" and found["precision"] == "int8-plain"
    assert len(found["candidates"]) == 10 and found["calibration_prompts"] == 2
    own = next(
        c for c in found["candidates"] if c["skip"] == list(s3d_jax.load().draft_config.skip)
    )
    assert own["tokens_per_iteration"]["2"] > 1.8
    assert found["tuning"]["gamma"] == 2 and len(found["tuning"]["costs"]["verify"]) == 3
    assert found["about"]["versions"]["jax"] and found["about"]["machine"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gammas", "0,2"], "--gammas takes numbers from 1 to 64"),
        (["--gammas", "two"], "--gammas takes numbers"),
        (["--limit", "0"], "limit must be at least 1"),
        (["--max-new-tokens", "9999"], "--max-new-tokens leaves none for a prompt"),
        (["--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
        (["--check", "-1"], "check must be at least 0"),
        (["--plot", "nowhere/t.png"], "--plot takes the name of a .png"),
        (["--suite", "poems"], "'poems' is no suite"),
    ],
)
def test_mistakes_are_said_before_anything_runs(options, message, capsys):
    assert main(["tune", "--no-save", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_read_only_folder_is_said_before_anything_runs(tiny, monkeypatch, capsys):
    model, suite = tiny
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert main(["tune", "--model", model, "--suite", suite]) == 2
    assert "cannot write into" in capsys.readouterr().err


def test_lists_of_gammas():
    assert parse_gammas("4,2") == [4, 2]
    for wrong in ("", "1,,2", "65", "1.5"):
        with pytest.raises(InputError):
            parse_gammas(wrong)
