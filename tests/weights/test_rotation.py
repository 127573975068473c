"""Rotations are products with Hadamard matrices, exact for whole numbers in any program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import hadamard

from s3d_jax.weights import int8
from s3d_jax.weights.rotation import block_of, rotate, rotate_rounded

WIDTHS = {1: 1, 577: 1, 24: 8, 64: 64, 128: 128, 576: 64, 1536: 512, 2048: 512}


@pytest.mark.parametrize("width", WIDTHS)
def test_blocks_are_multiplied_by_hadamard_s_matrix(width):
    block = block_of(width)
    assert block == WIDTHS[width]
    largest = 2**24 // block
    x = np.random.default_rng(0).integers(-largest, largest + 1, (5, width)).astype(np.float32)
    x[0] = largest  # the largest sum that there can be
    x[1] = np.tile(hadamard(block)[-1], width // block) * largest
    expected = (x.reshape(5, -1, block).astype(np.int64) @ hadamard(block)).reshape(5, width)
    np.testing.assert_array_equal(rotate(x), expected)
    np.testing.assert_array_equal(jax.jit(rotate)(x), expected)
    twice = rotate(rotate(np.sign(x)))
    np.testing.assert_array_equal(twice, block * np.sign(x))


@pytest.mark.parametrize("width", [577, 576, 1536])
def test_rounded_rows_are_near_and_within_the_exact_range(width):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(9, width)).astype(np.float32) * np.exp(rng.normal(size=(9, 1)) * 9)
    x = np.concatenate([x, 2.0**100 * x[:1] / np.abs(x[:1]).max(), np.zeros_like(x[:1])])
    x = x.astype(np.float32)
    whole, unit = map(np.asarray, jax.jit(rotate_rounded)(x))
    assert (whole == np.rint(whole)).all() and np.abs(whole).max() <= 2**24
    expected = rotate(x.astype(np.float64))
    length = np.linalg.norm(expected, axis=1, keepdims=True)
    assert (np.abs(whole * unit.astype(np.float64) - expected) <= length * 2.0**-12).all()
    assert not whole[-1].any()
    for rows in (1, 2, 5):
        few, units = jax.jit(rotate_rounded)(x[:rows])
        np.testing.assert_array_equal(few, whole[:rows])
        np.testing.assert_array_equal(units, unit[:rows])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_stays_none(value):
    x = jnp.ones((2, 128)).at[1, 3].set(value)
    whole, unit = rotate_rounded(x)
    y = np.asarray(whole * unit)
    assert not np.isfinite(y[1]).any() and np.isfinite(y[0]).all()


def test_tiny_rows_become_small_numbers_or_zeros():
    for largest in (1e-45, 1e-38, 1e-30):
        whole, unit = rotate_rounded(jnp.full((1, 64), largest))
        np.testing.assert_allclose(whole[0, 0] * unit[0], 64 * largest, rtol=0.01, atol=1e-36)


@pytest.mark.parametrize("outputs, inputs", [(960, 576), (3072, 576), (576, 1536), (8192, 577)])
def test_a_product_is_the_same_bits_alone_and_in_a_block(outputs, inputs):
    """The sizes of a real model, whose products are folded, padded or turned around."""
    rng = np.random.default_rng(2)
    weight, scale = map(jnp.asarray, int8.quantize(rng.normal(size=(outputs, inputs)), True))
    norm = jnp.asarray(rng.normal(1, 0.2, inputs), jnp.float32)
    x = jnp.asarray(rng.normal(size=(33, inputs)), jnp.float32).at[:, 5].mul(90)

    @jax.jit
    def product(x):  # a factor before, an activation behind, as in a layer
        return jax.nn.silu(int8.multiply(x * norm, weight, scale, jnp.float32, True))

    whole = np.asarray(product(x))
    for rows in (1, 2, 3, 4, 5, 7, 8, 9, 16):
        np.testing.assert_array_equal(product(x[:rows]), whole[:rows])
