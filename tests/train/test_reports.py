"""The report of a run describes what is stored, and warns where that is worth little."""

import json
from typing import Any

import jax
import numpy as np
import pytest

import s3d_jax
from s3d_jax.drafters.stored import draft_names, read_draft, save_draft
from s3d_jax.errors import InputError
from s3d_jax.settings.drafting import DraftConfig, FeatureConfig
from s3d_jax.settings.training import AdapterConfig
from s3d_jax.storage import native as checkpoint
from s3d_jax.texts.documents import Document, read_documents
from s3d_jax.train import runs, validation
from s3d_jax.train.draft import init_draft
from s3d_jax.train.folder import read_metrics
from s3d_jax.train.validation import held_out_prompts, measure_acceptance, warn_if_useless
from tests.tiny import tiny_config, tiny_params
from tests.train.command import run, train


@pytest.mark.parametrize(
    "before, after, gamma, useless",
    [
        (1.3, 1.34, 4, True),
        (1.3, 1.4, 4, False),
        (1.5, 1.75, 1, False),  # τ is at most 2 here
        (1.95, 1.95, 1, False),
        (1.0, 1.0, 4, True),
        (1.0, 1.3, 4, False),
        (2.5, 2.6, 4, True),
    ],
)
def test_a_draft_that_learnt_nothing_gives_a_warning(before, after, gamma, useless, recwarn):
    if useless:
        with pytest.warns(UserWarning, match="learnt next to nothing"):
            warn_if_useless(before, after, FeatureConfig(gamma))
    else:
        warn_if_useless(before, after, FeatureConfig(gamma))
        assert not recwarn


def test_prompts_that_are_too_long_are_left_out_and_counted():
    sizes = [(40, None), (200, 128), (200, 127), (1, None), (300, 299)]
    documents = [Document(np.arange(n), np.ones(n, bool), prompt) for n, prompt in sizes]
    with pytest.warns(UserWarning, match="2 of 4 held-out prompts are left out: .* model's 128"):
        prompts = held_out_prompts(documents, 9, 16, 128)
    assert [len(prompt) for prompt in prompts] == [16, 127]
    with pytest.raises(InputError, match="none of the 2 held-out documents can be decoded"):
        held_out_prompts([documents[1], documents[3]], 9, 16, 128)


def test_a_continued_draft_is_compared_with_the_untrained_one_and_is_stored_first(model):
    config, draft = tiny_config(), DraftConfig((False, True, True, False), 3)
    empty = init_draft(config, tiny_params(config), draft, AdapterConfig(4, 8), jax.random.key(0))
    save_draft(model / "model", "empty", draft, empty, {})
    options = ("--steps", "1", "--learning-rate", "1e-9", "--batch-size", "8", "--start", "empty")
    decoding = ("--valid-prompts", "8", "--valid-tokens", "24", "--row-length", "32")
    with pytest.raises(UserWarning, match="learnt next to nothing"):  # tests make errors of them
        files = ("--model", model / "model", "--data", model / "own.jsonl")
        names = ("--run", model / "run-onward", "--name", "onward")
        run("train", *files, *names, *options, *decoding)
    assert "onward" in draft_names(model / "model")


def report_of(tau: float) -> dict[str, Any]:
    return {"tokens_per_iteration": tau, "acceptance_per_position": [0.5] * 3}


ONE_STEP = """--steps 1 --batch-size 8 --row-length 32 --valid-prompts 8 --valid-tokens 24
    --anchors 4"""


def test_a_draft_that_training_has_made_worse_is_not_stored(model, capsys, monkeypatch):
    taus = iter([1.33, 1.0])  # before and after
    monkeypatch.setattr(runs.HeldOutDecoding, "measure", lambda *_: report_of(next(taus)))
    files = ("--model", model / "model", "--data", model / "own.jsonl")
    names = ("--run", model / "run-broken", "--name", "broken")
    assert run("train", *files, *names, *ONE_STEP.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and "makes 1.00 tokens per iteration, the untrained one 1.33: it is not" in err
    assert f"The run is kept in {model / 'run-broken'}" in err
    assert "196 rows of 32 tokens (5,684 learnt) to train on; held out: 4 rows" in err
    assert "broken" not in draft_names(model / "model")
    assert read_metrics(model / "run-broken" / "metrics.jsonl")[-1]["step"] == 1


@pytest.mark.parametrize(
    "start, taus, gamma",
    [
        (("--start", "good"), (2.0, 1.9, 1.5, 2.0), 3),  # start, outcome, untrained, replaced
        (("--gamma", "2"), (1.5, 1.9, 2.0), 2),  # untrained, outcome, replaced
        (("--gamma", "5"), (1.5, 1.9, 2.0), 3),
    ],
)
def test_a_worse_draft_does_not_replace_a_better_one(
    start, taus, gamma, model, capsys, monkeypatch
):
    """The old one drafts no more tokens than the new one."""
    config, draft = tiny_config(), DraftConfig((False, True, True, False), 3)
    empty = init_draft(config, tiny_params(config), draft, AdapterConfig(4, 8), jax.random.key(0))
    notes = {"name": "the good one"}
    save_draft(model / "model", "good", draft, empty, notes, overwrite=True)
    measured, gammas = iter(taus), []

    def measure(self, *_):
        gammas.append(self._draft_config.gamma)
        return report_of(next(measured))

    monkeypatch.setattr(runs.HeldOutDecoding, "measure", measure)
    files = ("--model", model / "model", "--data", model / "own.jsonl", "--overwrite")
    names = ("--run", model / f"run-good{start[-1]}", "--name", "good", *start)
    assert run("train", *files, *names, *ONE_STEP.split()) == 2
    assert (
        "1.90 tokens per iteration, the one that it would replace 2.00" in capsys.readouterr().err
    )
    assert gammas[-1] == gamma
    stored = read_draft(model / "model", "good", config, weights=False)
    assert stored.training == {"name": "the good one"}


NOTHING = {
    "prompts-alone": [{"prompt_tokens": list(range(20)), "tokens": []}] * 8,
    "cut-off": [{"prompt_tokens": [3] * 32, "tokens": [4]}] * 8,
    "too-short": [{"tokens": [3]}] * 8,
}


@pytest.mark.parametrize("name", NOTHING)
def test_training_on_nothing_is_refused(name, model, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, NOTHING[name])))
    files = ("--model", model / "model", "--run", tmp_path / "run", "--row-length", "32")
    valid = ("--valid", model / "own.jsonl")
    assert run("train", *files, "--data", data, *valid, "--steps", "3", "--name", name) == 2
    err = capsys.readouterr().err
    assert "the data: none of the" in err and "has a token to learn. The 8 documents" in err
    more = ("--mode", "full", "--out", tmp_path / "out", "--data", model / "own.jsonl")
    if name == "prompts-alone":
        assert run("train", *files, *more, "--valid", data, "--steps", "3") == 2
        assert "the held-out data: none of the" in capsys.readouterr().err
    assert not (tmp_path / "run").exists() and not (tmp_path / "out").exists()


PRETRAIN = """--vocab-size 280 --layers 4 --width 16 --heads 2 --kv-heads 1 --steps 3
    --batch-size 4 --row-length 32 --anchors 4 --valid-prompts 2 --valid-tokens 8 --prompt-tokens 6
    --joint-draft"""


@pytest.mark.exhaustive
def test_a_joint_draft_is_compared_with_the_untrained_one_when_it_is_stored(
    texts, tmp_path, monkeypatch
):
    seen = []

    def compare(before, after, draft):
        seen.append((before, after, draft.gamma, draft_names(tmp_path / "model")))

    monkeypatch.setattr(runs, "warn_if_useless", compare)
    out = ("--out", tmp_path / "model", "--run", tmp_path / "run")
    assert run("pretrain", "--data", texts, *out, *PRETRAIN.split()) == 0
    ((before, after, gamma, names),) = seen
    assert (gamma, names) == (4, ("default",)) and 1 <= before <= 5
    stored = read_draft(tmp_path / "model", "default", s3d_jax.load(tmp_path / "model").config)
    assert after == stored.training["reached"]["tokens_per_iteration"]


def test_a_model_without_its_draft_is_stored_where_the_draft_is_worse(texts, tmp_path, monkeypatch):
    taus = iter([1.0, 1.2, 1.3])  # at the beginning, at the end, untrained
    monkeypatch.setattr(runs.HeldOutDecoding, "measure", lambda *_: report_of(next(taus)))
    out = ("--out", tmp_path / "model", "--run", tmp_path / "run")
    with pytest.raises(UserWarning, match=r"untrained one 1\.30: it is not stored.*model itself"):
        run("pretrain", "--data", texts, *out, *PRETRAIN.split())
    assert draft_names(tmp_path / "model") == ()
    assert s3d_jax.load(tmp_path / "model").config.num_layers == 4


@pytest.fixture(scope="module")
def bfloat16_model(model, tmp_path_factory):
    """The tiny model in bfloat16."""
    folder = tmp_path_factory.mktemp("bfloat16")
    params = jax.tree.map(lambda x: x.astype("bfloat16"), tiny_params(tiny_config()))
    checkpoint.save(folder / "model", tiny_config(dtype="bfloat16"), params)
    (folder / "own.jsonl").write_bytes((model / "own.jsonl").read_bytes())
    return folder


def measured_again(folder, run_folder, dtype):
    """τ of a stored draft on the prompts of its run, and what the run reported."""
    lm = s3d_jax.load(folder, dtype=dtype)
    # As runs decode, with separate deltas: loading merges them, which rounds 16 bits once
    # more, and by how much depends on the CPU.
    lm.draft_params = read_draft(folder, "default", lm.config).params
    lines = read_metrics(run_folder / "metrics.jsonl")
    reported = [line["validation"] for line in lines if "validation" in line][-1]
    settings = json.loads((run_folder / "options.json").read_text())
    documents = read_documents([run_folder.parent / "own.jsonl"], None, None)
    order = np.random.default_rng(settings["loop"]["seed"]).permutation(len(documents))
    held_out = [documents[i] for i in sorted(order[: max(1, round(0.02 * len(documents)))])]
    prompts = held_out_prompts(held_out, 8, 16, lm.max_length)
    found = measure_acceptance(lm, prompts, 24)
    return found, {name: reported[name] for name in found}


@pytest.mark.exhaustive
def test_a_bfloat16_target_trains_and_the_report_is_of_the_stored_draft(bfloat16_model):
    """Here the target computes in bfloat16; the trained weights and the optimizer are float32."""
    assert train(bfloat16_model, "default") == 0
    run_folder = bfloat16_model / "run-default"
    found, reported = measured_again(bfloat16_model / "model", run_folder, None)
    assert found == reported
    before = read_metrics(run_folder / "metrics.jsonl")[0]["validation"]
    assert found["tokens_per_iteration"] > before["tokens_per_iteration"] + 0.4
    lm = s3d_jax.load(bfloat16_model / "model")
    assert {x.dtype.name for x in jax.tree.leaves(lm.draft_params)} == {"bfloat16"}


def decoded_drafts(monkeypatch):
    """The drafts that a run decodes with, in a list that grows."""
    seen = []

    def measure(lm, *arguments):
        seen.append(lm.draft_params)
        return measure_acceptance(lm, *arguments)

    monkeypatch.setattr(validation, "measure_acceptance", measure)
    return seen


def test_a_draft_is_measured_as_it_is_stored(bfloat16_model, monkeypatch):
    """Not as it was trained, in float32."""
    seen = decoded_drafts(monkeypatch)
    monkeypatch.setattr(runs, "warn_if_useless", lambda *arguments: None)
    assert train(bfloat16_model, "wide", "--dtype", "float32", "--steps", "3") == 0
    config = checkpoint.read_header(bfloat16_model / "model").config.replace(dtype="float32")
    stored = read_draft(bfloat16_model / "model", "wide", config).params
    assert len(seen) == 2
    jax.tree.map(np.testing.assert_array_equal, seen[-1], stored)


def test_full_mode_writes_the_type_of_the_checkpoint(bfloat16_model):
    out = bfloat16_model / "full"
    full = ("--mode", "full", "--out", out, "--dtype", "float32", "--steps", "20")
    assert train(bfloat16_model, "default", *full, "--run", bfloat16_model / "run-full") == 0
    assert checkpoint.read_header(out).config.dtype == "bfloat16"
    after, before = checkpoint.load(out).params, checkpoint.load(bfloat16_model / "model").params
    for name in ("embed", "layers_1", "layers_2", "final_norm"):
        jax.tree.map(np.testing.assert_array_equal, after[name], before[name])
    found, reported = measured_again(out, bfloat16_model / "run-full", "float32")
    assert found == reported


def test_pretraining_decodes_the_prompts_once_for_its_last_validation(texts, tmp_path, monkeypatch):
    """And with the stored weights, in bfloat16; the untrained draft is measured once more."""
    seen = decoded_drafts(monkeypatch)
    monkeypatch.setattr(runs, "warn_if_useless", lambda *arguments: None)
    out = ("--out", tmp_path / "model", "--run", tmp_path / "run", "--compute-dtype", "bfloat16")
    assert run("pretrain", "--data", texts, *out, *PRETRAIN.split()) == 0
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    taus = [line["validation"]["tokens_per_iteration"] for line in lines if "validation" in line]
    assert len(taus) == 2
    # At the beginning, at the end, and the untrained one.
    assert [bool(draft.deltas) for draft in seen] == [True, True, False]
    lm = s3d_jax.load(tmp_path / "model", dtype="float32")
    draft = read_draft(tmp_path / "model", "default", lm.config)
    jax.tree.map(np.testing.assert_array_equal, seen[1], draft.params)
    stored = draft.training
    assert stored["reached"]["tokens_per_iteration"] == taus[-1]
    assert stored["compute_dtype"] == "bfloat16" and stored["remat"] is False
