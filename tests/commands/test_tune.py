"""The command `s3d tune`, small; and what it refuses before it measures."""

import json
import os
import shutil
from pathlib import Path

import pytest

import s3d_jax
from s3d_jax import lm as generate
from s3d_jax.commands.main import main
from s3d_jax.commands.tune import parse_gammas
from s3d_jax.drafters.stored import save_draft
from s3d_jax.errors import CheckpointError, InputError
from s3d_jax.keys import make_key
from s3d_jax.lm import with_draft
from s3d_jax.nn.features import FeatureDraft, new_weights
from s3d_jax.settings.drafting import DraftConfig, FeatureConfig
from s3d_jax.storage import native as checkpoint
from s3d_jax.tune import contest
from tests.bench.test_measure import full_disk
from tests.tiny import tiny_config, tiny_params
from tests.train.test_objective import noisy_draft


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


@pytest.fixture
def several(tmp_path):
    """A model with two drafts of two passes, a merged one and an EAGLE; and a suite."""
    config = tiny_config(num_layers=4)
    params = tiny_params(config)
    model = checkpoint.save(tmp_path / "model", config, params)
    for name, skip, mode in (
        ("deep", (False, True, False, False), "two-pass"),
        ("flat", (False, True, True, True), "two-pass"),
        ("joined", (False,) * 4, "merged"),
    ):
        draft = DraftConfig(skip, 2, mode=mode)
        save_draft(model, name, draft, noisy_draft(config, params, draft), {})
    weights = new_weights("eagle", config, params, 2, make_key(0))
    save_draft(model, "an-eagle", FeatureConfig(2), FeatureDraft(weights), {}, kind="eagle")
    suite = tmp_path / "ids.jsonl"
    rows = [{"prompt_tokens": [*range(1, n)]} for n in (3, 5)]
    suite.write_text("\n".join(map(json.dumps, rows)))
    return str(model), str(suite)


def test_drafts_are_compared_and_the_fastest_is_kept(several, monkeypatch, capsys):
    model, suite = several
    times = {"deep": 3.0, "flat": 2.0, "joined": 1.0, "eagle": 0.5}
    real = contest.decoded

    def by_draft(contestants, *others):
        plain, *rows = real(contestants, *others)
        for ours, row in zip(contestants[1:], rows, strict=True):
            assert row["identical_to_ar"] == 1.0
            row["seconds"] = times["eagle" if ours.method == "eagle" else ours.lm.draft_name]
        return [plain | {"seconds": 4.0}, *rows]

    monkeypatch.setattr(contest, "decoded", by_draft)
    command = ["tune", "--model", model, "--suite", suite, "--max-new-tokens", "6"]
    command += ["--gammas", "1,2", "--check", "0"]
    with pytest.raises(CheckpointError, match="none is called 'default'"):
        s3d_jax.load(model)
    assert main([*command, "--drafts", "all"]) == 0
    shown = capsys.readouterr().out
    table = [line.split("|") for line in shown.splitlines() if " over AR" in line or "±" in line]
    ranking = [(cells[1].strip(), cells[5].strip()[:4]) for cells in table[1:]]
    assert ranking == [("an-eagle", "8.00"), ("joined", "4.00"), ("flat", "2.00"), ("deep", "1.33")]
    assert "## deep" in shown and "## flat" in shown and "## joined" not in shown
    assert "use it with --method eagle --draft an-eagle" in shown
    assert "The fastest of the method s3d is joined." in shown
    lm = s3d_jax.load(model)
    assert lm.draft_name == "joined" and lm.tuning is None
    assert s3d_jax.load(model, draft="deep").tuning.gamma in (1, 2)
    assert main(["info", "--model", model]) == 0
    assert "preferred    draft joined; float32" in capsys.readouterr().out

    times["flat"] = 0.1
    assert main([*command, "--drafts", "deep,flat", "--json", "--no-save"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["draft"] for row in found["drafts"]] == ["flat", "deep"]
    assert found["preferred"] == "flat" and len(found["plans"]) == 2
    assert [row["settings"]["copies"] for row in found["drafts"]] == [True, True]  # as loading does
    assert s3d_jax.load(model).draft_name == "joined"  # --no-save
    # One of S3D's alone says nothing of the others.
    assert main([*command, "--drafts", "deep,an-eagle"]) == 0
    shown = capsys.readouterr().out
    assert "The fastest of the method s3d" not in shown and "Kept in" not in shown
    assert s3d_jax.load(model).draft_name == "joined"


def test_mistakes_about_drafts(several, capsys):
    model, suite = several
    for options, message in (
        (["--drafts", "deep"], "compares two drafts or more, got deep: leave it out to tune one"),
        (["--drafts", "deep,none"], "has no draft 'none': it has an-eagle, deep, flat, joined"),
        (["--drafts", "all", "--draft", "deep"], "leave it out with --drafts"),
        (["--drafts", "all", "--plot", "t.png"], "--plot shows the tuning of one draft"),
    ):
        assert main(["tune", "--model", model, "--suite", suite, *options]) == 2
        assert message in capsys.readouterr().err
    config = Path(model) / "drafts" / "an-eagle" / "config.json"
    config.write_text(config.read_text().replace('"eagle"', '"hydra"'))
    command = ["tune", "--suite", suite, "--drafts", "all", "--model"]
    assert main([*command, model]) == 2  # before anything is loaded
    assert "'an-eagle' of" in (said := capsys.readouterr().err) and "'hydra'" in said
    assert main([*command, str(Path(model) / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_another_draft_of_a_model(several):
    """One of another kind is added, and damage is found at once."""
    model, _ = several
    deep = s3d_jax.load(model, draft="deep")
    assert with_draft(deep, model, "flat").draft_name == "flat"
    eagle = with_draft(deep, model, "an-eagle")
    assert (eagle.draft_name, eagle.draft_config) == ("deep", deep.draft_config)
    assert list(eagle.feature_drafts) == ["eagle"]
    # S3D's draft, which nobody named, is then the untrained one.
    alone = s3d_jax.load(model, draft="an-eagle")
    assert alone.draft_name is None and "eagle" in alone.feature_drafts
    config = Path(model) / "drafts" / "an-eagle" / "config.json"
    config.write_text(config.read_text().replace('"gamma": 2', '"gamma": 0'))
    with pytest.raises(CheckpointError, match="gamma must be an integer >= 1"):
        with_draft(deep, model, "an-eagle")


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
