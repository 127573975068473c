"""Adaptive drafting: rows draft where it pays, and their output never depends on it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3d_jax.decoding import adaptive
from s3d_jax.decoding.sampling import batch_sampling
from s3d_jax.decoding.state import DecodeSpec
from s3d_jax.decoding.step import decode_jit, statistics
from s3d_jax.drafters import registry
from s3d_jax.drafters.s3d import S3D
from s3d_jax.errors import ConfigError
from s3d_jax.lm import LM
from s3d_jax.nn import transformer as model
from s3d_jax.nn.draft import untrained_draft
from s3d_jax.settings.drafting import DraftConfig, PassCosts, Tuning, symmetric_skip
from s3d_jax.settings.model import RopeConfig
from s3d_jax.settings.sampling import SamplingConfig
from tests.sampled import sampled
from tests.tiny import begin, drafter_of, greedy_reference, outputs, run, tiny_config, tiny_params

CONFIG = tiny_config()
PARAMS = tiny_params(CONFIG)
PROMPTS = [[3], [5, 9, 2], list(range(1, 18)), [7] * 40]
NEW, GAMMA = 40, 4
DRAFT = DraftConfig(symmetric_skip(4, 2), GAMMA)
FAIR = PassCosts(0.75, (1, 1.2, 1.3, 1.4, 1.5))
COSTS = {
    "fair": FAIR,
    "dear": PassCosts(30.0, (1, 9, 9, 9, 9)),  # falls back at once
    "free": PassCosts(0.01, (1, 0.9, 0.9, 0.9, 0.9)),  # always drafts
}


@pytest.fixture(scope="module")
def truth() -> list[list[int]]:
    return [greedy_reference(CONFIG, PARAMS, prompt, 23) for prompt in PROMPTS]


def counts(state, prompts=PROMPTS, gamma=GAMMA):
    rows = zip(np.asarray(state.passes), prompts, outputs(state, prompts), strict=True)
    return [statistics(row, len(p), len(out), gamma) for row, p, out in rows]


@pytest.fixture(scope="module")
def plain() -> list[list[int]]:
    return outputs(run(CONFIG, PARAMS, PROMPTS, NEW), PROMPTS)


@pytest.mark.parametrize("name", sampled(list(COSTS), ["fair"]))
def test_greedy_output_is_that_of_plain_decoding_whatever_the_costs(truth, plain, name):
    state = run(CONFIG, PARAMS, PROMPTS, NEW, draft=DRAFT, costs=COSTS[name])
    assert outputs(state, PROMPTS) == plain
    assert [row[:23] for row in plain] == truth
    for row in counts(state):
        # One more where the limit cuts the last iteration: then its bonus is missing.
        assert sum(row.accepted) + row.iterations in (NEW, NEW + 1)
        if name == "free":
            assert row.plain == 0
        if name == "dear":
            assert row.iterations - row.plain == 3  # at 0, 16 and 32 iterations


def oracle_of(plain):
    table = np.zeros((len(PROMPTS), 128), np.int32)
    for b, (prompt, output) in enumerate(zip(PROMPTS, plain, strict=True)):
        table[b, : len(prompt) + NEW] = prompt + output

    def oracle(at, gamma):
        return jax.vmap(lambda row, i: jax.lax.dynamic_slice(row, (i,), (gamma,)))(
            jnp.asarray(table), at
        )

    return oracle


def test_a_liar_falls_back_and_an_oracle_never_does(plain):
    oracle = oracle_of(plain)

    def liar(at, gamma):
        return (oracle(at, gamma) + 1) % CONFIG.vocab_size

    for propose in (oracle, liar):
        options = dict(draft=DRAFT, costs=FAIR, drafter=drafter_of(propose))
        state = run(CONFIG, PARAMS, PROMPTS, NEW, **options)
        assert outputs(state, PROMPTS) == plain
        for row in counts(state):
            if propose is oracle:
                assert row.iterations == NEW // (GAMMA + 1)
                assert row.plain == 0 and row.accepted == (row.iterations,) * GAMMA
            else:  # 12 steps are lost in 10 iterations; and then at 16 and 32
                assert row.iterations == NEW and row.plain == NEW - 12


def test_a_row_drafts_again_when_the_text_becomes_easy():
    """Wrong for 20 tokens, right from then on."""
    (plain,) = outputs(run(CONFIG, PARAMS, PROMPTS[:1], 100), PROMPTS[:1])
    table = jnp.asarray(PROMPTS[0] + plain + [0] * 20, jnp.int32)[None]

    def late(at, gamma):
        right = jax.vmap(lambda i: jax.lax.dynamic_slice(table[0], (i,), (gamma,)))(at)
        return jnp.where(at[:, None] < 21, (right + 1) % CONFIG.vocab_size, right)

    options = dict(draft=DRAFT, costs=FAIR, drafter=drafter_of(late))
    state = run(CONFIG, PARAMS, PROMPTS[:1], 100, **options)
    assert outputs(state, PROMPTS[:1]) == [plain]
    (row,) = counts(state, PROMPTS[:1])
    assert sum(row.accepted) > 40 and row.plain > 10


settle = jax.jit(adaptive.settle)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, GAMMA), min_size=1, max_size=60), st.floats(0.1, 3))
def test_no_more_is_lost_than_the_budget_and_the_attempts(accepted, draft):
    """Against plain decoding, at every moment; and rows that only win never stop drafting."""
    cost = PassCosts(draft, FAIR.verify).iteration(GAMMA)
    budget, gained, lowest, peak, attempts = adaptive.new_budget(1, cost), 0.0, 0.0, 0.0, 0
    for a in accepted:
        drafts = bool(budget.drafting_rows[0])
        attempts += drafts and float(budget.steps[0]) == 0
        accepted_here = jnp.array([a if drafts else 0])
        budget = settle(budget, jnp.array([drafts]), accepted_here, jnp.array([False]))
        gained += a + 1 - cost if drafts else 0
        lowest = min(lowest, gained)
        peak = max(peak, gained)
    assert lowest >= -(12 + cost) - attempts * cost
    assert 0 <= float(budget.steps[0]) <= 12
    assert peak - gained <= 12 + cost * (1 + attempts)
    if min(accepted) + 1 >= cost:
        assert attempts == 0


def test_a_losing_row_drafts_ever_more_rarely():
    budget, drafted = adaptive.new_budget(1, 2.25), []
    for i in range(600):
        drafts = bool(budget.drafting_rows[0])
        drafted += [i] * drafts
        budget = settle(budget, jnp.array([drafts]), jnp.array([0]), jnp.array([False]))
    assert drafted == [*range(10), 16, 32, 64, 128, 256, 384, 512]


@pytest.fixture(scope="module")
def lm() -> LM:
    tuned = Tuning(GAMMA, DRAFT.skip, FAIR.replace(draft=3.0), 0.9)
    return LM(CONFIG, PARAMS, draft_config=DRAFT, tuning=tuned, eos_token_ids=(3,))


@pytest.mark.parametrize("temperature", sampled([0.0, 1.0], [1.0]))
def test_neighbours_do_not_matter_and_streams_give_the_same(lm, temperature):
    """Tokens, iterations, and what was drafted in them; rows differ in length, limit and end."""
    options = dict(temperature=temperature, copies=False)
    limits, seeds = [NEW, 5, 23, 31], [4, 1, 2, 3]
    rows = lm.generate(PROMPTS, max_new_tokens=limits, seed=seeds, **options)
    assert any(row.stats.plain_iterations for row in rows)
    # Where no row drafts, rows copy only if all can. That changes no token.
    copying = lm.generate(PROMPTS, max_new_tokens=limits, seed=seeds, temperature=temperature)
    assert [row.tokens for row in copying] == [row.tokens for row in rows]
    for prompt, limit, seed, row in zip(PROMPTS, limits, seeds, rows, strict=True):
        alone = dict(max_new_tokens=limit, seed=[seed], **options)
        (single,) = lm.generate([prompt], **alone)
        stream = lm.stream_tokens(prompt, **alone)
        assert sum(stream, []) == row.tokens
        for other in (single, stream.result):
            assert other.tokens == row.tokens
            for name in ("iterations", "plain_iterations", "accepted_per_position"):
                assert getattr(other.stats, name) == getattr(row.stats, name)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.exhaustive
def test_a_row_that_waits_at_its_turning_point_spends_nothing(temperature):
    """Its neighbour continues for 30 tokens before the row's keys are computed again."""
    factors = (1.0,) * (CONFIG.head_dim // 2)
    rope = RopeConfig(
        type="longrope", factor=4.0, original_max_position_embeddings=30,
        short_factors=factors, long_factors=tuple(2 * f for f in factors),
    )  # fmt: skip
    config = CONFIG.replace(rope=rope)
    tuned = Tuning(GAMMA, DRAFT.skip, FAIR.replace(draft=1.2), 0.9)
    lm = LM(config, PARAMS, draft_config=DRAFT, tuning=tuned)
    prompts = [[*range(1, 26)], [7, 3]]
    options = dict(max_new_tokens=60, temperature=temperature, copies=False)
    rows = lm.generate(prompts, seed=[1, 2], **options)
    for prompt, seed, row in zip(prompts, [1, 2], rows, strict=True):
        (alone,) = lm.generate([prompt], seed=[seed], **options)
        assert alone.tokens == row.tokens
        assert alone.stats.plain_iterations == row.stats.plain_iterations


@pytest.mark.exhaustive
def test_int8_is_exact_with_and_without_drafts():
    config = CONFIG.replace(quantization="int8", hidden_size=32)
    params = model.init_params(config, jax.random.key(1))
    ar = outputs(run(config, params, PROMPTS, NEW), PROMPTS)
    state = run(config, params, PROMPTS, NEW, draft=DRAFT, costs=FAIR)
    assert outputs(state, PROMPTS) == ar
    assert any(0 < row.plain < row.iterations for row in counts(state))


def test_what_decides(lm):
    """Measured costs only for the settings they were measured with; nothing where it is off."""

    assert registry.choose(lm.target, "s3d").costs == lm.tuning.costs
    # Elsewhere by the layers; on CPUs (these tests') more in float32, and not in 16 bits.
    assert registry.choose(lm.target, "s3d", gamma=3).costs == PassCosts(0.65, (1.0, 1.3, 1.3, 1.3))
    half = LM(CONFIG.replace(dtype="bfloat16"), PARAMS, draft_config=DRAFT)
    assert registry.choose(half.target, "s3d", gamma=3).costs == PassCosts(0.5, (1.0,) * 4)
    assert registry.choose(lm.target, "s3d", adaptive=False).costs is None
    assert registry.choose(lm.target, "self-spec").costs is None
    with pytest.raises(ConfigError, match="no adaptive"):
        registry.choose(lm.target, "self-spec", adaptive=True)
    with pytest.raises(ConfigError, match="True or False"):
        lm.generate([1], adaptive=1)
    (fixed,) = lm.generate(PROMPTS[1], adaptive=False)
    assert fixed.stats.drafted == GAMMA * fixed.stats.iterations
    assert fixed.stats.plain_iterations == 0
    (ar,) = lm.generate(PROMPTS[1], method="ar", adaptive=False)  # the same call, without drafts
    assert ar.tokens == fixed.tokens


@pytest.mark.usefixtures("compiled_here")
@pytest.mark.parametrize("copies", [False, True])
def test_programs_copy_no_cache(copies):
    """Neither in memory nor as an operation: three kinds of iteration share one cache."""
    draft_params, sizes = untrained_draft(CONFIG, PARAMS), []
    settings, features = batch_sampling(
        [SamplingConfig()] * 2, jax.random.split(jax.random.key(0)), 31
    )
    spec = DecodeSpec(CONFIG, S3D(DRAFT), features, copies)
    budget = adaptive.new_budget(2, 2.25)
    for slots in (512, 4096):
        state = begin(spec, [np.arange(3), np.arange(9)], [90, 90], slots, settings, budget=budget)
        arguments = (spec, PARAMS, draft_params, state, jnp.int32(5), 64)
        program = decode_jit.lower(*arguments).compile()
        cache = sum(x.nbytes for x in (*state.cache.keys, *state.cache.values))
        memory = program.memory_analysis()
        assert memory.alias_size_in_bytes >= cache
        assert not re.findall(rf"= f32\[2,2,{slots},10\]\S* copy\(", program.as_text())
        sizes.append(memory.temp_size_in_bytes)
    assert sizes[1] - sizes[0] < cache / 100
