"""Sums whose bits do not depend on the order: as exact as those of floats, with derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s3d_jax.nn.attention import attention_mix, attention_scores
from s3d_jax.nn.rope import rotary_table, rotate
from s3d_jax.settings.model import RopeConfig
from s3d_jax.weights import exact


def test_softmax_and_norm_have_the_derivatives_of_those_without_rounding():
    """Drafts are trained through them; integers would have none."""
    x, t = jax.random.normal(jax.random.key(0), (2, 4, 192))
    x *= 3

    def rms_norm(x):
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5)

    pairs = ((exact.softmax, jax.nn.softmax), (lambda x: exact.norm(x, 1e-5), rms_norm))
    for ours, plain in pairs:
        gradient, expected = (jax.grad(lambda x, f=f: jnp.sum(f(x) * t))(x) for f in (ours, plain))
        np.testing.assert_allclose(gradient, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("count", [3, 192, 4096, 10_000])
def test_sums_and_norms_are_those_of_numpy(count):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, count)) * 10.0 ** rng.integers(-9, 9, (4, 1))
    x = x.astype(np.float32)
    np.testing.assert_array_equal(exact.row_max(jnp.asarray(x))[:, 0], x.max(axis=1))
    np.testing.assert_array_equal(exact.row_max(jnp.asarray(-np.abs(x)))[:, 0], -np.abs(x).min(1))
    np.testing.assert_array_equal(exact.row_max_abs(jnp.asarray(x))[:, 0], np.abs(x).max(axis=1))
    expected = x / np.sqrt(np.mean(x.astype(np.float64) ** 2, axis=1, keepdims=True) + 1e-12)
    np.testing.assert_allclose(exact.norm(jnp.asarray(x), 1e-12), expected, rtol=1e-5)
    assert not exact.norm(jnp.zeros((2, count)), 1e-6).any()
    scores = jnp.asarray(rng.normal(size=(4, count)) * 4, jnp.float32).at[:, 0].set(-3e38)
    np.testing.assert_allclose(exact.softmax(scores), jax.nn.softmax(scores), atol=1e-7, rtol=5e-5)


def test_a_sink_and_many_small_weights_sum_to_one():
    scores = jnp.full((1, 32_768), -13.2).at[0, 0].set(0)
    expected = jax.nn.softmax(scores)
    weights = np.asarray(exact.softmax(scores), np.float64)
    assert abs(weights.sum() - 1) <= 3e-3
    np.testing.assert_allclose(weights, expected, rtol=3e-3)


def test_an_outlier_does_not_hide_the_others_from_the_norm():
    x = np.random.default_rng(0).normal(size=(3, 4096)).astype(np.float32)
    x[:, 7] = 60, 1000, 4000
    expected = x / np.sqrt(np.mean(x.astype(np.float64) ** 2, axis=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(exact.norm(jnp.asarray(x), 1e-6), expected, rtol=1e-3)
    np.testing.assert_allclose(exact.norm(jnp.asarray(x[:1]), 1e-6), expected[:1], rtol=1e-5)


def test_sums_do_not_depend_on_the_order():
    weights = np.random.default_rng(0).uniform(size=(1, 3000)).astype(np.float32)
    sums = {float(exact.row_sum(jnp.asarray(w), 1.0)[0, 0]) for w in (weights, weights[:, ::-1])}
    assert len(sums) == 1 and abs(sums.pop() / weights.sum(dtype=np.float64) - 1) < 1e-6


@pytest.mark.parametrize("count", [1, 31, 32, 33, 300])
def test_zeros_behind_the_others_change_no_bit_of_a_sum(count):
    """Whatever part of the cache is read."""
    x = np.random.default_rng(count).uniform(size=(400, count)) ** 4
    x[0], x[1] = 0, 1
    run = jax.jit(exact.row_sum, static_argnums=1)
    sums = run(jnp.asarray(x, jnp.float32), 1.0)
    for slots in (320, 512, 8192):
        padded = np.zeros((400, slots), np.float32)
        padded[:, :count] = x
        np.testing.assert_array_equal(run(jnp.asarray(padded), 1.0), sums)


@pytest.mark.parametrize("head_size", [16, 64, 128, 256])
@pytest.mark.parametrize("slots", [192, 1024, 2048])
def test_a_query_gets_the_same_bits_beside_any_number_of_others(head_size, slots):
    """Recent versions of XLA sum long or many rows in another order than few short ones."""
    rng = np.random.default_rng(0)
    values = jnp.asarray(rng.normal(size=(1, 2, slots, head_size)), jnp.float32)
    queries = jnp.asarray(rng.normal(size=(1, 2, 192, head_size)), jnp.float32)
    weights = jnp.asarray(rng.uniform(size=(1, 2, 192, slots)), jnp.float32)
    weights = weights.at[..., slots // 2 :].set(0)  # slots that are not in use yet
    for product, rows in ((attention_scores, queries), (attention_mix, weights)):
        run = jax.jit(functools.partial(product, exact=True))
        alone = np.asarray(run(rows[:, :, :1], values))
        seventh = np.asarray(run(rows[:, :, 6:7], values))
        for count in (2, 3, 7, 12, 20, 32, 40, 56, 64, 192):
            together = np.asarray(run(rows[:, :, :count], values))
            np.testing.assert_array_equal(together[:, :, :1], alone)
            if count >= 7:
                np.testing.assert_array_equal(together[:, :, 6:7], seventh)
    half = slice(slots // 2)
    fewer = run(weights[:, :, :12, half], values[:, :, half])
    np.testing.assert_array_equal(run(weights[:, :, :12], values), fewer)


@pytest.mark.parametrize("head_size", [16, 64, 128])
@pytest.mark.parametrize("heads", [1, 3])
def test_a_token_is_rotated_to_the_same_bits_beside_any_number_of_others(heads, head_size):
    """Of a sum of two products XLA rounds the first before it adds, or the second, or both."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, 24, heads, head_size)), jnp.float32)
    angles = rng.uniform(0, 6, size=(1, 24, head_size // 2))
    tables = jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)
    run = jax.jit(functools.partial(rotate, exact=True))
    together = np.asarray(run(x, *tables))
    for count in (1, 2, 5):
        parts = [slice(start, start + count) for start in range(0, 20, count)]
        alone = [run(x[:, part], *(table[:, part] for table in tables)) for part in parts]
        np.testing.assert_array_equal(np.concatenate(alone, axis=1), together[:, :20])


ROPES = {
    "plain": RopeConfig(),
    "dynamic": RopeConfig("dynamic", factor=3.0, original_max_position_embeddings=8),
    "scaled": RopeConfig(attention_factor=1.1),
}


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("heads", [1, 3])
def test_normed_heads_are_rotated_to_the_same_bits_beside_any_number_of_others(heads, rope):
    """Factors of a norm, angles and a growing base in one program."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, 24, heads, 16)), jnp.float32)
    weight = jnp.asarray(rng.uniform(0.5, 2, size=16), jnp.float32)
    positions = jnp.arange(3, 27)[None]

    @jax.jit
    def run(x, positions):
        tables = rotary_table(ROPES[rope], 16, positions, jnp.ones(1, jnp.int32))
        return rotate(exact.norm(x, 1e-5) * weight, *tables, exact=True)

    together = np.asarray(run(x, positions))
    alone = [run(x[:, i : i + 1], positions[:, i : i + 1]) for i in range(24)]
    np.testing.assert_array_equal(np.concatenate(alone, axis=1), together)
