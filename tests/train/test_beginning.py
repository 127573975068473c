"""Runs of training that start from another draft: what they begin with, and what comes out."""

import functools

import jax
import numpy as np
import pytest

from s3d_jax.drafters.stored import read_draft, save_draft
from s3d_jax.errors import ConfigError
from s3d_jax.settings.drafting import DraftConfig
from s3d_jax.settings.training import AdapterConfig, TrainDraftConfig
from s3d_jax.storage import native
from s3d_jax.train.beginning import beginning, vocabulary_of
from tests.tiny import tiny_config, tiny_params
from tests.train.command import run, train
from tests.train.test_objective import noisy_draft

CONFIG = tiny_config()
WIDE = DraftConfig((False, True, True, False), 3)
DEEPER = WIDE.replace(skip=(False, False, True, False), gamma=2)


@pytest.fixture
def wide(tmp_path):
    params = tiny_params(CONFIG)
    draft = noisy_draft(CONFIG, params, WIDE, chain_rank=2, recall=1)
    draft = draft.replace(vocabulary=np.arange(0, 31, 3, dtype=np.int32))
    native.save(tmp_path / "model", CONFIG, params)
    save_draft(tmp_path / "model", "wide", WIDE, draft, {})
    return tmp_path / "model", draft


def test_all_but_the_bridges_carries_over(wide):
    folder, stored = wide
    config = TrainDraftConfig(start="wide", draft=DEEPER, fit_rows=8)
    draft, adapter, start = beginning(folder, CONFIG, config)
    assert draft == DEEPER
    assert adapter == AdapterConfig(rank=3, bridge_rank=5, chain_rank=2, recall=1)  # as it had
    assert set(start.deltas) == {"layers_0", "layers_3"} and start.bridges == {}
    for name in ("mask_embeddings", "deltas", "chain"):
        jax.tree.map(np.testing.assert_array_equal, getattr(start, name), getattr(stored, name))
    found = vocabulary_of(config, start, None, CONFIG.vocab_size)
    np.testing.assert_array_equal(found, stored.vocabulary)


def test_new_bridges_have_any_rank(wide):
    config = TrainDraftConfig(start="wide", draft=DEEPER, adapter=AdapterConfig(0, 2, 0, 0))
    assert beginning(wide[0], CONFIG, config)[1] == AdapterConfig(3, 2, 2, 1)


@pytest.mark.parametrize(
    ("draft", "changes", "message"),
    [
        (WIDE, dict(fit_rows=8), "leave out fit_rows"),
        (WIDE, dict(adapter=AdapterConfig(0, 2, 0, 0)), "has bridge rank 5, which can grow"),
        (DEEPER, dict(adapter=AdapterConfig(2, 0, 0, 0)), "has rank 3, which can grow"),
        (
            WIDE.replace(skip=(False,) * 4),
            dict(fit_rows=8),
            "without skipped layers there are none",
        ),
        (DEEPER.replace(block_attention="bidirectional"), {}, "only γ and the skip may differ"),
    ],
)
def test_what_does_not_fit_is_refused(wide, draft, changes, message):
    with pytest.raises(ConfigError, match=message):
        beginning(wide[0], CONFIG, TrainDraftConfig(start="wide", draft=draft, **changes))


START = """--steps 20 --learning-rate 1e-3 --batch-size 8 --row-length 32 --valid-prompts 8
    --valid-tokens 24 --start first"""


@pytest.fixture
def start(model):
    """A trained draft, and the command that trains another one from there."""
    if not (model / "run-first").exists():
        assert train(model, "first", "--steps", "40", "--rank", "3", "--bridge-rank", "5") == 0
    reached = read_draft(model / "model", "first", tiny_config(), weights=False)

    def command(name, *arguments):
        files = ("--model", model / "model", "--data", model / "own.jsonl")
        names = ("--run", model / f"run-{name}", "--name", name)
        return run("train", *files, *START.split(), *names, *arguments)

    return reached, command


@pytest.mark.exhaustive
def test_a_draft_starts_from_another(start, model, capsys):
    reached, command = start
    assert command("second") == 0
    second = read_draft(model / "model", "second", tiny_config(), weights=False)
    assert second.config == reached.config and second.num_params == reached.num_params
    assert second.training["adapter"] == {"rank": 3, "bridge_rank": 5, "chain_rank": 0, "recall": 0}
    assert second.training["before"] == reached.training["reached"]  # its starting point
    for arguments, message in (
        (("--rank", "2"), "has rank 3, which can grow but not shrink: got 2 (--rank)"),
        (("--block-attention", "bidirectional"), "--start takes what that draft has"),
        (("--fit-rows", "9"), "leave out fit_rows (--fit-rows), or choose another skip (--skip)"),
        (("--start", "nobody"), "has no draft 'nobody'"),
    ):
        assert command("refused", *arguments) == 2
        assert message in capsys.readouterr().err


@pytest.mark.exhaustive
def test_what_starts_from_another_may_grow_its_ranks_and_shorten_its_block(start, model):
    reached, command = start
    assert command("third", "--rank", "7", "--recall", "2") == 0
    third = read_draft(model / "model", "third", tiny_config())
    assert third.training["adapter"] == {"rank": 7, "bridge_rank": 5, "chain_rank": 0, "recall": 2}
    assert third.training["before"] == reached.training["reached"]  # added ranks start at 0
    added = third.params.deltas["layers_0"]["mlp"]["down"]["up"][3:]
    assert added.shape == (4, 24)
    assert np.all(np.any(np.asarray(added) != 0, axis=1))  # and they learn
    assert command("two", "--gamma", "2") == 0
    two = read_draft(model / "model", "two", tiny_config())
    assert two.config == reached.config.replace(gamma=2)
    assert two.params.mask_embeddings.shape == (1, 24)
    assert two.training["before"]["tokens_per_iteration"] > 2  # of 3: it starts from a trained one


@pytest.mark.exhaustive
def test_a_draft_of_other_layers_starts_from_what_both_have(start, model):
    _, command = start
    first = read_draft(model / "model", "first", tiny_config()).params
    one = ("--skip", "2", "--steps", "1", "--learning-rate", "1e-9")
    assert command("deeper", *one, "--fit-rows", "40", "--bridge-rank", "24") == 0
    deeper = read_draft(model / "model", "deeper", tiny_config())
    assert deeper.config.skip == (False, False, True, False)
    same = functools.partial(np.testing.assert_allclose, atol=1e-6)
    same(deeper.params.mask_embeddings, first.mask_embeddings)
    for layer in ("layers_0", "layers_3"):
        jax.tree.map(same, deeper.params.deltas[layer], first.deltas[layer])
    same(deeper.params.deltas["layers_1"]["mlp"]["down"]["up"], 0)
    assert deeper.training["adapter"]["bridge_rank"] == 24
    assert np.abs(deeper.params.bridges["layers_3"]["up"]).max() > 0.01  # fitted to its own gap
    assert command("whole", *one, "--skip", "") == 0
    whole = read_draft(model / "model", "whole", tiny_config()).params
    assert set(whole.deltas) == {f"layers_{i}" for i in range(4)} and whole.bridges == {}
