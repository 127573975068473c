"""Sums and maxima of rows that are the same bits in every program.

XLA sums floats in an order that depends on the shape. Here rows are summed as integers, whose order
does not matter, so that a token gets the same bits alone and in a block of several. Models whose
activations are rounded need this: rounding can turn a difference in the last bit of a float into a
whole step, and the step into another output.
"""

import functools

import jax
import jax.numpy as jnp


def row_max(x: jax.Array) -> jax.Array:
    """The largest of the last axis, float32 [..., n] -> [..., 1]; there must be no NaN.

    Takes a third of the time of XLA's maximum of floats, which looks for NaN.
    """
    largest = jnp.max(_in_order(jax.lax.bitcast_convert_type(x, jnp.int32)), axis=-1, keepdims=True)
    return jax.lax.bitcast_convert_type(_in_order(largest), jnp.float32)


def _in_order(bits: jax.Array) -> jax.Array:
    """Bits of floats <-> integers in the order of the floats."""
    return bits ^ (jnp.right_shift(bits, 31) & 0x7FFFFFFF)


def row_sum(x: jax.Array, bound: float) -> jax.Array:
    """The sum over the last axis, float32 [..., n] -> [..., 1], of numbers from 0 to `bound`.

    Each number is rounded to a multiple of bound / 2^22, so it is off by up to bound / 2^23, and
    their sum by up to n times that; 256 of them fit into an integer. Zeros behind the others
    change nothing.

    Args:
        x: float32 [..., n], n below 2^24.
        bound: a power of two.
    """
    count, unit = x.shape[-1], 2.0**_SUMMED_BITS / bound
    whole = jnp.round(x * unit).astype(jnp.int32)
    if count <= _SUMMED:
        return jnp.sum(whole, axis=-1, keepdims=True).astype(jnp.float32) / unit
    whole = jnp.pad(whole, [(0, 0)] * (x.ndim - 1) + [(0, -count % _SUMMED)])
    whole = jnp.sum(whole.reshape(*x.shape[:-1], -1, _SUMMED), axis=-1)
    high = jnp.sum(jnp.right_shift(whole, _LOW_BITS), axis=-1, keepdims=True)
    low = jnp.sum(whole & (2**_LOW_BITS - 1), axis=-1, keepdims=True)
    # The product is exact, so that it does not matter whether XLA rounds between the two.
    return (high.astype(jnp.float32) * 2.0**_LOW_BITS + low.astype(jnp.float32)) / unit


_SUMMED_BITS, _SUMMED = 22, 256  # what is summed at once comes to 2^30 at most
_LOW_BITS = 15  # of such a sum, so that the sums of both parts over the row fit, too


@jax.custom_jvp
def softmax(x: jax.Array) -> jax.Array:
    """Over the last axis, float32. Its derivative is that of the softmax without rounding.

    The sum, 1 at least, is off by 2^-23 per number, 0.4 % of it at most for 32,768 numbers.
    """
    weights = jnp.exp(x - row_max(x))
    return weights / row_sum(weights, 1.0)


@softmax.defjvp
def _softmax_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    y, (dx,) = softmax(*primals), tangents
    return y, y * (dx - jnp.sum(y * dx, axis=-1, keepdims=True))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def norm(x: jax.Array, eps: float) -> jax.Array:
    """x over the root of its mean square and eps, along the last axis, float32.

    Its derivative is that without rounding. It is computed of x over a power of two, such that the
    largest square is between 1 and 4: their sum is off by 2^-21 per number, 0.2 % of it at most for
    4,096 numbers.

    XLA reorders products of three floats, and may round a product or not before it is added to
    something. So none is added to unless it is exact, by a power of two; and the last one is behind
    a barrier, which is gone before loops are fused, since a norm's scale multiplies it.
    """
    bits = jax.lax.bitcast_convert_type(row_max(jnp.abs(x)), jnp.int32)
    # The power of two below the largest; 1 where that is 0, or where the power below would be none.
    exponent = jnp.right_shift(bits, 23) - 127
    exponent = jnp.where(jnp.abs(exponent) < 60, exponent, 0)
    part, count = x * _power_of_two(-exponent), x.shape[-1]
    total = row_sum(part * part, 4.0) + count * eps * _power_of_two(-2 * exponent)
    return jax.lax.optimization_barrier(part * jax.lax.rsqrt(total / count))


@norm.defjvp
def _norm_jvp(
    eps: float, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    factor = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    y = x * factor
    return norm(x, eps), factor * (dx - y * jnp.mean(y * dx, axis=-1, keepdims=True))


def _power_of_two(exponent: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(jnp.left_shift(exponent + 127, 23), jnp.float32)
