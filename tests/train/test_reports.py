"""What a run says of its outcome: it is of what is stored, and whether that is worth something."""

import jax
import numpy as np
import pytest

import s3d_jax
from s3d_jax.config import DraftConfig
from s3d_jax.drafts import draft_names, read_draft, save_draft
from s3d_jax.errors import InputError
from s3d_jax.train import runs
from s3d_jax.train.data import Document
from s3d_jax.train.draft import AdapterConfig, init_draft
from s3d_jax.train.validation import held_out_prompts, warn_if_useless
from tests.tiny import tiny_config, tiny_params
from tests.train.command import run


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
def test_a_draft_that_learnt_nothing_is_said_loudly(before, after, gamma, useless, recwarn):
    if useless:
        with pytest.warns(UserWarning, match="learnt next to nothing"):
            warn_if_useless(before, after, gamma)
    else:
        warn_if_useless(before, after, gamma)
        assert not recwarn


def test_prompts_that_are_too_long_are_left_out_and_counted():
    sizes = [(40, None), (200, 128), (200, 127), (1, None), (300, 299)]
    documents = [Document(np.arange(n), np.ones(n, bool), prompt) for n, prompt in sizes]
    with pytest.warns(UserWarning, match="2 of 4 held-out prompts are left out: .* model's 128"):
        prompts = held_out_prompts(documents, 9, 16, 128)
    assert [len(prompt) for prompt in prompts] == [16, 127]
    with pytest.raises(InputError, match="none of the 2 held-out documents can be decoded"):
        held_out_prompts([documents[1], documents[3]], 9, 16, 128)


def test_a_draft_that_goes_on_is_compared_with_the_untrained_one_and_is_stored_first(model):
    config, draft = tiny_config(), DraftConfig((False, True, True, False), 3)
    empty = init_draft(
        *(config, tiny_params(config), draft, AdapterConfig(4, 8)), jax.random.key(0)
    )
    save_draft(model / "model", "empty", draft, empty, {})
    options = ("--steps", "1", "--learning-rate", "1e-9", "--batch-size", "8", "--start", "empty")
    validation = ("--valid-prompts", "8", "--valid-tokens", "24", "--row-length", "32")
    with pytest.raises(UserWarning, match="learnt next to nothing"):  # tests make errors of them
        run(
            *("train", "--model", model / "model", "--data", model / "own.jsonl"),
            *("--run", model / "run-onward", "--name", "onward", *options, *validation),
        )
    assert "onward" in draft_names(model / "model")


PRETRAIN = (
    *("--vocab-size", "280", "--layers", "4", "--width", "16", "--heads", "2", "--kv-heads", "1"),
    *("--steps", "3", "--batch-size", "4", "--row-length", "32", "--anchors", "4"),
    *("--valid-prompts", "2", "--valid-tokens", "8", "--prompt-tokens", "6", "--joint-draft"),
)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    sentence = "the small cat sat on the warm mat and saw a bird in the tall tree. "
    path.write_text("<|endoftext|>".join([sentence * 2] * 30))
    return path


def test_a_joint_draft_is_compared_with_the_untrained_one_when_it_is_stored(
    texts, tmp_path, monkeypatch
):
    seen = []

    def compare(before, after, gamma):
        seen.append((before, after, gamma, draft_names(tmp_path / "model")))

    monkeypatch.setattr(runs, "warn_if_useless", compare)
    out = ("--out", tmp_path / "model", "--run", tmp_path / "run")
    assert run("pretrain", "--data", texts, *out, *PRETRAIN) == 0
    ((before, after, gamma, names),) = seen
    assert (gamma, names) == (4, ("default",)) and 1 <= before <= 5
    stored = read_draft(tmp_path / "model", "default", s3d_jax.load(tmp_path / "model").config)
    assert after == stored.training["reached"]["tokens_per_iteration"]
