"""Warpers, penalties, and the acceptance rule: exact against plain Python, and in distribution."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3d_jax.decoding import adaptive, sampling
from s3d_jax.decoding.sampling import batch_sampling, warp
from s3d_jax.decoding.step import Proposal
from s3d_jax.drafters.base import Drafter
from s3d_jax.drafters.prompt_lookup import PromptLookup
from s3d_jax.drafters.s3d import S3D
from s3d_jax.drafters.token_by_token import SelfSpeculative
from s3d_jax.drafters.two_model import TwoModel
from s3d_jax.errors import InputError
from s3d_jax.nn.transformer import forward_logits
from s3d_jax.settings.drafting import DraftConfig, PassCosts, PromptLookupConfig, TwoModelConfig
from s3d_jax.settings.sampling import SamplingConfig
from tests.sampled import sampled
from tests.tiny import outputs, run, tiny_config, tiny_params


def reference_distribution(
    logits: np.ndarray, row: SamplingConfig, prompt: list[int], output: list[int]
) -> np.ndarray:
    """What one token is drawn from, in float64 and plain Python, written from the definitions."""
    x = logits.astype(np.float64).copy()
    for token, bias in row.logit_bias:
        x[token] += bias
    for token in set(prompt) | set(output):
        x[token] = (
            x[token] / row.repetition_penalty if x[token] > 0 else x[token] * row.repetition_penalty
        )
    for token in set(output):
        x[token] -= row.frequency_penalty * output.count(token) + row.presence_penalty
    if row.temperature == 0:
        p = np.zeros(len(x))
        p[np.argmax(x)] = 1
        return p
    x /= row.temperature
    if row.top_k:
        x[x < np.sort(x)[::-1][min(row.top_k, len(x)) - 1]] = -np.inf
    p = np.exp(x - x.max())
    p /= p.sum()
    order = np.argsort(-p)
    kept = 0.0
    for token in order:
        if kept >= row.top_p:
            p[token] = 0
        kept += p[token]
    p[p < row.min_p * p.max()] = 0
    return p / p.sum()


ROWS = [
    SamplingConfig(),
    SamplingConfig(temperature=0.7),
    SamplingConfig(temperature=1.0, top_k=4),
    SamplingConfig(temperature=1.5, top_p=0.8),
    SamplingConfig(temperature=0.6, min_p=0.1),
    SamplingConfig(temperature=1.3, top_k=7, top_p=0.9, min_p=0.05),
    SamplingConfig(temperature=2.0, top_k=1),
    SamplingConfig(temperature=1.0, top_k=1000, top_p=1e-6),
]


def test_warp_against_the_definitions():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (len(ROWS), 5, 40)).astype(np.float32)
    params, features = batch_sampling(ROWS, jax.random.split(jax.random.key(0), len(ROWS)), 40)
    probs = np.asarray(jax.nn.softmax(warp(jnp.asarray(logits), params, features), axis=-1))
    for b, row in enumerate(ROWS):
        for t in range(5):
            expected = reference_distribution(logits[b, t], row, [], [])
            assert ((probs[b, t] > 0) == (expected > 0)).all(), row
            np.testing.assert_allclose(probs[b, t], expected, atol=1e-6)


EXTREME = {
    "greedy but for ties": SamplingConfig(temperature=1e-44),
    "all as likely": SamplingConfig(temperature=1e30),
    "top-1 by top-p": SamplingConfig(temperature=1.0, top_p=1e-44),
    "top-1 by min-p": SamplingConfig(temperature=1e-30, min_p=1.0),
    "nothing filtered": SamplingConfig(temperature=1.0, min_p=1e-320, top_p=1 - 1e-12),
}


@pytest.mark.filterwarnings("error")  # numpy's, of numbers that float32 cannot hold
@pytest.mark.parametrize("name", EXTREME)
def test_extreme_settings_stay_what_they_say(name):
    """The smallest and largest values reach their limits: one token, or all of them."""
    row = EXTREME[name]
    logits = np.random.default_rng(0).normal(0, 3, (1, 2, 40)).astype(np.float32)
    logits[0, :, 3] = -np.inf  # forbidden by a bias
    params, features = batch_sampling([row], jax.random.split(jax.random.key(0), 1), 40)
    probs = np.asarray(jax.nn.softmax(warp(jnp.asarray(logits), params, features), axis=-1))
    for t in range(2):
        finite = np.isfinite(logits[0, t])
        if name == "all as likely":
            expected = finite / finite.sum()
        elif name == "nothing filtered":
            expected = np.exp(logits[0, t]) / np.exp(logits[0, t]).sum()
        else:
            expected = np.arange(40) == logits[0, t].argmax()
        np.testing.assert_allclose(probs[0, t], expected, atol=1e-6)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "row",
    [
        SamplingConfig(presence_penalty=1e30, frequency_penalty=1e30, repetition_penalty=1e6),
        SamplingConfig(frequency_penalty=-1e30, repetition_penalty=1e-6, temperature=1e-44),
        SamplingConfig(presence_penalty=-1e30, top_p=1e-44, temperature=1e30),
    ],
)
@pytest.mark.parametrize("bias", [-1e30, 0.0, 1e30])
def test_the_largest_penalties_make_no_nan(row, bias):
    row = row.replace(logit_bias=tuple((token, bias) for token in range(1, 12)))
    params, features = batch_sampling([row], jax.random.split(jax.random.key(0), 1), 12)
    logits = jnp.linspace(-9, 9, 12)[None, None] + params.logit_bias[:, None]
    counts = jnp.where(jnp.arange(12) % 2, 100_000, 0)[None, None]
    logits = sampling.penalize(logits, params, jnp.ones((1, 12), bool), counts)
    assert np.isfinite(np.asarray(logits)).all()
    probs = np.asarray(jax.nn.softmax(warp(logits, params, features), axis=-1))
    assert probs.sum() == pytest.approx(1)
    assert probs[0, 0, np.asarray(logits)[0, 0].argmax()] == probs.max() > 0


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-50, 50, width=32), min_size=9, max_size=9),
    k=st.integers(1, 9),
)
def test_threshold_keeps_exactly_the_largest(values, k):
    """Also with ties, zeros of both signs and negative numbers."""
    x = np.asarray(values, np.float32)
    keep = sampling._keep_largest(jnp.asarray(x)[None], lambda m: jnp.sum(m, axis=-1) >= k)[0]
    border = np.sort(x)[::-1][k - 1]
    keep = np.asarray(keep)
    assert keep[x > border].all() and not keep[x < border].any()
    assert keep.sum() >= k


def test_penalties_against_the_definitions():
    rng = np.random.default_rng(1)
    vocab, output = 12, [3, 3, 5, 7]
    rows = [
        SamplingConfig(repetition_penalty=1.4),
        SamplingConfig(presence_penalty=0.7, frequency_penalty=0.3),
        SamplingConfig(repetition_penalty=0.8, frequency_penalty=-0.5),
    ]
    logits = rng.normal(0, 2, (3, 1, vocab)).astype(np.float32)
    params, features = batch_sampling(rows, jax.random.split(jax.random.key(0), 3), vocab)
    assert features.penalized and not features.sampled
    prompt = np.zeros((3, vocab), bool)
    prompt[:, [1, 5]] = True
    counts = np.broadcast_to(np.bincount(output, minlength=vocab), (3, 1, vocab))
    ours = np.asarray(sampling.penalize(jnp.asarray(logits), params, prompt, jnp.asarray(counts)))
    for b, row in enumerate(rows):
        # at temperature 1 the reference returns the softmax; compare in that space
        expected = reference_distribution(
            logits[b, 0], row.replace(temperature=1.0), [1, 5], output
        )
        np.testing.assert_allclose(jax.nn.softmax(ours[b, 0]), expected, atol=1e-6)


@pytest.mark.parametrize("hostile", [False, True])
def test_acceptance_rule_yields_the_target_distribution(hostile):
    """One position: accepted draft or bonus is distributed as p, and α = Σ min(p, q)."""
    rng = np.random.default_rng(2)
    n, vocab = 200_000, 6
    p = rng.dirichlet(np.ones(vocab)).astype(np.float32)
    q = rng.dirichlet(np.ones(vocab) * 0.3).astype(np.float32)
    if hostile:  # proposes what the target never says
        p[:2] = 0
        p /= p.sum()
        q[:] = [0.6, 0.4, 0, 0, 0, 0]
    keys = jax.random.split(jax.random.key(0), n)
    draw, accept_keys, bonus_keys = (
        jax.vmap(lambda k, i=i: jax.random.fold_in(k, i))(keys) for i in range(3)
    )
    draft = sampling.categorical(draw, jnp.broadcast_to(jnp.log(q), (n, 1, vocab)))
    target = jnp.broadcast_to(p, (n, 2, vocab))
    accepted, bonus = sampling.accept_sampled(
        draft, jnp.broadcast_to(q, (n, 1, vocab)), target, accept_keys, bonus_keys
    )
    first = np.where(np.asarray(accepted) > 0, np.asarray(draft)[:, 0], np.asarray(bonus))
    histogram = np.bincount(first, minlength=vocab) / n
    sigma = np.sqrt(p * (1 - p) / n)
    assert (np.abs(histogram - p) <= 4.5 * sigma + 1e-12).all()
    alpha = np.minimum(p, q).sum()
    assert (
        abs(np.mean(np.asarray(accepted)) - alpha) <= 4.5 * np.sqrt(alpha * (1 - alpha) / n) + 1e-12
    )


# --- the whole decoder in distribution ------------------------------------------------------------

VOCAB = 6
CONFIG = tiny_config(
    vocab_size=VOCAB,
    num_layers=3,
    hidden_size=8,
    intermediate_size=12,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
)
PARAMS = tiny_params(CONFIG, seed=3, scale=20.0)
PROMPT = [1, 4, 2]
SAMPLES = 25_600


def exact_distribution(row: SamplingConfig) -> np.ndarray:
    """Probability of each of the V³ first three tokens, from the model's logits."""
    pairs = np.array([[*PROMPT, a, b] for a, b in itertools.product(range(VOCAB), repeat=2)])
    logits = np.asarray(forward_logits(CONFIG, PARAMS, jnp.asarray(pairs)))
    joint = np.zeros((VOCAB,) * 3)
    for i, (a, b) in enumerate(itertools.product(range(VOCAB), repeat=2)):
        first = reference_distribution(logits[i, 2], row, PROMPT, [])
        second = reference_distribution(logits[i, 3], row, PROMPT, [a])
        joint[a, b] = (
            first[a] * second[b] * reference_distribution(logits[i, 4], row, PROMPT, [a, b])
        )
    assert abs(joint.sum() - 1) < 1e-9
    return joint


def sampled_tokens(rows: list[SamplingConfig], drafter=S3D, draft=None, **other) -> np.ndarray:
    """int [rows, samples, 3], all in one batch."""
    batch = [row for row in rows for _ in range(SAMPLES)]
    prompts = [PROMPT] * len(batch)
    draft = draft or DraftConfig((False, True, False), gamma=3)
    options = dict(draft=draft, rows=batch, seed=5, drafter=drafter, **other)
    state = run(CONFIG, PARAMS, prompts, 3, **options)
    return np.array(outputs(state, prompts)).reshape(len(rows), SAMPLES, 3)


def check_distribution(tokens: np.ndarray, exact: np.ndarray) -> None:
    """Total variation must fall like 1/√n, as it does for an exact sampler.

    The distance of an exact sampler is simulated: it scatters widely for distributions of a few
    likely cells. The bound is five standard deviations; a correct sampler fails once in 10⁵ checks.
    """
    rng = np.random.default_rng(0)
    for first in (1, 2, 3):  # tokens looked at: few cells show a small error, many where it is
        p = exact.sum(axis=tuple(range(first, 3))).ravel()
        for n in (SAMPLES // 16, SAMPLES // 4, SAMPLES):
            flat = np.ravel_multi_index(tuple(tokens[:n, :first].T), exact.shape[:first])
            ours = np.bincount(flat, minlength=p.size)
            histograms = np.vstack([ours, rng.multinomial(n, p, 500)])
            distance, *noise = 0.5 * np.abs(histograms / n - p).sum(axis=1)
            bound = np.mean(noise) + 5 * np.std(noise) + 1e-9
            assert distance <= bound, (first, n, distance, np.mean(noise))


DISTRIBUTIONS = {
    "temperature": [SamplingConfig(temperature=t) for t in (0.6, 1.0, 1.5)],
    "filters": [
        SamplingConfig(temperature=t, **kind)
        for t in (0.6, 1.0, 1.5)
        for kind in ({"top_k": 3}, {"top_p": 0.75}, {"min_p": 0.15})
    ],
    "penalties, bias and greedy rows": [
        SamplingConfig(),
        SamplingConfig(temperature=1.0, repetition_penalty=1.5),
        SamplingConfig(temperature=1.5, presence_penalty=0.8, frequency_penalty=0.6),
        SamplingConfig(temperature=0.6, top_p=0.9, logit_bias=((0, 1.0), (2, -np.inf))),
        SamplingConfig(frequency_penalty=1.2),
    ],
}


@pytest.mark.parametrize("name", sampled(list(DISTRIBUTIONS), ["penalties, bias and greedy rows"]))
def test_s3d_samples_from_the_target(name):
    rows = DISTRIBUTIONS[name]
    for row, tokens in zip(rows, sampled_tokens(rows), strict=True):
        check_distribution(tokens, exact_distribution(row))


def test_hostile_drafts_do_not_bend_the_distribution():
    """A constant draft, and one that is sampled from a wrong distribution."""
    rows = [SamplingConfig(temperature=1.0), SamplingConfig(temperature=0.6, top_k=3)]

    class Constant(Drafter):
        def propose(self, inputs):
            cache = inputs.state.cache
            tokens = jnp.full((len(cache.length), self.gamma), 2, jnp.int32)
            return Proposal(tokens, None, cache)

    class Skewed(Drafter):
        def propose(self, inputs):
            cache, keys = inputs.state.cache, inputs.state.sampling.keys
            shape = (len(cache.length), self.gamma, VOCAB)
            logits = jnp.broadcast_to(jnp.array([3.0, 0, -3, 2, 0, 1]), shape)
            keys = jax.vmap(lambda k, n: jax.random.fold_in(k, n + 1000))(keys, cache.length)
            return Proposal(sampling.categorical(keys, logits), logits, cache)

    for drafter in (Constant, Skewed):
        for row, tokens in zip(rows, sampled_tokens(rows, drafter), strict=True):
            check_distribution(tokens, exact_distribution(row))


def test_falling_back_and_drafting_again_do_not_bend_the_distribution(monkeypatch):
    """Rows draft or not by what was accepted before, in one batch; half of the time they do."""
    monkeypatch.setattr(adaptive, "_CAPACITY", 1.0)
    monkeypatch.setattr(adaptive, "_FIRST_PAUSE", 2)
    rows = [SamplingConfig(temperature=1.0), SamplingConfig(temperature=0.6, top_k=3)]
    draft = DraftConfig((False, True, False), gamma=1)
    tokens = sampled_tokens(rows, draft=draft, costs=PassCosts(1.0, (1, 1.0)))
    for row, drawn in zip(rows, tokens, strict=True):
        check_distribution(drawn, exact_distribution(row))


OTHER = tiny_config(
    **dict(vocab_size=VOCAB, num_layers=1, hidden_size=6, intermediate_size=8),
    **dict(num_heads=1, num_kv_heads=1, head_dim=4),
)
DRAFTERS = {
    "self-spec": (SelfSpeculative, DraftConfig((False, True, False), gamma=3), None),
    "prompt-lookup": (PromptLookup, PromptLookupConfig(gamma=3), None),
    "two-model, the same": (TwoModel, TwoModelConfig(CONFIG, gamma=3), PARAMS),
    "two-model, another": (
        TwoModel,
        TwoModelConfig(OTHER, gamma=3),
        tiny_params(OTHER, seed=1, scale=20.0),
    ),
}


@pytest.mark.parametrize("name", sampled(list(DRAFTERS), ["two-model, another"]))
def test_other_methods_sample_from_the_target(name):
    """What a draft token was drawn from depends on those before it, also by penalties."""
    drafter, draft, params = DRAFTERS[name]
    rows = [
        SamplingConfig(temperature=1.0, top_p=0.9),
        SamplingConfig(temperature=1.5, presence_penalty=0.8, repetition_penalty=1.3),
    ]
    tokens = sampled_tokens(rows, drafter, draft, draft_params=params)
    for row, drawn in zip(rows, tokens, strict=True):
        check_distribution(drawn, exact_distribution(row))


def test_the_check_itself_notices_a_small_error():
    """A sampler that is 2 % off (in total variation) must fail, or the above proves nothing."""
    row = SamplingConfig(temperature=1.0)
    exact = exact_distribution(row)
    rng = np.random.default_rng(0)

    def draw(p):
        flat = rng.choice(exact.size, SAMPLES, p=p.ravel())
        return np.stack(np.unravel_index(flat, exact.shape), axis=1)

    check_distribution(draw(exact), exact)
    wrong = exact * np.where(np.arange(VOCAB) % 2, 1.06, 0.94)[:, None, None]
    with pytest.raises(AssertionError):
        check_distribution(draw(wrong / wrong.sum()), exact)


def test_bias_outside_the_vocabulary_is_refused():
    with pytest.raises(InputError, match="token 9"):
        batch_sampling(
            [SamplingConfig(logit_bias=((9, 1.0),))], jax.random.split(jax.random.key(0), 1), 9
        )
