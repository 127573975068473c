"""Merged mode: mask rows within the verify pass draft, and the tokens are those of the target."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s3d_jax.decoding import sizes
from s3d_jax.decoding.prefill import prefill
from s3d_jax.decoding.sampling import batch_sampling
from s3d_jax.decoding.sizes import SlotPlan
from s3d_jax.decoding.state import DecodeSpec, Inputs, Proposal, Verified, init_state, verify_pass
from s3d_jax.drafters.merged import Merged
from s3d_jax.engine.batch import Batch
from s3d_jax.engine.ledger import ledger, plan_of
from s3d_jax.errors import ConfigError
from s3d_jax.lm import LM
from s3d_jax.nn.draft import DraftParams
from s3d_jax.nn.transformer import logits_of
from s3d_jax.settings.drafting import DraftConfig
from s3d_jax.settings.model import RopeConfig
from s3d_jax.settings.sampling import SamplingConfig
from s3d_jax.tune.plan import tune
from s3d_jax.weights.trees import store_tree
from tests.sampled import combinations, sampled
from tests.tiny import (
    OF_THREE_ROWS,
    counted,
    greedy_reference,
    outputs,
    run,
    tiny_config,
    tiny_params,
)
from tests.train.test_objective import _draft_stream, _target_stream, noisy_draft

DRAFT = DraftConfig((False,) * 4, 3, mode="merged")
PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7], [9, 9]]
WINDOWS = dict(sliding_window=(2, None, 2, None), local_rope=RopeConfig(theta=500.0))
MODELS = {
    "untrained": dict(trained=False),
    "all parts": dict(vocabulary=True, chain_rank=4),
    "bidirectional": dict(block_attention="bidirectional", chain_rank=4, **WINDOWS),
    "int8": dict(quantization="int8", kv_cache="int8", **WINDOWS),
}


def model(trained=True, vocabulary=False, chain_rank=0, block_attention="causal", **changes) -> LM:
    config = tiny_config(**changes)
    unrounded = config.replace(quantization=None, kv_cache=None)
    params = tiny_params(unrounded)
    settings = DRAFT.replace(block_attention=block_attention)
    draft = None
    if trained:
        draft = noisy_draft(unrounded, params, settings, chain_rank=chain_rank)
    if vocabulary:
        draft = draft.replace(vocabulary=jnp.arange(1, config.vocab_size, 3))
    if config.quantization:
        params = store_tree(config, params)
    return LM(config, params, draft_config=settings, draft_params=draft)


@pytest.fixture
def rings(monkeypatch):
    """Layers with a window keep rings: of 2 + 16 slots, the largest block being a merged one."""
    monkeypatch.setattr(sizes, "PREFILL_BUCKETS", (4, 8))


@pytest.mark.usefixtures("rings")
@pytest.mark.parametrize(
    "name, options",
    combinations(
        MODELS,
        OF_THREE_ROWS,
        quick=[
            ("untrained", "greedy"),
            ("all parts", "mixed"),
            ("bidirectional", "biased"),
            ("int8", "greedy"),
        ],
    ),
)
def test_every_text_is_that_of_plain_decoding(name, options):
    options = OF_THREE_ROWS[options]
    lm = model(**MODELS[name])
    results = lm.generate(PROMPTS, max_new_tokens=24, **options)
    expected = lm.generate(PROMPTS, max_new_tokens=24, method="ar", **options)
    assert [r.tokens for r in results] == [r.tokens for r in expected]
    assert all(r.stats.plain_iterations == 0 for r in results)


def test_streams_and_changing_rows_and_a_kept_cache_give_the_same():
    lm = model(chain_rank=4)
    prompts = [*PROMPTS, [3, 1, 4]]
    expected = [r.tokens for r in lm.generate(prompts, max_new_tokens=9, method="ar")]
    assert sum(lm.stream_tokens(prompts[1], max_new_tokens=9), []) == expected[1]
    many = dict(lm.generate_many(prompts, rows=2, max_new_tokens=9))
    assert [many[i].tokens for i in range(4)] == expected
    ids = np.array(prompts[1], np.int32)
    first = Batch(lm.engine, [ids], to_keep=True, max_new_tokens=4)
    assert list(first.run())
    longer = np.concatenate([ids, first.tokens[0]]).astype(np.int32)
    second = Batch(lm.engine, [longer], first.kept(), to_keep=True, max_new_tokens=5)
    assert list(second.run())
    assert first.tokens[0] + second.tokens[0] == expected[1]
    assert second.results()[0].stats.cached_tokens == len(longer) - 1


CONFIG = tiny_config()
PARAMS = tiny_params(CONFIG)
NEW = 16


@pytest.fixture(scope="module")
def truth():
    return [greedy_reference(CONFIG, PARAMS, prompt, NEW) for prompt in PROMPTS]


@pytest.mark.parametrize("kind", ["right", "wrong", "half right", "broken"])
def test_right_wrong_and_broken_drafts_change_no_token(kind, truth):
    """All accepted: γ+1 tokens per iteration. None accepted: one. Neither changes a token."""
    table = np.zeros((len(PROMPTS), 64), np.int32)
    for row, prompt, output in zip(table, PROMPTS, truth, strict=True):
        row[: len(prompt) + NEW] = prompt + output
    shift = {"right": (0, 0, 0), "wrong": (1, 1, 1), "half right": (0, 1, 0)}.get(kind)

    class Oracle(Merged):
        def propose(self, inputs) -> Proposal:
            at = inputs.state.cache.length + 1
            cut = jax.vmap(lambda row, i: jax.lax.dynamic_slice(row, (i,), (3,)))
            tokens = (cut(jnp.asarray(table), at) + jnp.asarray(shift)) % CONFIG.vocab_size
            return Proposal(tokens, inputs.state.cache)

    draft, drafter = noisy_draft(CONFIG, PARAMS, DRAFT, 0.1, 4), Oracle
    if kind == "broken":
        draft, drafter = DraftParams(jnp.full((3, CONFIG.hidden_size), jnp.nan)), Merged
    make = functools.partial(drafter, model=CONFIG)
    state = run(CONFIG, PARAMS, PROMPTS, NEW, draft=DRAFT, draft_params=draft, drafter=make)
    assert outputs(state, PROMPTS) == truth
    iterations, accepted = counted(state, PROMPTS, 3)
    if kind != "broken":
        expected = {"right": (1, 1, 1), "wrong": (0, 0, 0), "half right": (1, 0, 0)}[kind]
        np.testing.assert_array_equal(accepted, iterations[:, None] * expected)


@functools.partial(jax.jit, static_argnums=0)
def _merged(spec, params, draft, state, tokens):
    return spec.drafter.verify(Inputs(spec, params, draft, state), tokens)


@functools.partial(jax.jit, static_argnums=0)
def _plain(spec, params, state):
    return verify_pass(Inputs(spec, params, None, state), jnp.zeros((1, 0), jnp.int32))


def prefilled(lm, prompt):
    """The program, and the state of one row after its prefill."""
    sampling, features = batch_sampling(
        [SamplingConfig()], jax.random.split(jax.random.key(0), 1), lm.config.vocab_size
    )
    spec = DecodeSpec(lm.config, Merged(lm.draft_config, lm.config), features)
    length = len(prompt)
    slots = length + 9 + spec.block
    plan = SlotPlan((length,), (length + 9,), spec.gamma, slots, block=spec.block)
    state = init_state(spec, [prompt], plan, sampling)
    return spec, prefill(spec, lm.params, lm.draft_params, state, [prompt], plan)


def block_of_decoding(lm, prompt, proposed):
    """What the merged pass gives after a prompt; and the logits and the cache of plain steps."""
    spec, state = prefilled(lm, prompt)
    merged = _merged(spec, lm.params, lm.draft_params, state, jnp.asarray(proposed)[None])
    one_by_one = []
    for token in [*proposed, 0]:
        verified = _plain(spec, lm.params, state)
        one_by_one.append(verified.logits[0, 0])
        length = verified.cache.length + 1
        cache = verified.cache.replace(length=length)
        state = state.replace(cache=cache, tokens=state.tokens.at[0, length[0]].set(token))
    return merged, np.stack(one_by_one), state.cache


@pytest.mark.usefixtures("rings")
@pytest.mark.parametrize(
    "name, block_attention",
    combinations(
        ["windows", "granite"], ["causal", "bidirectional"], quick=[("windows", "bidirectional")]
    ),
)
def test_training_computes_the_mask_rows_of_decoding(name, block_attention):
    """After every token of the block, those that are only proposed too."""
    changes = dict(rope_layers=(True, False, False, True), residual_scale=0.7, logit_divisor=2.0)
    lm = model(block_attention=block_attention, **(WINDOWS if name == "windows" else changes))
    tokens = jax.random.randint(jax.random.key(3), (1, 24), 0, lm.config.vocab_size)
    prompt, gamma = np.asarray(tokens[0, :18]), 3
    merged, one_by_one, _ = block_of_decoding(lm, prompt, np.asarray(tokens[0, 18:21]))
    np.testing.assert_allclose(merged.logits[0], one_by_one, atol=1e-4)
    found = logits_of(lm.config, lm.params, merged.extra[0], lm.draft_params)
    anchors = jnp.arange(18, 22)[None]  # where the bonus token would stand
    _, cache = _target_stream(lm.config, lm.params, tokens, tokens.shape[1] + 4 * gamma)
    q = _draft_stream(
        lm.config, lm.params, lm.draft_config, lm.draft_params, tokens, anchors, cache
    )
    np.testing.assert_allclose(
        jax.nn.log_softmax(found), jax.nn.log_softmax(q.reshape(found.shape)), atol=2e-5
    )


@pytest.mark.usefixtures("rings")
@pytest.mark.parametrize("gamma", sampled([1, 3, 6], [3]))
def test_a_token_has_the_bits_that_it_has_alone(gamma):
    """Of int8 models: its logits, and the keys and values that it leaves."""
    lm = model(quantization="int8", kv_cache="int8", **WINDOWS)
    lm.draft_config = lm.draft_config.replace(gamma=gamma)
    rng = np.random.default_rng(0)
    prompt, proposed = rng.integers(0, 31, 18).astype(np.int32), rng.integers(0, 31, gamma)
    merged, one_by_one, cache = block_of_decoding(lm, prompt, proposed.astype(np.int32))
    np.testing.assert_array_equal(merged.logits[0], one_by_one)
    end = len(prompt) + gamma  # tokens that are in the cache now
    for ours, theirs in zip(
        merged.cache.keys + merged.cache.values, cache.keys + cache.values, strict=True
    ):
        at = np.arange(end - 3, end) % ours.shape[2]
        np.testing.assert_array_equal(ours.numbers[:, :, at], theirs.numbers[:, :, at])
        np.testing.assert_array_equal(ours.scales[:, :, at], theirs.scales[:, :, at])


def test_training_and_decoding_chain_from_the_bonus_token():
    """Where the text is what the draft proposes, training computes these tokens."""
    lm = model(chain_rank=6)
    prompt = np.arange(1, 9, dtype=np.int32)
    merged, _, _ = block_of_decoding(lm, prompt, np.zeros(3, np.int32))
    hidden = merged.extra[:, 0]  # the next draft, if none of the proposed tokens is accepted
    spec, state = prefilled(lm, np.append(prompt, 0).astype(np.int32))
    state, first = state.replace(drafter_state=hidden), set()
    for bonus in range(0, 31, 6):
        state = state.replace(tokens=state.tokens.at[0, 8].set(bonus))
        inputs = Inputs(spec, lm.params, lm.draft_params, state)
        proposed = np.asarray(spec.drafter.propose(inputs).tokens[0])
        tokens = jnp.asarray(np.concatenate([prompt, [bonus], proposed]))[None]
        _, cache = _target_stream(lm.config, lm.params, tokens, tokens.shape[1] + 3)
        anchors = jnp.array([[8]])
        q = _draft_stream(
            lm.config, lm.params, lm.draft_config, lm.draft_params, tokens, anchors, cache
        )
        np.testing.assert_array_equal(jnp.argmax(q[0], axis=-1), proposed)
        first.add(int(proposed[0]))
    assert len(first) > 1  # the bonus token counts


def test_the_next_draft_is_of_the_last_accepted_token_of_each_row():
    masks = np.arange(5 * 4 * 3 * 24, dtype=np.float32).reshape(5, 4, 3, 24)
    lm = model(trained=False)
    drafter = Merged(lm.draft_config, lm.config)
    plan = SlotPlan((1,) * 5, (9,) * 5, 3, 64, block=drafter.block)
    sampling, features = batch_sampling(
        [SamplingConfig()] * 5, jax.random.split(jax.random.key(0), 5), 31
    )
    spec = DecodeSpec(lm.config, drafter, features)
    state = init_state(spec, [np.zeros(1, np.int32)] * 5, plan, sampling)
    inputs = Inputs(spec, lm.params, lm.draft_params, state)
    verified = Verified(jnp.zeros(()), state.cache, jnp.zeros(()), jnp.asarray(masks))
    accepted = np.array([3, 0, 2, 1, 0])
    new = drafter.update(inputs, verified, jnp.asarray(accepted))
    np.testing.assert_array_equal(new, masks[np.arange(5), accepted])
    assert drafter.update(inputs, verified._replace(extra=None), accepted) is state.drafter_state


def test_what_a_merged_draft_cannot_do_is_refused():
    lm = model()
    with pytest.raises(ConfigError, match="through all layers: it skips none"):
        DraftConfig((False, True, True, False), mode="merged")
    with pytest.raises(ConfigError, match="mode must be one of"):
        DraftConfig((False,) * 4, mode="tree")
    for method in ("s3d", "ar"):
        with pytest.raises(ConfigError, match="it skips none"):
            lm.generate([[1]], skip=(False, True, True, False), method=method)
        with pytest.raises(ConfigError, match="drafts in every iteration: leave out adaptive"):
            lm.generate([[1]], adaptive=True, method=method)
    with pytest.raises(ConfigError, match="skips no layers and has no draft pass"):
        tune(lm, [object()])
    layers = lm.draft_params.replace(layers={"layers_0": lm.params["layers_0"]})
    merged_deltas = LM(lm.config, lm.params, draft_config=DRAFT, draft_params=layers)
    with pytest.raises(ConfigError, match="merged into its layers"):
        merged_deltas.generate([[1]])


def test_the_ledger_counts_the_slots_of_the_block():
    lm = model()
    drafter = Merged(DRAFT.replace(gamma=9), lm.config)
    plans = [plan_of(100, 2, 9, 100, block) for block in (0, drafter.block)]
    assert [plan.slots for plan in plans] == [128, 256] and plans[1].block == 100
    small, large = (ledger(lm.config, plan, (DRAFT, lm.draft_params), 0) for plan in plans)
    assert large.cache == 2 * small.cache
    assert drafter.described(lm.target, None) == {"mode": "merged", "gamma": 9}
    assert drafter.state_bytes(plans[1]) == 2 * 9 * 24 * 4
