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
    """The largest number of the last axis, float32 [..., n] -> [..., 1]. NaN is not allowed.

    Takes a third of the time of XLA's maximum of floats, which checks for NaN.
    """
    bits = _in_order(jax.lax.bitcast_convert_type(x, jnp.int32))
    return jax.lax.bitcast_convert_type(_in_order(_largest(bits, _LEAST)), jnp.float32)


def row_max_abs(x: jax.Array) -> jax.Array:
    """As `row_max`, of the absolute values."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) & _ALL_BUT_SIGN
    return jax.lax.bitcast_convert_type(_largest(bits, 0), jnp.float32)


def _largest(whole: jax.Array, least: int) -> jax.Array:
    parts = jnp.max(_parts(whole, least), axis=-1)
    # Without a barrier XLA joins both maxima. GPUs are faster so; CPUs then take three kernels, see
    # `_parts`.
    parts = jax.lax.platform_dependent(
        parts, cpu=jax.lax.optimization_barrier, default=lambda parts: parts
    )
    return jnp.max(parts, axis=-1, keepdims=True)


def _in_order(bits: jax.Array) -> jax.Array:
    """Bits of floats <-> integers in the same order as the floats."""
    return bits ^ (jnp.right_shift(bits, 31) & _ALL_BUT_SIGN)


def _parts(x: jax.Array, fill: int) -> jax.Array:
    """Cuts the last axis, [..., n] -> [..., parts, 32], the last part filled up.

    XLA for CPUs computes the numbers of a longer axis in a loop of its own before it reduces them
    in two more.
    """
    missing = -x.shape[-1] % _PART
    if missing:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)], constant_values=fill)
    return x.reshape(*x.shape[:-1], -1, _PART)


_PART = 32
_ALL_BUT_SIGN = 0x7FFFFFFF
_LEAST = -(2**31)


def row_sum(x: jax.Array, bound: float) -> jax.Array:
    """The sum over the last axis, float32 [..., n] -> [..., 1], of numbers from 0 to `bound`.

    Each number is rounded to a multiple of bound / 2^22. It is off by at most bound / 2^23, and the
    sum by at most n times that. Appended zeros change nothing.

    Args:
        x: float32 [..., n], n below 2^21.
        bound: a power of two.
    """
    unit = 2.0**_SUMMED_BITS / bound
    sums = jnp.sum(_parts(jnp.round(x * unit).astype(jnp.int32), 0), axis=-1)
    high = jnp.sum(jnp.right_shift(sums, _LOW_BITS), axis=-1, keepdims=True)
    low = jnp.sum(sums & (2**_LOW_BITS - 1), axis=-1, keepdims=True)
    # The product is exact, so it does not matter whether XLA rounds it before the addition.
    return (high.astype(jnp.float32) * 2.0**_LOW_BITS + low.astype(jnp.float32)) / unit


_SUMMED_BITS = 22  # a sum of 32 such numbers is at most 2^27
_LOW_BITS = 15  # of such a sum: the sums of its high and low parts over the row fit as well


def settled(x: jax.Array) -> jax.Array:
    """The same numbers, rounded before they go on; -infinity becomes the least number.

    Where a product goes into a sum, compilers may or may not round it before, by the shape of the
    loop; where it goes into a product, they may multiply in another order; and of a root in a
    divisor they make rsqrt. Here another operation, which they cannot leave out, comes between.
    """
    return jnp.maximum(x, jnp.finfo(x.dtype).min)


@jax.custom_jvp
def softmax(x: jax.Array) -> jax.Array:
    """Softmax over the last axis, float32. Its derivative ignores rounding.

    The sum is at least 1. It is off by 2^-23 per number, so by 0.4 % at most for 32,768 numbers.
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

    Its derivative ignores rounding. x is first divided by a power of two, so that the largest
    square is between 1 and 4. The sum of squares is then off by 2^-21 per number, so by 0.2 % at
    most for 4,096 numbers.

    XLA reorders products of three floats, and may or may not round a product before an addition.
    Therefore only exact products, by a power of two, are added. A barrier keeps the quotient apart
    from the scale that multiplies it; XLA removes the barrier before it fuses loops.
    """
    # The power of two below the largest number; 1 if that number is 0 or the power out of range.
    exponent = exponent_of(row_max_abs(x))
    exponent = jnp.where(jnp.abs(exponent) < 60, exponent, 0)
    part, count = x * power_of_two(-exponent), x.shape[-1]
    total = row_sum(part * part, 4.0) + count * eps * power_of_two(-2 * exponent)
    # Not rsqrt, which is another approximation in loops that are not vectorised; nor a root in the
    # divisor itself, of which XLA makes rsqrt.
    return jax.lax.optimization_barrier(part / settled(jnp.sqrt(total / count)))


@norm.defjvp
def _norm_jvp(
    eps: float, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    factor = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    y = x * factor
    return norm(x, eps), factor * (dx - y * jnp.mean(y * dx, axis=-1, keepdims=True))


def exponent_of(x: jax.Array) -> jax.Array:
    """The exponent e of float32 numbers of at least 0: 2^e <= x < 2^(e+1).

    Returns:
        int32; -127 for 0 and denormal numbers, 128 for infinity and NaN.
    """
    return jnp.right_shift(jax.lax.bitcast_convert_type(x, jnp.int32), 23) - 127


def power_of_two(exponent: jax.Array) -> jax.Array:
    """2 to the power of an integer from -126 to 127, float32."""
    return jax.lax.bitcast_convert_type(jnp.left_shift(exponent + 127, 23), jnp.float32)
