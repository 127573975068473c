"""Warpers, penalties and choices: exact against plain Python, in distribution, by any method."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3d_jax.decoding import sampling
from s3d_jax.decoding.sampling import batch_sampling, warp
from s3d_jax.decoding.state import Proposal
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
from tests.tiny import counted, outputs, run, tiny_config, tiny_params


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


def test_the_same_noise_makes_alike_distributions_choose_alike():
    """Each choice alone is distributed as it must be; both agree more often than a coin decides.

    Two choices by the same noise agree with probability Σ_x 1 / Σ_y max(p_y / p_x, q_y / q_x).
    """
    rng, n, vocab = np.random.default_rng(2), 200_000, 6
    p, q = rng.dirichlet(np.ones(vocab), 2)
    keys = jax.random.split(jax.random.key(0), (n, 1))
    noise = sampling.gumbel_noise(keys, vocab)
    params, features = batch_sampling([SamplingConfig(temperature=1.0)] * n, keys[:, 0], vocab)
    ours, theirs = (
        np.asarray(
            sampling.choose(
                jnp.broadcast_to(jnp.log(jnp.float32(x)), (n, 1, vocab)), params, features, noise
            )
        ).ravel()
        for x in (p, q)
    )
    for chosen, x in ((ours, p), (theirs, q)):
        histogram = np.bincount(chosen, minlength=vocab) / n
        assert (np.abs(histogram - x) <= 4.5 * np.sqrt(x * (1 - x) / n)).all()
    agree = sum(1 / np.maximum(p / p[i], q / q[i]).sum() for i in range(vocab))
    assert agree > np.sum(p * q) + 0.1
    assert abs(np.mean(ours == theirs) - agree) <= 4.5 * np.sqrt(agree * (1 - agree) / n)


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


def sampled_tokens(rows: list[SamplingConfig]) -> np.ndarray:
    """Of plain decoding: int [rows, samples, 3], all in one batch."""
    batch = [row for row in rows for _ in range(SAMPLES)]
    prompts = [PROMPT] * len(batch)
    state = run(CONFIG, PARAMS, prompts, 3, rows=batch, seed=5)
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
def test_plain_decoding_samples_from_the_target(name):
    rows = DISTRIBUTIONS[name]
    for row, tokens in zip(rows, sampled_tokens(rows), strict=True):
        check_distribution(tokens, exact_distribution(row))


# --- the other methods draw what plain decoding draws ---------------------------------------------

SAMPLED = [row for rows in DISTRIBUTIONS.values() for row in rows] * 2
PROMPTS = [[*PROMPT, *range(i % VOCAB)] for i in range(len(SAMPLED))]


class Constant(Drafter):
    """Proposes the same token always."""

    def propose(self, inputs):
        cache = inputs.state.cache
        return Proposal(jnp.full((len(cache.length), self.gamma), 2, jnp.int32), cache)


OTHER = tiny_config(
    **dict(vocab_size=VOCAB, num_layers=1, hidden_size=6, intermediate_size=8),
    **dict(num_heads=1, num_kv_heads=1, head_dim=4),
)
HALF = DraftConfig((False, True, False), gamma=3)
DRAFTERS = {
    "s3d": dict(drafter=S3D, draft=HALF),
    "s3d that falls back": dict(drafter=S3D, draft=HALF, costs=PassCosts(1.3, (1, 1, 1, 1.2))),
    "self-spec": dict(drafter=SelfSpeculative, draft=HALF),
    "prompt-lookup": dict(drafter=PromptLookup, draft=PromptLookupConfig(gamma=3)),
    "two-model": dict(
        drafter=TwoModel,
        draft=TwoModelConfig(OTHER, gamma=3),
        draft_params=tiny_params(OTHER, seed=1, scale=20.0),
    ),
    "the same model": dict(
        drafter=TwoModel, draft=TwoModelConfig(CONFIG, gamma=3), draft_params=PARAMS
    ),
    "a constant": dict(drafter=Constant, draft=HALF),
}


@functools.cache
def drawn_plainly() -> list[list[int]]:
    return outputs(run(CONFIG, PARAMS, PROMPTS, 40, rows=SAMPLED), PROMPTS)


@pytest.mark.parametrize("name", DRAFTERS)
def test_every_method_draws_the_tokens_of_plain_decoding(name):
    """Token for token, from the same keys, whatever is drafted and accepted."""
    state = run(CONFIG, PARAMS, PROMPTS, 40, rows=SAMPLED, **DRAFTERS[name])
    assert outputs(state, PROMPTS) == drawn_plainly()
    iterations, accepted = counted(state, PROMPTS, 3)
    assert accepted.sum() > 0 and iterations.sum() < 40 * len(PROMPTS)
    if name == "the same model":  # which draws the same, so that all is accepted
        assert iterations.tolist() == [10] * len(PROMPTS)


def test_tokens_depend_on_the_seed():
    assert drawn_plainly() != outputs(
        run(CONFIG, PARAMS, PROMPTS, 40, rows=SAMPLED, seed=1), PROMPTS
    )


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
