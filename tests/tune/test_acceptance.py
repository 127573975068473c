"""Acceptance from known texts, against the counts of decoding itself."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from s3d_jax.errors import InputError
from s3d_jax.lm import LM
from s3d_jax.nn.draft import with_head
from s3d_jax.settings.drafting import DraftConfig, symmetric_skip
from s3d_jax.texts.suites import Prompt, read_suites
from s3d_jax.tune import acceptance
from s3d_jax.tune.acceptance import Acceptance, Judge, Texts, fit_acceptance, replay, write_texts
from tests.tiny import embedded_in_float, tiny_config, tiny_params
from tests.train.test_objective import noisy_draft

PROMPTS = [Prompt("a", np.array(p, np.int32)) for p in ([3], [5, 9, 2], [*range(1, 12)], [7] * 20)]
NEW = 24


def model(block_attention: str = "causal", trained: bool = False) -> LM:
    """Layers that do little, so that drafts are often right; and texts that may end."""
    config = tiny_config(num_layers=3, vocab_size=13)
    params = tiny_params(config, 3)
    for i in range(config.num_layers):
        layer = params[f"layers_{i}"]
        layer["attention"]["out"]["weight"] *= 0.1
        layer["mlp"]["down"]["weight"] *= 0.1
    draft = DraftConfig(symmetric_skip(3, 1), 4, block_attention)
    arrays = noisy_draft(config, params, draft, 0.05) if trained else None
    return LM(config, params, draft_config=draft, draft_params=arrays, eos_token_ids=[11])


def test_counts_are_those_of_decoding_by_the_embedded_model():
    lm = embedded_in_float()
    prompts = read_suites(["stories", "dialogues"], lm, 200, 2)
    compare(lm, prompts, (False, True, True, True, True, True, False, False, False, False))


@pytest.mark.exhaustive
def test_counts_are_those_of_decoding_with_a_bidirectional_block():
    compare(model("bidirectional", trained=True), PROMPTS, (True, False, False))


def test_counts_are_those_of_decoding_with_a_chain_and_a_vocabulary():
    lm = model()
    draft = noisy_draft(lm.config, lm.params, lm.draft_config, 0.05, chain_rank=4)
    up = 40 * draft.chain["up"]  # so that the chain decides
    draft = draft.replace(chain=draft.chain | {"up": up}, vocabulary=jnp.array([0, *range(2, 13)]))
    chained = LM(
        lm.config,
        lm.params,
        draft_config=lm.draft_config,
        draft_params=with_head(lm.config, lm.params, draft),
        eos_token_ids=[11],
    )
    compare(chained, PROMPTS, (True, False, False))
    texts = write_texts(lm, PROMPTS, NEW)
    skip = lm.draft_config.skip
    unchained = Judge(
        LM(
            lm.config, lm.params, draft_config=lm.draft_config, draft_params=draft.replace(chain={})
        ),
        texts,
        4,
    )
    assert Judge(chained, texts, 4).acceptance(skip, 4) != unchained.acceptance(skip, 4)


def compare(lm, prompts, other_skip):
    texts = write_texts(lm, prompts, NEW)
    rows = [p.tokens for p in prompts]
    reference = lm.generate(rows, method="ar", max_new_tokens=NEW)
    assert texts.new_tokens == sum(len(r.tokens) for r in reference)
    judge = Judge(lm, texts, 4)
    taken = set()
    for skip, gamma in [(lm.draft_config.skip, 2), (other_skip, 4)]:
        options = dict(gamma=gamma, skip=skip, adaptive=False)
        results = lm.generate(rows, max_new_tokens=NEW, **options)
        accepted = np.sum([r.stats.accepted_per_position for r in results], axis=0)
        found = judge.acceptance(skip, gamma)
        assert found.iterations == sum(r.stats.iterations for r in results)
        assert found.accepted == tuple(accepted.tolist())
        assert found.tokens == texts.new_tokens
        taken.add(found.accepted)
    assert len(taken) == 2 and max(taken)[0] > 10  # it was not all in vain


def test_the_program_is_the_same_for_all_sets_and_places():
    judge = Judge(model(), write_texts(model(), PROMPTS, NEW), 3)
    acceptance._right_tokens.clear_cache()
    for i in range(3):
        judge.score(tuple(j == i for j in range(3)), 1 + i)
    assert acceptance._right_tokens._cache_size() == 1


def test_texts_that_do_not_fit_are_computed_anew(monkeypatch):
    lm = model()
    texts = write_texts(lm, PROMPTS, NEW)
    judge = Judge(lm, texts, 3)
    skip = (False, True, False)
    rows = []
    generate = lm.generate

    def counted(prompts, **options):
        rows.append(len(prompts))
        return generate(prompts, **options)

    monkeypatch.setattr(lm, "generate", counted)
    each = acceptance.context_bytes(lm, texts.tokens.shape[1] + 85 * 3)  # 255 tokens of drafts
    monkeypatch.setattr(acceptance, "MOST_BYTES", 2 * each)
    few = Judge(lm, texts, 3)
    assert (len(judge._kept), len(few._kept)) == (4, 2)
    assert few.acceptance(skip, 3) == judge.acceptance(skip, 3)
    assert few.score(skip, 2) == judge.score(skip, 2) > 0
    monkeypatch.setattr(acceptance, "MOST_BYTES", 3 * acceptance.context_bytes(lm, 20 + NEW))
    assert np.array_equal(write_texts(lm, PROMPTS, NEW).tokens, texts.tokens)
    assert rows == [3, 1]


def test_texts_end_by_tokens_of_their_own():
    lm = model()
    rows = [p.tokens for p in PROMPTS]
    endless = lm.generate(rows, method="ar", max_new_tokens=NEW, eos_token_ids=())
    ends = [None, (), (endless[2].tokens[5],), None]
    prompts = [dataclasses.replace(p, eos_token_ids=e) for p, e in zip(PROMPTS, ends, strict=True)]
    texts = write_texts(lm, prompts, NEW)
    expected = set()
    for prompt, result, end in zip(rows, endless, ends, strict=True):
        new = result.tokens
        stops = [new.index(e) + 1 for e in (lm.eos_token_ids if end is None else end) if e in new]
        expected.add((*prompt.tolist(), *new[: min(stops, default=NEW)]))
    found = zip(texts.tokens.tolist(), texts.lengths, strict=True)
    assert {tuple(row[:n]) for row, n in found} == expected
    assert sorted(texts.prompt_lengths) == sorted(len(p.tokens) for p in PROMPTS)


def test_replay_walks_as_decoding_does():
    # Begins at 0: two right, and a bonus; at 3: none; at 4: all five, which γ = 3 cuts; at 8.
    row = np.array([2, 9, 9, 0, 5, 9, 9, 9, 1])
    found = replay([row], 3)
    assert (found.tokens, found.iterations, found.accepted) == (9, 4, (3, 2, 1))
    assert found.tokens_per_iteration == 9 / 4 and found.per_position == (0.75, 0.5, 0.25)
    assert replay([row, np.zeros(0, int), np.array([0, 0])], 1).iterations == 7


def test_depths_between_those_that_are_measured_change_evenly():
    layers = 40
    found = [symmetric_skip(layers, size) for size in range(1, layers)]
    own = tuple(i >= 20 for i in range(layers))
    asked = []

    def measured(skip, gamma):
        asked.append(skip)
        kept = 2 if skip == own else layers - sum(skip)
        return Acceptance(1000, 100, tuple(kept * (gamma - i) for i in range(gamma)))

    expected = fit_acceptance(found, own, [1, 3], measured)
    assert len(set(asked)) == 13 and len(expected) == layers
    assert [e.kept for e in expected] == [*range(1, 21), *range(20, layers)]
    assert sum(e.measured for e in expected) == 13
    for e in expected:
        assert e.tokens_per_iteration == pytest.approx({1: 10, 3: 10})
        kept = 2 if e.skip == own else e.kept
        assert e.acceptance == pytest.approx([0.03 * kept, 0.02 * kept, 0.01 * kept])


def test_nothing_to_measure():
    texts = Texts(np.zeros((1, 3), np.int32), (3,), (3,))
    with pytest.raises(InputError, match="continues none"):
        Judge(model(), texts, 2)
