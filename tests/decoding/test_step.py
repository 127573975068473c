"""Decoding is exact for any draft, and neither compiles nor copies anything twice."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3d_jax.decoding import sizes, step
from s3d_jax.decoding import state as state_module
from s3d_jax.decoding.prefill import prefill, prefill_jit
from s3d_jax.decoding.rows import put_row_jit
from s3d_jax.decoding.sampling import batch_sampling
from s3d_jax.decoding.sizes import PREFILL_BUCKETS, SlotPlan, prefill_chunks
from s3d_jax.decoding.state import COPIED, DecodeSpec, init_state
from s3d_jax.decoding.step import decode_jit, statistics
from s3d_jax.drafters import s3d
from s3d_jax.drafters.merged import Merged
from s3d_jax.drafters.s3d import S3D
from s3d_jax.lm import LM
from s3d_jax.nn import transformer as model
from s3d_jax.nn.cache import init_cache
from s3d_jax.nn.draft import DraftParams, untrained_draft
from s3d_jax.nn.transformer import forward
from s3d_jax.settings.drafting import DraftConfig, symmetric_skip
from s3d_jax.settings.model import RopeConfig
from s3d_jax.settings.sampling import SamplingConfig
from tests.sampled import combinations, sampled
from tests.tiny import (
    begin,
    counted,
    drafter_of,
    greedy_reference,
    outputs,
    run,
    tiny_config,
    tiny_params,
)
from tests.train.test_objective import noisy_draft

CONFIG = tiny_config()
PARAMS = tiny_params(CONFIG)
PROMPTS = [[3], [5, 9, 2], list(range(1, 18)), [7] * 40]  # one token, short, two buckets
NEW = 24


@pytest.fixture(scope="module")
def truth() -> list[list[int]]:
    return [greedy_reference(CONFIG, PARAMS, prompt, NEW) for prompt in PROMPTS]


def test_ar_equals_decoding_without_cache(truth):
    assert outputs(run(CONFIG, PARAMS, PROMPTS, NEW), PROMPTS) == truth


@pytest.mark.parametrize(
    "skipped, gamma, block_attention",
    combinations(
        [0, 2, 3],
        [1, 3, 6],
        ["causal", "bidirectional"],
        quick=[(0, 6, "causal"), (2, 3, "bidirectional"), (3, 1, "causal")],
    ),
)
def test_s3d_equals_decoding_without_cache(truth, gamma, skipped, block_attention):
    draft = DraftConfig(symmetric_skip(4, skipped), gamma, block_attention)
    assert outputs(run(CONFIG, PARAMS, PROMPTS, NEW, draft=draft), PROMPTS) == truth


def truth_table(truth, slots: int = 128) -> jax.Array:
    table = np.zeros((len(PROMPTS), slots), np.int32)
    for b, (prompt, output) in enumerate(zip(PROMPTS, truth, strict=True)):
        table[b, : len(prompt) + NEW] = prompt + output
    return jnp.asarray(table)


@pytest.mark.parametrize("gamma", sampled([1, 2, 5], [2]))
def test_oracle_liar_and_noise_drafts(truth, gamma):
    """All accepted: τ = γ+1. None accepted: τ = 1. Neither changes a token, nor does noise."""
    table = truth_table(truth)

    def oracle(at, gamma):
        return jax.vmap(lambda row, i: jax.lax.dynamic_slice(row, (i,), (gamma,)))(table, at)

    def liar(at, gamma):
        return (oracle(at, gamma) + 1) % CONFIG.vocab_size

    def noise(at, gamma):
        return (at[:, None] * 7 + jnp.arange(gamma) * 11) % CONFIG.vocab_size

    draft = DraftConfig(symmetric_skip(4, 2), gamma)
    new = NEW // (gamma + 1) * (gamma + 1)  # whole blocks, so that no block is cut by the limit
    taus = {}
    for propose in (oracle, liar, noise):
        state = run(CONFIG, PARAMS, PROMPTS, new, draft=draft, drafter=drafter_of(propose))
        assert outputs(state, PROMPTS) == [row[:new] for row in truth], propose.__name__
        iterations, accepted = counted(state, PROMPTS, gamma)
        taus[propose.__name__] = new / iterations
        assert (accepted.sum(axis=1) + iterations == new).all()
        if propose is oracle:
            assert (accepted == iterations[:, None]).all()
    assert (taus["oracle"] == gamma + 1).all()
    assert (taus["liar"] == 1).all()
    assert (taus["noise"] <= gamma + 1).all()


def test_broken_draft_embeddings_change_nothing(truth):
    draft = DraftConfig(symmetric_skip(4, 2), 3)
    for value in (np.nan, np.inf, 1e30):
        broken = DraftParams(mask_embeddings=jnp.full((2, CONFIG.hidden_size), value))
        state = run(CONFIG, PARAMS, PROMPTS, NEW, draft=draft, draft_params=broken)
        assert outputs(state, PROMPTS) == truth
        rows = [SamplingConfig(temperature=1.0, top_p=0.9)] * len(PROMPTS)
        state = run(CONFIG, PARAMS, PROMPTS, NEW, draft=draft, draft_params=broken, rows=rows)
        tokens = outputs(state, PROMPTS)
        assert all(len(row) == NEW and max(row) < CONFIG.vocab_size for row in tokens)
        assert min(len(set(row)) for row in tokens) > 1


@pytest.mark.exhaustive
def test_dynamic_rope_does_not_depend_on_the_block():
    """Keys are rotated as in token-by-token decoding, also where a block crosses the limit."""
    rope = RopeConfig("dynamic", factor=4.0, original_max_position_embeddings=16)
    config = tiny_config(rope=rope)
    params = tiny_params(config)
    ar = outputs(run(config, params, PROMPTS, NEW), PROMPTS)
    for gamma in (2, 5):
        draft = DraftConfig((False,) * 4, gamma)  # nothing skipped: many acceptances
        state = run(config, params, PROMPTS, NEW, draft=draft)
        assert outputs(state, PROMPTS) == ar


@pytest.mark.exhaustive
def test_sliding_window_and_soft_caps_stay_exact(monkeypatch):
    """Layers with a window keep rings of 5 + 8 slots, through which all prompts and outputs go."""
    monkeypatch.setattr(sizes, "PREFILL_BUCKETS", (4, 8))
    config = tiny_config(
        sliding_window=(5, None, 5, None),
        local_rope=RopeConfig(theta=500.0),
        attention_softcap=5.0,
        logit_softcap=10.0,
        post_norms=True,
        qk_norm=True,
        norm_offset=1.0,
        embedding_scale=24**0.5,
        activation="gelu_tanh",
        tie_embeddings=True,
    )
    params = tiny_params(config)
    truth = [greedy_reference(config, params, prompt, NEW) for prompt in PROMPTS]
    draft = DraftConfig(symmetric_skip(4, 2), 4)
    ar = run(config, params, PROMPTS, NEW)
    assert {keys.shape[2] for keys in ar.cache.keys} == {13, ar.cache.slots}
    assert outputs(ar, PROMPTS) == truth
    assert outputs(run(config, params, PROMPTS, NEW, draft=draft), PROMPTS) == truth
    lm = LM(config, params, draft_config=draft)
    assert [r.tokens for r in lm.generate(PROMPTS, max_new_tokens=NEW)] == truth
    assert sum(lm.stream_tokens(PROMPTS[3], max_new_tokens=NEW), []) == truth[3]


def test_cache_equals_that_of_a_fresh_prefill():
    draft = DraftConfig(symmetric_skip(4, 2), 4)
    state = run(CONFIG, PARAMS, PROMPTS, NEW, draft=draft)
    lengths = np.asarray(state.cache.length)
    assert (lengths == [len(p) + NEW - 1 for p in PROMPTS]).all()
    fresh = run(CONFIG, PARAMS, np.asarray(state.tokens)[:, : lengths.max() + 1], 0)
    for ours, theirs in (
        (state.cache.keys, fresh.cache.keys),
        (state.cache.values, fresh.cache.values),
    ):
        for a, b in zip(ours, theirs, strict=True):
            for row, length in enumerate(lengths):
                # same numbers through other matrix shapes: float32 rounding and nothing else
                np.testing.assert_allclose(a[row, :, :length], b[row, :, :length], atol=2e-5)


def test_rows_stop_at_the_end_of_the_cache(truth):
    """With the smallest cache allowed no committed slot is overwritten by a clamped write."""
    gamma, new = 6, 9
    draft = DraftConfig((False,) * 4, gamma)
    slots = max(map(len, PROMPTS)) + new + gamma + 1
    slots = max(slots, sum(prefill_chunks(39)))
    state = run(CONFIG, PARAMS, PROMPTS, new, draft=draft, slots=slots)
    assert outputs(state, PROMPTS) == [row[:new] for row in truth]
    with pytest.raises(ValueError, match="slack"):
        run(CONFIG, PARAMS, PROMPTS, new, draft=draft, slots=max(map(len, PROMPTS)) + new + gamma)


def test_stop_tokens_cut_inside_the_block(truth):
    stops = tuple(sorted({truth[0][4], truth[1][7], truth[2][2]}))
    expected = []
    for row in truth:
        ends = [i for i, token in enumerate(row) if token in stops]
        expected.append(row[: ends[0] + 1] if ends else row)
    assert min(map(len, expected)) < NEW
    table = truth_table(truth)

    def oracle(at, gamma):
        return jax.vmap(lambda row, i: jax.lax.dynamic_slice(row, (i,), (gamma,)))(table, at)

    draft = DraftConfig(symmetric_skip(4, 2), 5)
    state = run(
        CONFIG, PARAMS, PROMPTS, NEW, draft=draft, drafter=drafter_of(oracle), stop_ids=stops
    )
    assert outputs(state, PROMPTS) == expected
    assert np.asarray(state.done).all()
    iterations, _ = counted(state, PROMPTS, 5)
    assert (iterations == [-(-len(row) // 6) for row in expected]).all()


def make_state(
    prompts, gamma, vocab=CONFIG.vocab_size, limit=50, stop_ids=(), penalized=False, slots=70
):
    rows = [SamplingConfig(presence_penalty=1.0 if penalized else 0.0)] * len(prompts)
    sampling, features = batch_sampling(
        rows, jax.random.split(jax.random.key(0), len(prompts)), vocab
    )
    drafter = S3D(DraftConfig((False,) * 4, gamma)) if gamma else None
    spec = DecodeSpec(CONFIG, drafter, features)
    limits = np.broadcast_to(np.asarray(limit), (len(prompts),))
    return spec, begin(spec, prompts, limits, slots, sampling, stop_ids)


_commit = jax.jit(step.commit, static_argnums=0)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_commit_against_plain_python(data):
    gamma, rows = 3, 3  # fixed shapes: one program for all examples
    token = st.integers(0, 6)
    prompts = [data.draw(st.lists(token, min_size=1, max_size=5)) for _ in range(rows)]
    limits = [len(p) + data.draw(st.integers(0, 8)) for p in prompts]
    stop_ids = data.draw(st.sampled_from([(), (3,), (0, 5)]))
    spec, state = make_state(prompts, gamma, limit=limits, stop_ids=stop_ids, penalized=True)
    # x_n is the last prompt token and not in the cache
    state = state.replace(cache=state.cache.replace(length=state.cache.prompt_length - 1))
    expected = [list(p) for p in prompts]
    done = [len(p) >= n for p, n in zip(prompts, limits, strict=True)]
    for _ in range(2):
        draft = [[data.draw(token) for _ in range(gamma)] for _ in range(rows)]
        accepted = [data.draw(st.integers(0, gamma)) for _ in range(rows)]
        bonus = [data.draw(token) for _ in range(rows)]
        arrays = (jnp.asarray(x, jnp.int32) for x in (draft, accepted, bonus))
        state = _commit(spec, state, *arrays)
        for b in range(rows):
            for new in [*draft[b][: accepted[b]], bonus[b]]:
                if not done[b]:
                    expected[b].append(new)
                    done[b] = new in stop_ids or len(expected[b]) >= limits[b]
    for b in range(rows):
        length = int(state.cache.length[b]) + 1
        assert np.asarray(state.tokens)[b, :length].tolist() == expected[b]
        counts = np.bincount(expected[b][len(prompts[b]) :], minlength=CONFIG.vocab_size)
        assert (np.asarray(state.output_counts)[b] == counts).all()
    assert np.asarray(state.done).tolist() == done


def test_loop_and_single_steps_give_the_same():
    draft = DraftConfig(symmetric_skip(4, 2), 3)
    rows = [SamplingConfig(temperature=t, top_k=9) for t in (0.0, 0.7, 1.0, 1.3)]
    whole = run(CONFIG, PARAMS, PROMPTS, NEW, draft=draft, rows=rows)
    keys = jax.random.split(jax.random.key(0), len(PROMPTS))
    sampling, features = batch_sampling(rows, keys, CONFIG.vocab_size)
    spec = DecodeSpec(CONFIG, S3D(draft), features)
    arrays = [np.asarray(p, np.int32) for p in PROMPTS]
    lengths = tuple(map(len, arrays))
    plan = SlotPlan(lengths, tuple(n + NEW for n in lengths), 3, whole.cache.slots)
    draft_params = untrained_draft(CONFIG, PARAMS)
    state = init_state(spec, arrays, plan, sampling)
    state = prefill(spec, PARAMS, draft_params, state, arrays, plan)
    calls = 0
    while not np.asarray(state.done).all():
        state = decode_jit(spec, PARAMS, draft_params, state, jnp.int32(1))
        calls += 1
    assert outputs(state, PROMPTS) == outputs(whole, PROMPTS)
    assert calls == counted(whole, PROMPTS, 3)[0].max()


BATCHES = {"one row": [[1, 2]], "ragged": [[1] * n for n in (1, 2, 3, 17, 33, 5, 9, 64)]}


@pytest.mark.usefixtures("compiled_here")
@pytest.mark.parametrize("prompts", BATCHES.values(), ids=BATCHES)
def test_the_state_is_donated_and_no_second_cache_lives(prompts):
    """One row and a ragged batch, prefill and decoding: the same buffers throughout."""
    spec, state = make_state(prompts, 3, limit=90, slots=512)
    shape = state.cache.keys[0].shape
    before = sorted(x.unsafe_buffer_pointer() for x in (*state.cache.keys, *state.cache.values))
    old = state.cache
    block = state.tokens[:, :64]
    cache = prefill_jit(CONFIG, PARAMS, block, state.cache, jnp.int32(0))
    filled = state = state.replace(cache=cache)
    state = decode_jit(spec, PARAMS, untrained_draft(CONFIG, PARAMS), state, jnp.int32(2))
    jax.block_until_ready(state)
    for cache in (old, filled.cache):
        assert all(x.is_deleted() for x in (*cache.keys, *cache.values))
    assert filled.tokens.is_deleted()
    after = sorted(x.unsafe_buffer_pointer() for x in (*state.cache.keys, *state.cache.values))
    assert after == before
    live = [x for x in jax.live_arrays() if x.shape == shape and not x.is_deleted()]
    # Buffers, not arrays: jax 0.7 lists some arrays twice, once more without an owner.
    assert sorted({x.unsafe_buffer_pointer() for x in live}) == after


@pytest.mark.usefixtures("compiled_here")
@pytest.mark.parametrize(
    "program, name",
    combinations(
        ["prefill", "decode", "merged", "comb"],
        BATCHES,
        quick=[
            ("prefill", "ragged"),
            ("decode", "one row"),
            ("merged", "one row"),
            ("comb", "one row"),
        ],
    ),
)
def test_programs_copy_no_cache_inside(program, name):
    """The memory needed in addition to the arguments does not grow with the cache."""
    prompts, sizes = BATCHES[name], []
    for slots in (512, 4096):
        spec, state = make_state(prompts, 3, limit=90, slots=slots)
        if program == "merged":
            drafter = Merged(DraftConfig((False,) * 4, 3, mode="merged"), CONFIG)
            spec = dataclasses.replace(spec, drafter=drafter)
            state = begin(spec, prompts, [90] * len(prompts), slots, state.sampling)
            draft = noisy_draft(CONFIG, PARAMS, drafter.settings, chain_rank=4)
            lowered = decode_jit.lower(spec, PARAMS, draft, state, jnp.int32(5), 80)
        elif program == "prefill":
            lowered = prefill_jit.lower(
                CONFIG, PARAMS, state.tokens[:, :64], state.cache, jnp.int32(0), 64
            )
        else:
            if program == "comb":
                spec = dataclasses.replace(spec, drafter=S3D(spec.drafter.settings, (2, 1)))
                state = begin(spec, prompts, [90] * len(prompts), slots, state.sampling)
            recalls = noisy_draft(CONFIG, PARAMS, spec.drafter.settings, recall=CONFIG.num_layers)
            lowered = decode_jit.lower(spec, PARAMS, recalls, state, jnp.int32(5), 64)
        memory = lowered.compile().memory_analysis()
        cache = sum(x.nbytes for x in (*state.cache.keys, *state.cache.values))
        assert memory.alias_size_in_bytes >= cache  # all of it is written in place
        sizes.append(memory.temp_size_in_bytes)
    assert sizes[1] - sizes[0] < cache / 100


@pytest.mark.usefixtures("compiled_here")
def test_a_row_is_put_into_a_state_in_place():
    _, state = make_state([[1, 2], [3], [4, 5, 6]], 3, limit=90, slots=512)
    _, new = make_state([[7, 8, 9, 10]], 3, limit=70, slots=512)
    program = put_row_jit.lower(state, jnp.int32(1), new).compile()
    memory = program.memory_analysis()
    cache = sum(x.nbytes for x in (*state.cache.keys, *state.cache.values))
    assert memory.alias_size_in_bytes >= cache
    assert memory.temp_size_in_bytes < cache / 100
    tokens = np.array(state.tokens)  # a copy, since the state is donated
    state = program(state, np.int32(1), new)
    assert np.asarray(state.tokens)[:, :5].tolist() == [
        tokens[0, :5].tolist(),
        [7, 8, 9, 10, 0],
        tokens[2, :5].tolist(),
    ]
    assert state.limit.tolist() == [90, 70, 90]
    assert state.stop_ids.shape == new.stop_ids.shape


@pytest.mark.usefixtures("compiled_here")
def test_a_single_token_s_write_copies_no_cache():
    """One row, one key head, all slots read: XLA would repeat the write in each of its readers."""
    config, slots = CONFIG.replace(num_kv_heads=1, num_heads=3, head_dim=64), 256
    spec = DecodeSpec(config)
    sampling, _ = batch_sampling([SamplingConfig()], jax.random.split(jax.random.key(0), 1), 31)
    state = begin(spec, [np.arange(9)], [90], slots, sampling)
    params = model.init_params(config, jax.random.key(0))
    text = decode_jit.lower(spec, params, None, state, jnp.int32(5)).compile().as_text()
    copies = re.findall(rf"= f32\[(?:1,1,)?{slots},64\]\S* copy\(", text)
    assert len(copies) < config.num_layers  # each layer had eight


def test_one_draft_and_one_verify_are_traced_and_skipped_layers_are_absent(monkeypatch):
    blocks, passes = [], []
    real_call, real_verify = model.Block.__call__, state_module.hidden_states
    real_draft = s3d.hidden_states

    def counted_block(self, *args):
        blocks.append(self.name)
        return real_call(self, *args)

    def counted_verify(*args, **kwargs):
        passes.append("verify")
        return real_verify(*args, **kwargs)

    def counted_draft(*args, **kwargs):
        passes.append(kwargs["skip"])
        return real_draft(*args, **kwargs)

    monkeypatch.setattr(model.Block, "__call__", counted_block)
    monkeypatch.setattr(state_module, "hidden_states", counted_verify)
    monkeypatch.setattr(s3d, "hidden_states", counted_draft)
    skip = (False, True, True, False)
    spec, state = make_state([[1, 2]], 2)
    spec = DecodeSpec(CONFIG, S3D(DraftConfig(skip, 2)), spec.features)
    jax.jit(step.decode, static_argnames="spec").lower(
        spec, PARAMS, untrained_draft(CONFIG, PARAMS), state, jnp.int32(1)
    )
    assert passes == [skip, "verify"]
    kept = ["layers_0", "layers_3"]
    assert blocks == kept + [f"layers_{i}" for i in range(4)]


def test_statistics_of_a_part():
    """Iterations of 3, 1 and 4 tokens (γ = 4) after a prompt of two; EOS cuts the last."""
    passes = np.array([9, 9, 3, 0, 0, 1, 5, 0, 0, 0, 7, 7])
    assert statistics(passes, 2, 8, 4) == (3, 0, (2, 2, 1, 1), 0, 0)
    assert statistics(passes, 2, 7, 4) == (3, 0, (2, 2, 1, 0), 0, 0)
    assert statistics(passes, 2, 4, 4) == (2, 0, (1, 1, 0, 0), 0, 0)
    assert statistics(passes, 2, 1, 4) == (1, 0, (1, 0, 0, 0), 0, 0)
    assert statistics(passes, 2, 0, 4) == (0, 0, (0, 0, 0, 0), 0, 0)
    passes[2] += COPIED  # its two tokens were copied
    found = statistics(passes, 2, 8, 4)
    assert found == (3, 0, (1, 1, 1, 1), 1, 2) and found.drafting == 2
    assert statistics(passes, 2, 1, 4) == (1, 0, (0, 0, 0, 0), 1, 1)
    passes = np.array([9, 9, 3, 0, 0, -1, -1, 5, 0])
    assert statistics(passes, 2, 7, 4) == (4, 2, (2, 2, 0, 0), 0, 0)


@pytest.mark.parametrize("length", [0, 1, 16, 17, 512, 513, 1300])
def test_prefill_chunks_cover_the_prompt_with_known_sizes(length):
    chunks = prefill_chunks(length)
    assert set(chunks) <= set(PREFILL_BUCKETS)
    assert length <= sum(chunks) < length + PREFILL_BUCKETS[-1]
    assert all(chunk == 512 for chunk in chunks[:-1])


def test_chunked_prefill_equals_one_pass():
    config = tiny_config(max_position_embeddings=2048)
    params = tiny_params(config)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 31, 1100).tolist(), rng.integers(0, 31, 530).tolist(), [4, 5]]
    state = run(config, params, prompts, 3)
    whole = jax.jit(forward, static_argnums=0)
    for b, prompt in enumerate(prompts):
        alone = init_cache(config, 1, len(prompt), jnp.array([len(prompt)]))
        _, alone = whole(config, params, jnp.asarray([prompt]), alone)
        for a, c in zip(state.cache.keys, alone.keys, strict=True):
            n = len(prompt) - 1
            np.testing.assert_allclose(a[b, :, :n], c[0, :, :n], atol=2e-5)
