"""Leaves beside draft tokens: the text stays the target's, and a right leaf saves an iteration."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s3d_jax.decoding import sizes
from s3d_jax.decoding.comb import accept_comb, leaf_depths, row_depths
from s3d_jax.decoding.sampling import batch_sampling
from s3d_jax.decoding.state import DecodeSpec, Inputs, Proposal, choice_noise, verify_pass
from s3d_jax.drafters.s3d import S3D, takes_leaves
from s3d_jax.engine.batch import Batch
from s3d_jax.errors import ConfigError, InputError
from s3d_jax.lm import LM
from s3d_jax.nn.cache import moved
from s3d_jax.settings.drafting import (
    DraftConfig,
    PassCosts,
    Tuning,
    checked_leaves,
    parse_leaves,
    shown_leaves,
    symmetric_skip,
)
from s3d_jax.settings.model import RopeConfig
from s3d_jax.settings.sampling import SamplingConfig
from s3d_jax.weights.trees import store_tree
from tests.sampled import combinations
from tests.tiny import (
    OF_THREE_ROWS,
    begin,
    counted,
    greedy_reference,
    outputs,
    run,
    tiny_config,
    tiny_lm,
    tiny_params,
)
from tests.train.test_objective import decoding_state, noisy_draft

SKIP = symmetric_skip(4, 2)
PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7], [9, 9]]
WINDOWS = dict(sliding_window=(3, None, 3, None), local_rope=RopeConfig(theta=500.0))
MODELS = {
    "plain": dict(),
    "all parts": dict(vocabulary=True, chain_rank=4),
    "windows": dict(chain_rank=4, **WINDOWS),
}
NEW = 24


def model(vocabulary=False, chain_rank=0, **changes) -> LM:
    config = tiny_config(**changes)
    params, settings = tiny_params(config), DraftConfig(SKIP, 3)
    draft = noisy_draft(config, params, settings, chain_rank=chain_rank)
    if vocabulary:
        draft = draft.replace(vocabulary=jnp.arange(1, config.vocab_size, 2))
    return LM(config, params, draft_config=settings, draft_params=draft)


@pytest.fixture
def rings(monkeypatch):
    """Layers with a window keep rings of 3 + 16 slots at most."""
    monkeypatch.setattr(sizes, "PREFILL_BUCKETS", (4, 8))


@pytest.mark.usefixtures("rings")
@pytest.mark.parametrize(
    "name, options",
    combinations(
        MODELS,
        OF_THREE_ROWS,
        quick=[("all parts", "mixed"), ("windows", "greedy")],
    ),
)
def test_every_text_is_that_of_plain_decoding(name, options):
    options = OF_THREE_ROWS[options]
    lm = model(**MODELS[name])
    expected = lm.generate(PROMPTS, max_new_tokens=NEW, method="ar", **options)
    taus = []
    for leaves in ((), (10, 0, 5)):
        always = dict(adaptive=False, leaves=leaves)
        results = lm.generate(PROMPTS, max_new_tokens=NEW, **always, **options)
        assert [r.tokens for r in results] == [r.tokens for r in expected]
        taus.append(np.mean([r.stats.tokens_per_iteration for r in results]))
    assert taus[1] > taus[0]  # leaves were committed


def test_batches_streams_and_copies_give_the_same():
    lm = model(chain_rank=4)
    prompts = [*PROMPTS, [3, 1, 4] * 5]
    expected = [r.tokens for r in lm.generate(prompts, max_new_tokens=30, method="ar")]
    options = dict(max_new_tokens=30, leaves=(2, 1))
    assert [r.tokens for r in lm.generate(prompts, **options)] == expected
    assert sum(lm.stream_tokens(prompts[3], **options), []) == expected[3]
    many = dict(lm.generate_many(prompts, rows=2, **options))
    assert [many[i].tokens for i in range(4)] == expected
    copying = lm.generate(prompts, **options, adaptive=False, copies=True)
    assert [r.tokens for r in copying] == expected
    assert sum(r.stats.copying_iterations for r in copying) > 0


CONFIG = tiny_config()
PARAMS = tiny_params(CONFIG)


@pytest.fixture(scope="module")
def truth():
    return [greedy_reference(CONFIG, PARAMS, prompt, NEW) for prompt in PROMPTS]


@pytest.mark.parametrize("wrong", [1, 2, 3, None])
def test_a_right_leaf_is_committed_with_the_token_after_it(wrong, truth):
    """Draft tokens are right up to a place. Of its two leaves the second one is right."""
    table = np.zeros((len(PROMPTS), 128), np.int32)
    for row, prompt, output in zip(table, PROMPTS, truth, strict=True):
        row[: len(prompt) + NEW] = prompt + output

    class Oracle(S3D):
        def propose(self, inputs) -> Proposal:
            at = inputs.state.cache.length + 1
            cut = jax.vmap(lambda row, i: jax.lax.dynamic_slice(row, (i,), (3,)))
            right = cut(jnp.asarray(table), at)
            miss = jnp.arange(1, 4) == (wrong or 0)
            leaves = jnp.stack([right + 2, right], axis=2).reshape(len(PROMPTS), -1)
            tokens = jnp.concatenate([right + miss, leaves], axis=1) % CONFIG.vocab_size
            return Proposal(tokens, inputs.state.cache)

    oracle = functools.partial(Oracle, leaves=(2, 2, 2))
    state = run(CONFIG, PARAMS, PROMPTS, NEW, draft=DraftConfig(SKIP, 3), drafter=oracle)
    assert outputs(state, PROMPTS) == truth
    iterations, accepted = counted(state, PROMPTS, 3)
    places = np.arange(1, 4)
    # The last iteration is cut where the text ends.
    each = -(-NEW // (4 if wrong is None else wrong + 1))
    np.testing.assert_array_equal(iterations, each)
    expected = np.where(places <= (wrong or 3), each, 0)
    assert (np.abs(accepted - expected) <= 1).all()
    # What moved is what a pass over the text alone leaves.
    fresh = run(CONFIG, PARAMS, np.asarray(state.tokens)[:, : len(PROMPTS[1]) + NEW], 0)
    for ours, theirs in zip(
        state.cache.keys + state.cache.values, fresh.cache.keys + fresh.cache.values, strict=True
    ):
        for b, prompt in enumerate(PROMPTS):
            n = len(prompt) + NEW - 1
            np.testing.assert_allclose(ours[b, :, :n], theirs[b, :, :n], atol=2e-5)


@functools.partial(jax.jit, static_argnums=0)
def _verified(spec, params, state, tokens):
    return verify_pass(Inputs(spec, params, None, state), tokens)


@pytest.mark.parametrize("changes", [{}, WINDOWS], ids=["llama", "windows"])
def test_a_leaf_has_the_logits_of_its_own_branch(changes):
    lm = model(**changes)
    depths, prompt = leaf_depths((1, 2, 1)), np.arange(3, 14, dtype=np.int32)
    state, alone = decoding_state(lm.config, lm.params, lm.draft_config, lm.draft_params, prompt)
    spec = dataclasses.replace(alone, drafter=S3D(lm.draft_config, (1, 2, 1)))
    tokens = np.array([7, 9, 2, 21, 22, 23, 24], np.int32)
    comb = _verified(spec, lm.params, state, jnp.asarray(tokens)[None]).logits[0]
    same = functools.partial(np.testing.assert_allclose, atol=2e-5, rtol=1e-5)
    plain = _verified(alone, lm.params, state, jnp.asarray(tokens[:3])[None]).logits[0]
    same(comb[:4], plain)
    for row, depth, leaf in zip(range(4, 8), depths, tokens[3:], strict=True):
        branch = tokens[:3].copy()
        branch[depth - 1] = leaf
        plain = _verified(alone, lm.params, state, jnp.asarray(branch)[None]).logits[0]
        same(comb[row], plain[depth])


def test_which_branch_is_accepted():
    depths = leaf_depths((2, 0, 1))
    assert depths == (1, 1, 3)
    assert row_depths(3, depths).tolist() == [0, 1, 2, 3, 1, 1, 3]
    proposed = jnp.array([[1, 2, 3, 4, 5, 6]] * 6)
    target = [
        [1, 2, 3, 10, 11, 12, 13],  # all
        [9, 2, 3, 10, 11, 12, 13],  # none, and no leaf
        [4, 2, 3, 10, 11, 12, 13],  # the first leaf
        [5, 2, 3, 10, 11, 12, 13],  # the second
        [1, 9, 6, 10, 11, 12, 13],  # refused where there is no leaf
        [1, 2, 6, 10, 11, 12, 13],  # the leaf of the third place
    ]
    accepted, bonus, path = accept_comb(proposed, jnp.array(target), depths)
    assert accepted.tolist() == [3, 0, 1, 1, 1, 3]
    assert bonus.tolist() == [10, 9, 11, 12, 9, 13]
    kept = [row[: n + 1] for row, n in zip(path.tolist(), accepted.tolist(), strict=True)]
    assert kept == [[0, 1, 2, 3], [0], [0, 4], [0, 5], [0, 1], [0, 1, 2, 6]]
    nobody = jnp.zeros(6, bool)
    accepted, bonus, _ = accept_comb(proposed, jnp.array(target), depths, nobody)
    assert accepted.tolist() == [0] * 6
    assert bonus.tolist() == [row[0] for row in target]


def test_a_row_ends_where_its_leaf_has_no_numbers(truth):
    """The other rows go on."""

    class BrokenLeaf(S3D):
        def propose(self, inputs) -> Proposal:
            state = inputs.state
            right = {len(p): out[0] for p, out in zip(PROMPTS, truth, strict=True)}
            first = jnp.select(
                [state.cache.length + 1 == n for n in right], [*right.values()], default=0
            )
            tokens = jnp.stack([first + 1, first], axis=1) % CONFIG.vocab_size
            return Proposal(tokens, state.cache)

        def verify(self, inputs, tokens):
            found = verify_pass(inputs, tokens)
            return found._replace(logits=found.logits.at[1, 2].set(jnp.nan))

    broken = functools.partial(BrokenLeaf, leaves=(1,))
    state = run(CONFIG, PARAMS, PROMPTS, NEW, draft=DraftConfig(SKIP, 1), drafter=broken)
    assert np.asarray(state.broken).tolist() == [False, True, False]
    assert outputs(state, PROMPTS) == [truth[0], truth[1][:1], truth[2]]


@pytest.mark.parametrize("kind", ["slots", "ring", "int8"])
def test_a_slot_is_moved(kind):
    lm = model(**{"slots": {}, "ring": WINDOWS, "int8": dict(kv_cache="int8")}[kind])
    prompts = [list(range(1, 12)), [4, 2]]
    state = run(lm.config, lm.params, prompts, 6)
    cache = state.cache
    if kind == "ring":
        cache = cache.replace(slots=4 * cache.slots)
    source, target = np.array([9, 3]), np.array([7, 3])
    after = moved(cache, jnp.asarray(source), jnp.asarray(target))
    pairs = zip(
        jax.tree.leaves((cache.keys, cache.values)),
        jax.tree.leaves((after.keys, after.values)),
        strict=True,
    )
    for old, new in pairs:
        expected = np.array(old)
        expected[0, :, 7] = expected[0, :, 9]
        np.testing.assert_array_equal(new, expected)


def test_options():
    assert parse_leaves("2+1") == (2, 1)
    assert parse_leaves(shown_leaves(())) == (0,)
    assert checked_leaves([2, 0, 1, 0], 3) == (2, 0, 1)
    assert checked_leaves(np.array([0]), 1) == ()
    with pytest.raises(InputError, match='numbers like "2\\+1"'):
        parse_leaves("2,1")
    lm = tiny_lm()
    with pytest.raises(ConfigError, match="3 entries, and there are only 2 draft tokens"):
        lm.generate(PROMPTS[0], leaves=(1, 1, 1), gamma=2)
    with pytest.raises(ConfigError, match="16 in all at most"):
        lm.generate(PROMPTS[0], leaves=(9, 9))
    with pytest.raises(ConfigError, match="the draft has only 15 tokens"):
        model(vocabulary=True).generate(PROMPTS[0], leaves=(15,))
    with pytest.raises(ConfigError, match="'prompt-lookup' has no leaves"):
        lm.generate(PROMPTS[0], leaves=(1,), method="prompt-lookup")
    assert len(lm.generate(PROMPTS[0], leaves=[2], method="ar", max_new_tokens=3)[0].tokens) == 3
    with pytest.raises(ConfigError, match=r"leaves .* got 'all'"):
        lm.generate(PROMPTS[0], leaves="all")
    lm.draft_config = DraftConfig((False,) * 4, 3, mode="merged")
    with pytest.raises(ConfigError, match="a merged draft has no leaves"):
        lm.generate(PROMPTS[0], leaves=(1,))


def test_an_int8_model_keeps_its_bits():
    """On CPUs a leaf would be summed in the order of its scratch slot."""
    config = tiny_config(quantization="int8")
    params = store_tree(config, tiny_params(config.replace(quantization=None)))
    lm = LM(config, params, draft_config=DraftConfig(SKIP, 3))
    with pytest.raises(ConfigError, match="would change last bits of this model"):
        lm.generate(PROMPTS[0], leaves=(1,))
    assert len(lm.generate(PROMPTS[0], leaves=(0,), max_new_tokens=3)[0].tokens) == 3
    assert (takes_leaves(lm.config), takes_leaves(tiny_config())) == (False, True)


def test_tuned_leaves_are_used_with_the_tuned_settings_alone():
    lm = tiny_lm()
    costs = PassCosts(0.5, (1.0, 1.1, 1.2))
    lm.tuning = Tuning(2, SKIP, costs, 1.5, leaves=(2,))
    assert Tuning.from_dict(lm.tuning.to_dict()) == lm.tuning
    assert "leaves" not in Tuning(2, SKIP, costs, 1.5).to_dict()
    for options, leaves in (({}, (2,)), (dict(gamma=2), ()), (dict(leaves=(1,)), (1,))):
        choice = S3D.choose(lm.target, options)
        assert choice.drafter.leaves == leaves
        assert choice.gain == (1.5 if leaves == (2,) else None)
    # What s3d bench tries begins with what loading uses.
    assert S3D.candidates(lm.target) == [{}, {"gamma": 3}, {"gamma": 4}, {"gamma": 6}]


def test_a_sampled_row_draws_what_plain_decoding_draws(truth):
    rows = [SamplingConfig(temperature=t, top_p=0.9) for t in (0.5, 1.0, 1.5)]
    plain = run(CONFIG, PARAMS, PROMPTS, NEW, rows=rows, seed=3)
    comb = functools.partial(S3D, leaves=(3, 2, 1))
    draft = DraftConfig(SKIP, 3)
    ours = run(CONFIG, PARAMS, PROMPTS, NEW, draft=draft, drafter=comb, rows=rows, seed=3)
    assert outputs(ours, PROMPTS) == outputs(plain, PROMPTS) != truth


def test_leaves_of_a_greedy_row_beside_a_sampled_one():
    """They are the next best tokens, as if the row were alone."""
    lm = model()
    rows = [SamplingConfig(), SamplingConfig(temperature=1.0)]
    found = []
    for some in (rows, rows[:1]):
        sampling, features = batch_sampling(
            some, jax.random.split(jax.random.key(0), len(some)), lm.config.vocab_size
        )
        spec = DecodeSpec(lm.config, S3D(lm.draft_config, (3, 2)), features)
        state = begin(spec, PROMPTS[: len(some)], [20] * len(some), 64, sampling)
        noise = choice_noise(spec, state, 4)
        inputs = Inputs(spec, lm.params, lm.draft_params, state, None, noise)
        found.append(np.asarray(spec.drafter.propose(inputs).tokens[0]))
    np.testing.assert_array_equal(found[0], found[1])
    assert len(set(found[0][[0, 3, 4, 5]])) == 4


def test_a_stop_token_that_is_a_leaf_ends_the_text(truth):
    stop = truth[1][4]
    lm = LM(CONFIG, PARAMS, draft_config=DraftConfig(SKIP, 3))
    options = dict(max_new_tokens=NEW, eos_token_ids=[stop])
    expected = lm.generate(PROMPTS, method="ar", **options)
    results = lm.generate(PROMPTS, leaves=(9, 7), adaptive=False, **options)
    assert [r.tokens for r in results] == [r.tokens for r in expected]
    assert results[1].tokens[-1] == stop


def test_a_kept_cache_holds_what_leaves_committed():
    lm = model(chain_rank=4, **WINDOWS)
    always = dict(leaves=(9, 7), adaptive=False)
    ids = np.array(PROMPTS[1], np.int32)
    first = Batch(lm.engine, [ids], to_keep=True, max_new_tokens=7, **always)
    assert list(first.run())
    longer = np.array([*ids, *first.tokens[0], 4], np.int32)
    second = Batch(lm.engine, [longer], first.kept(), to_keep=True, max_new_tokens=9, **always)
    assert list(second.run())
    assert second.results()[0].stats.cached_tokens > 0
    (alone,) = lm.generate([longer], method="ar", max_new_tokens=9)
    assert second.tokens[0] == alone.tokens
