"""Logits processors, warpers, choice and acceptance: pure functions of arrays and keys.

Letters: B batch, T positions of a block, γ draft tokens, V vocabulary. All arithmetic is float32.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from s3d_jax.errors import InputError
from s3d_jax.jax_settings import under_usual_jax_settings
from s3d_jax.mesh import DATA, constrained
from s3d_jax.nn.largest import largest
from s3d_jax.settings.sampling import SamplingConfig
from s3d_jax.weights.exact import settled


@dataclasses.dataclass(frozen=True)
class SamplingFeatures:
    """Static: which parts of the sampling code a batch needs. Unused parts are not compiled.

    Attributes:
        sampled: some row has a temperature above 0.
        filtered: some row uses top-k, top-p or min-p.
        penalized: some row uses a penalty (the state then carries token counts).
        biased: some row uses a logit bias.
    """

    sampled: bool = False
    filtered: bool = False
    penalized: bool = False
    biased: bool = False


class SamplingParams(flax.struct.PyTreeNode):
    """One SamplingConfig per row, as arrays [B], so that new values compile nothing.

    Attributes:
        keys: typed PRNG keys [B].
        logit_bias: float32 [B, V], or [B, 0] where no row has one.
        others: as in SamplingConfig, rounded to float32 but never to 0.
    """

    keys: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    presence_penalty: jax.Array
    frequency_penalty: jax.Array
    logit_bias: jax.Array


@under_usual_jax_settings
def batch_sampling(
    rows: Sequence[SamplingConfig], keys: jax.Array, vocab_size: int
) -> tuple[SamplingParams, SamplingFeatures]:
    """Stacks the rows' settings.

    Args:
        rows: B settings.
        keys: typed PRNG keys [B].
        vocab_size: V.

    Raises:
        InputError: a logit bias names a token outside the vocabulary.
    """
    biased = any(row.logit_bias for row in rows)
    bias = np.zeros((len(rows), vocab_size if biased else 0), np.float32)
    for i, row in enumerate(rows):
        for token, value in row.logit_bias:
            if token >= vocab_size:
                raise InputError(f"logit_bias names token {token}; the vocabulary has {vocab_size}")
            bias[i, token] = value
        if biased and np.isneginf(bias[i]).all():
            raise InputError("logit_bias forbids every token of the vocabulary")
    features = SamplingFeatures(
        sampled=any(row.temperature > 0 for row in rows),
        filtered=any(
            row.temperature > 0 and (row.top_k > 0 or row.top_p < 1 or row.min_p > 0)
            for row in rows
        ),
        penalized=any(
            (row.repetition_penalty, row.presence_penalty, row.frequency_penalty) != (1.0, 0.0, 0.0)
            for row in rows
        ),
        biased=biased,
    )

    names = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty")
    columns = {
        name: np.asarray([_to_float32(getattr(row, name)) for row in rows], np.float32)
        for name in (*names, "frequency_penalty")
    }
    columns["top_k"] = np.asarray([min(row.top_k, vocab_size) for row in rows], np.int32)
    columns["logit_bias"] = bias
    return SamplingParams(keys=keys, **jax.device_put(columns)), features


def _to_float32(value: float) -> float:
    """Small values become the smallest normal float32, since XLA takes smaller ones for 0.

    0 has a meaning of its own: a temperature of 0 is greedy, a top_p of 0 would keep nothing.
    """
    smallest = float(np.finfo(np.float32).tiny)
    return math.copysign(max(abs(value), smallest), value) if value else 0.0


# --- processors: what the target's distribution is, before it is warped ---------------------------


def penalize(
    logits: jax.Array, params: SamplingParams, prompt_tokens: jax.Array, output_counts: jax.Array
) -> jax.Array:
    """Repetition, frequency and presence penalties.

    Args:
        logits: float32 [B, T, V].
        params: the rows' settings.
        prompt_tokens: bool [B, V], tokens of the prompt.
        output_counts: int32 [B, T, V], occurrences in the output before each position.
    """
    in_output = output_counts > 0
    repeated = in_output | prompt_tokens[:, None, :]
    repetition = params.repetition_penalty[:, None, None]
    scaled = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(repeated, scaled, logits)
    logits = logits - settled(params.frequency_penalty[:, None, None] * output_counts)
    return logits - params.presence_penalty[:, None, None] * in_output


# --- warpers: temperature, top-k, top-p, min-p ----------------------------------------------------


def _keep_largest(logits: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The smallest set {x >= t} of the largest logits that is `enough`; everything if none is.

    Finds the threshold by bisection over the bit pattern of float32, exact after 32 steps. Sorting
    the vocabulary gives the same set, and is several times slower on CPU and GPU.

    Args:
        logits: float32 [..., V].
        enough: bool mask [..., V] -> bool [...], monotone: a larger set stays enough.

    Returns:
        bool [..., V].
    """
    bits = jax.lax.bitcast_convert_type(logits, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    order = jnp.where(
        bits & sign, ~bits, bits | sign
    )  # unsigned integers in the order of the floats

    def halve(i: jax.Array, threshold: jax.Array) -> jax.Array:
        candidate = threshold | (sign >> i.astype(jnp.uint32))
        return jnp.where(enough(order >= candidate[..., None]), candidate, threshold)

    threshold = jax.lax.fori_loop(0, 32, halve, jnp.zeros(logits.shape[:-1], jnp.uint32))
    return order >= threshold[..., None]


def warp(logits: jax.Array, params: SamplingParams, features: SamplingFeatures) -> jax.Array:
    """Temperature, then top-k, top-p and min-p; a greedy row becomes a one-hot distribution.

    Args:
        logits: float32 [B, T, V].
        params, features: the rows' settings.

    Returns:
        float32 [B, T, V]; their softmax is exactly what is sampled from.
    """
    greedy = params.temperature[:, None] == 0
    best = largest(logits)
    # Below their largest, so that no temperature makes them overflow.
    x = logits - jnp.max(logits, axis=-1, keepdims=True)
    x = x / jnp.where(greedy, 1.0, params.temperature[:, None])[..., None]
    if features.filtered:
        top_k, top_p = params.top_k[:, None], params.top_p[:, None]
        keep = _keep_largest(x, lambda kept: jnp.sum(kept, axis=-1) >= top_k)
        x = jnp.where(keep | (top_k == 0)[..., None], x, -jnp.inf)
        probs = jax.nn.softmax(x, axis=-1)
        keep = _keep_largest(x, lambda kept: jnp.sum(probs, axis=-1, where=kept) >= top_p)
        x = jnp.where(keep | (top_p >= 1)[..., None], x, -jnp.inf)
        ratio = jnp.exp(x)  # to the most likely token, which is at 0 and always kept
        x = jnp.where(ratio >= params.min_p[:, None, None], x, -jnp.inf)
    one_hot = jnp.arange(logits.shape[-1]) == best[..., None]
    return jnp.where(greedy[..., None], jnp.where(one_hot, 0.0, -jnp.inf), x)


# --- choice and acceptance ------------------------------------------------------------------------


def gumbel_noise(keys: jax.Array, vocab_size: int) -> jax.Array:
    """Noise that makes the largest of logits a draw from their softmax (the Gumbel-max trick).

    Args:
        keys: typed PRNG keys [...].
        vocab_size: V.

    Returns:
        float32 [..., V].
    """
    # Not by `jax.random.gumbel`, which depends on `jax_high_dynamic_range_gumbel`.
    smallest = jnp.finfo(jnp.float32).tiny
    uniform = jax.vmap(
        lambda key: jax.random.uniform(key, (vocab_size,), jnp.float32, minval=smallest)
    )(keys.ravel())
    return -jnp.log(-jnp.log(uniform)).reshape(*keys.shape, vocab_size)


def choose(
    logits: jax.Array,
    params: SamplingParams,
    features: SamplingFeatures,
    noise: jax.Array | None,
) -> jax.Array:
    """The token of each position: the most likely one, or a draw where a row is sampled.

    Args:
        logits: float32 [B, T, V].
        params, features: the rows' settings.
        noise: float32 [B, T, V], from `gumbel_noise`; None where no row is sampled.

    Returns:
        int32 [B, T].
    """
    return largest(scores(logits, params, features, noise))


def scores(
    logits: jax.Array,
    params: SamplingParams,
    features: SamplingFeatures,
    noise: jax.Array | None,
) -> jax.Array:
    """What `choose` takes the largest of, float32 [B, T, V]."""
    if noise is None:
        return logits
    # Whole on each device of a mesh, so that sums over the vocabulary are those of one device.
    return warp(constrained(logits, DATA), params, features) + noise


def accept(
    draft: jax.Array, target: jax.Array, drafting_rows: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The longest prefix of the draft that the target chose itself.

    Args:
        draft: int [B, γ].
        target: int [B, γ+1], the target's choice at each position.
        drafting_rows: bool [B], rows that use their draft; the others take one target token. None
            is all.

    Returns:
        (accepted, bonus): int [B] in 0 … γ, and the target's token after the accepted prefix, int
        [B].
    """
    gamma = draft.shape[1]
    ok = draft == target[:, :gamma]
    if drafting_rows is not None:
        ok &= drafting_rows[:, None]
    accepted = jnp.sum(jnp.cumprod(ok, axis=1, dtype=jnp.int32), axis=1)
    bonus = jnp.take_along_axis(target, accepted[:, None], axis=1)[:, 0]
    return accepted, bonus
