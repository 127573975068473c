"""Stored tunings: kept by device, dtype, kind of cache and draft, and found only by loading."""

import json
import os
import shutil

import jax
import pytest

import s3d_jax
from s3d_jax.bench.report import about
from s3d_jax.drafters.s3d import S3D
from s3d_jax.drafters.stored import save_draft
from s3d_jax.errors import CheckpointError, ConfigError
from s3d_jax.lm import LM
from s3d_jax.settings.drafting import DraftConfig, PassCosts, Tuning
from s3d_jax.storage import native as checkpoint
from s3d_jax.storage import tuning
from s3d_jax.storage.tuning import (
    check_writable,
    preferred_draft,
    read_tuning,
    save_preferred,
    save_tuning,
)
from tests.tiny import tiny_config, tiny_params
from tests.train.test_objective import noisy_draft

OWN = DraftConfig((False, True, True, False), 3)
CHOICE = Tuning(2, (False, True, False, False), PassCosts(0.5, (1, 1.1, 1.2)), 1.25)
OTHER = Tuning(1, (False, False, True, False), PassCosts(0.75, (1, 1.5)), 0.8)


@pytest.fixture
def model(tmp_path):
    config = tiny_config()
    params = tiny_params(config)
    folder = checkpoint.save(tmp_path / "model", config, params)
    save_draft(folder, "default", OWN, noisy_draft(config, params, OWN), {})
    return folder


def test_it_comes_back_and_loading_uses_it(model):
    config = tiny_config()
    before = s3d_jax.load(model)
    assert before.tuning is None
    assert S3D.default_settings(before.target) == OWN
    path = save_tuning(model, config, "default", CHOICE, {"about": about()})
    assert read_tuning(model, config, "default") == CHOICE
    assert json.loads(path.read_text())["entries"][0]["measured"]["about"]["versions"]["jax"]

    lm = s3d_jax.load(model)
    assert lm.tuning == CHOICE and lm.draft_config == OWN
    assert S3D.default_settings(lm.target) == OWN.replace(gamma=2, skip=CHOICE.skip)
    assert {} in S3D.candidates(lm.target)  # the tuned settings
    (result,) = lm.generate([3, 1, 4], max_new_tokens=8)
    assert len(result.stats.accepted_per_position) == 2
    (result,) = lm.generate([3, 1, 4], max_new_tokens=8, gamma=5, skip=OWN.skip)
    assert len(result.stats.accepted_per_position) == 5
    settings = {static["spec"].drafter.settings for _, static in lm.programs if "spec" in static}
    assert settings == {OWN.replace(gamma=2, skip=CHOICE.skip), OWN.replace(gamma=5)}


def test_each_device_dtype_cache_and_draft_has_its_own(model, monkeypatch):
    config, half = tiny_config(), tiny_config(dtype="bfloat16")
    save_tuning(model, config, "default", CHOICE, {})
    assert read_tuning(model, half, "default") is None
    assert read_tuning(model, config, None) is None
    save_tuning(model, config, None, OTHER, {})
    with monkeypatch.context() as other:
        other.setattr(tuning, "machine_name", lambda: "some GPU")
        assert read_tuning(model, config, "default") is None
        save_tuning(model, config, "default", OTHER, {})
        assert read_tuning(model, config, "default") == OTHER
    assert read_tuning(model, config, "default") == CHOICE
    assert s3d_jax.load(model, use_draft=False).tuning == OTHER
    assert s3d_jax.load(model, dtype="bfloat16").tuning is None

    again = Tuning(1, CHOICE.skip, OTHER.costs, 1.5)
    save_tuning(model, config, "default", again, {})
    assert read_tuning(model, config, "default") == again
    assert len(tuning.read_entries(model)) == 3

    rounded = config.replace(kv_cache="int8")
    assert read_tuning(model, rounded, "default") is None
    for chosen in (OTHER, CHOICE):
        save_tuning(model, rounded, "default", chosen, {})
        assert s3d_jax.load(model, kv_cache="int8").tuning == chosen
    assert read_tuning(model, config, "default") == again
    assert len(tuning.read_entries(model)) == 4


def test_a_draft_that_was_trained_anew_is_another_one(model):
    config, params = tiny_config(), tiny_params(tiny_config())
    save_tuning(model, config, "default", CHOICE, {})
    better = jax.tree.map(lambda x: 2 * x, noisy_draft(config, params, OWN))
    save_draft(model, "default", OWN, better, {}, overwrite=True)
    assert s3d_jax.load(model).tuning is None
    save_tuning(model, config, "default", OTHER, {})
    assert s3d_jax.load(model).tuning == OTHER and len(tuning.read_entries(model)) == 1


def test_loading_takes_the_preferred_draft_of_this_device(model, monkeypatch):
    config, params = tiny_config(), tiny_params(tiny_config())
    other = OWN.replace(gamma=5)
    save_draft(model, "other", other, noisy_draft(config, params, other), {})
    assert s3d_jax.load(model).draft_name == "default"
    save_tuning(model, config, "other", CHOICE, {})
    save_preferred(model, config, "other", {"drafts": []})
    lm = s3d_jax.load(model)
    assert (lm.draft_name, lm.draft_config, lm.tuning) == ("other", other, CHOICE)
    assert s3d_jax.load(model, draft="default").draft_config == OWN
    assert s3d_jax.load(model, use_draft=False).draft_name is None
    assert s3d_jax.load(model, dtype="bfloat16").draft_name == "default"
    assert s3d_jax.load(model, kv_cache="int8").draft_name == "default"
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(tuning, "machine_name", lambda: "some GPU")
        assert s3d_jax.load(model).draft_name == "default"
        save_preferred(model, config, "default", {})
    assert preferred_draft(model, config) == "other"
    assert read_tuning(model, config, "other") == CHOICE  # kept beside it

    save_draft(model, "third", OWN, noisy_draft(config, params, OWN), {})
    save_preferred(model, config, "third", {})  # in place of the earlier choice
    assert s3d_jax.load(model).draft_name == "third"
    assert len(tuning.read_preferred(model)) == 2
    again = jax.tree.map(lambda x: 2 * x, noisy_draft(config, params, OWN))
    save_draft(model, "third", OWN, again, {}, overwrite=True)
    assert s3d_jax.load(model).draft_name == "default"  # that one was another


def test_a_preference_names_one_of_drafts_without_a_default(model, monkeypatch):
    config, params = tiny_config(), tiny_params(tiny_config())
    for name in ("a", "b"):
        save_draft(model, name, OWN, noisy_draft(config, params, OWN), {})
    shutil.rmtree(model / "drafts" / "default")
    with pytest.raises(CheckpointError, match="none is called 'default'"):
        s3d_jax.load(model)
    # Nothing is loaded before that is said.
    monkeypatch.setattr(checkpoint, "load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(CheckpointError, match="none is called 'default'"):
        s3d_jax.load(model)
    monkeypatch.undo()
    save_preferred(model, config, "b", {})
    assert s3d_jax.load(model).draft_name == "b"
    with pytest.raises(CheckpointError, match="none is called 'default'"):
        s3d_jax.load(model, mesh="model=1")
    shutil.rmtree(model / "drafts" / "b")
    assert s3d_jax.load(model).draft_name == "a"
    assert tuning.read_preferred(model) == []


def test_damage_is_said(model):
    config = tiny_config()
    path = save_tuning(model, config, "default", CHOICE, {})
    good = json.loads(path.read_text())
    entry = good["entries"][0]
    skip = [False] * 3
    damaged = [
        path.read_text()[:-20],
        "[]",
        json.dumps(good | {"version": 2}),
        json.dumps(good | {"entries": [{"key": entry["key"]}]}),
        json.dumps(good | {"preferred": [{"key": "other"}]}),
        json.dumps(good | {"preferred": [{"key": {}}]}),
        json.dumps(good | {"entries": [entry | {"tuning": entry["tuning"] | {"gamma": 0}}]}),
        json.dumps(good | {"entries": [entry | {"tuning": entry["tuning"] | {"skip": skip}}]}),
        json.dumps(good | {"entries": [entry | {"tuning": entry["tuning"] | {"more": 1}}]}),
        json.dumps(good | {"entries": [entry | {"tuning": entry["tuning"] | {"costs": {}}}]}),
    ]
    for text in damaged:
        path.write_text(text)
        with pytest.raises(CheckpointError, match=r"tuning\.json (is|must) .*: delete it"):
            s3d_jax.load(model)
    path.unlink()
    assert s3d_jax.load(model).tuning is None


def test_a_folder_that_cannot_be_written(model, monkeypatch):
    check_writable(model)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(CheckpointError, match=r"cannot write into .*--no-save"):
        check_writable(model)


def test_settings_belong_to_a_number_of_threads(model, monkeypatch):
    config = tiny_config()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(2), raising=False)
    monkeypatch.delenv("NPROC", raising=False)
    save_tuning(model, config, "default", CHOICE, {})
    for limit in ("1", "2"):
        monkeypatch.setenv("NPROC", limit)
        kept = jax.default_backend() != "cpu" or limit == "2"
        assert (read_tuning(model, config, "default") == CHOICE) == kept


@pytest.mark.parametrize(
    ("draft", "verify"), [(0.0, (1, 2)), (0.5, (2, 1)), (0.5, (1,)), (0.5, (1, -1)), (0.5, 1)]
)
def test_costs_that_cannot_be(draft, verify):
    with pytest.raises(ConfigError):
        PassCosts(draft, verify)


def test_settings_that_do_not_fit():
    with pytest.raises(ConfigError, match="costs for each"):
        Tuning(3, CHOICE.skip, CHOICE.costs, 1.0)
    config = tiny_config(num_layers=3)
    with pytest.raises(ConfigError, match="skip has 4 entries"):
        LM(config, tiny_params(config), tuning=CHOICE)
