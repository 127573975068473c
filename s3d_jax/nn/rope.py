"""Rotary position embedding (Su et al., arXiv 2104.09864), in float32."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from s3d_jax.settings.model import RopeConfig
from s3d_jax.weights.exact import settled

Rotary = tuple[jax.Array, jax.Array]  # cosines and sines of a pass, see `rotary_table`


def inverse_frequencies(rope: RopeConfig, head_dim: int, *, long: bool = False) -> np.ndarray:
    """Radians per position of each rotated pair, float32 [R/2], R = head_dim · rotary_fraction.

    Steps and roundings follow HF: at position 100,000 the last bit of a frequency makes 0.01
    radians. The power is rounded correctly here; torch rounds a few pairs otherwise.

    Args:
        rope: the settings. For "dynamic" the result is unscaled; `rotary_table` adds the growth
            with the sequence.
        head_dim: H.
        long: "longrope" only: frequencies for sequences past `original_max_position_embeddings`.
    """
    rotary_dim = int(head_dim * rope.rotary_fraction)
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    wavelengths = (np.float64(rope.theta) ** exponents.astype(np.float64)).astype(np.float32)
    if rope.type == "longrope":
        factors = rope.long_factors if long else rope.short_factors
        wavelengths *= np.asarray(factors, np.float32)
    frequencies = np.float32(1.0) / wavelengths
    if rope.type == "linear":
        return frequencies / np.float32(rope.factor)
    if rope.type == "llama3":
        # Llama 3.1: wavelengths that never completed a turn inside the original context are
        # stretched by `factor`, short ones are left alone, and between the two limits the frequency
        # is interpolated.
        original = rope.original_max_position_embeddings
        assert original is not None  # RopeConfig checks it
        low, high = np.float32(rope.low_freq_factor), np.float32(rope.high_freq_factor)
        turns = np.float32(original) / (np.float32(2 * math.pi) / frequencies)
        smooth = np.clip((turns - low) / (high - low), np.float32(0), np.float32(1))
        return (1 - smooth) * frequencies / np.float32(rope.factor) + smooth * frequencies
    if rope.type == "yarn":
        ramp = _yarn_ramp(rope, rotary_dim)
        stretched = np.float32(1.0) / (np.float32(rope.factor) * wavelengths)
        return stretched * ramp + frequencies * (1 - ramp)
    return frequencies


def _yarn_ramp(rope: RopeConfig, rotary_dim: int) -> np.ndarray:
    """How much of each pair's frequency is stretched, float32 [R/2] from 0 to 1."""
    original = rope.original_max_position_embeddings
    assert original is not None  # RopeConfig checks it
    # The pairs, as real numbers, that make so many turns within the original context.
    fast, slow = (
        rotary_dim * math.log(original / (2 * math.pi * turns)) / (2 * math.log(rope.theta))
        for turns in (rope.beta_fast, rope.beta_slow)
    )
    first, last = max(math.floor(fast), 0), min(math.ceil(slow), rotary_dim - 1)
    width = max(last - first, 0.001)  # one pair: a step
    ramp = (np.arange(rotary_dim // 2, dtype=np.float32) - np.float32(first)) / np.float32(width)
    return np.clip(ramp, np.float32(0), np.float32(1))


def rotary_table(
    rope: RopeConfig, head_dim: int, positions: jax.Array, prompt_length: jax.Array
) -> Rotary:
    """Cosines and sines for the given positions.

    Args:
        rope: the settings.
        head_dim: H.
        positions: int [B, T], counted from 0.
        prompt_length: int [B], tokens in each row's prompt. Two types depend on it. "dynamic": the
            base depends on the length of the sequence. A prompt is rotated for its whole length, a
            generated token at p for p + 1, as in token-by-token decoding; so a block of several
            tokens gets the same keys. "longrope": a row whose prompt is longer than the original
            length uses the long factors, every other row the short ones.

    Returns:
        (cos, sin), each float32 [B, T, R/2].
    """
    frequencies: jax.Array | np.ndarray = inverse_frequencies(rope, head_dim)
    original = rope.original_max_position_embeddings
    if rope.type == "dynamic":
        assert original is not None  # RopeConfig checks it
        rotary_dim = 2 * frequencies.shape[0]
        length = jnp.maximum(jnp.maximum(positions + 1, prompt_length[:, None]), original)
        growth = settled(rope.factor * length.astype(jnp.float32) / original) - (rope.factor - 1)
        base = rope.theta * growth ** (rotary_dim / (rotary_dim - 2))
        exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
        frequencies = 1.0 / base[..., None] ** exponents
    if rope.type == "longrope":
        assert original is not None  # RopeConfig checks it
        is_long = (prompt_length > original)[:, None, None]
        frequencies = jnp.where(
            is_long, inverse_frequencies(rope, head_dim, long=True), frequencies
        )
    angles = settled(positions[..., None].astype(jnp.float32) * frequencies)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if rope.attention_factor != 1.0:
        cos, sin = cos * rope.attention_factor, sin * rope.attention_factor
    return settled(cos), settled(sin)


def same_keys(rope: RopeConfig, before: int, after: int) -> bool:
    """Whether a common beginning has the same keys in two prompts of these lengths.

    Args:
        rope: the settings.
        before, after: tokens of the two prompts; see `rotary_table`.
    """
    original = rope.original_max_position_embeddings
    if rope.type == "dynamic":
        return max(before, after) <= original  # type: ignore[operator]  # RopeConfig checks it
    return rope.turning_point is None or (before > original) == (after > original)  # type: ignore[operator]


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, exact: bool = False) -> jax.Array:
    """Rotates the leading R entries of each head, first half against second half (the HF layout).

    Args:
        x: [B, T, heads, H].
        cos, sin: float32 [B, T, R/2].
        exact: a token's result has the same bits for any T (weights/exact.py).

    Returns:
        The rotated heads, in the shape and dtype of `x`.
    """
    half = cos.shape[-1]
    pairs = x[..., : 2 * half].astype(jnp.float32).reshape(*x.shape[:-1], 2, half)
    cos, sin = cos[:, :, None, None], jnp.stack([-sin, sin], axis=-2)[:, :, None]
    # Exchanging the halves instead of joining two rotated ones lets XLA vectorise it on CPUs.
    # Settled before as well: XLA might multiply the tables by the factors of a norm first.
    pairs = settled(pairs) if exact else pairs
    first, second = pairs * cos, jnp.flip(pairs, axis=-2) * sin
    rotated = settled(first) + settled(second) if exact else first + second
    rotated = rotated.reshape(*x.shape[:-1], 2 * half).astype(x.dtype)
    if 2 * half == x.shape[-1]:
        return rotated
    return jnp.concatenate([rotated, x[..., 2 * half :]], axis=-1)
