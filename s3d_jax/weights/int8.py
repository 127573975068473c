"""int8 weights: how they are made, stored and multiplied.

A quantised matrix is {"weight" (of a table "embedding"): int8 [out, in], "scale": float32 [out]}.
docs/log has the measurements behind the choices.

Where activations are rounded to int8 as well, a difference in the last bit of a float can become
one of a whole step, and then of the output. So that a token gets the very logits in a block of
several that it gets alone, a quantised model takes sums and maxima of rows by integers, whose order
does not matter: XLA sums floats in an order of its own for each shape.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

LARGEST = 127  # -128 is not used, so that a weight and its negative round alike
_WIDE, _WIDE_PER_ROW = 512, 64  # inputs from which on turning the result costs less than it saves
_AT_ONCE = 1 << 20  # numbers that are quantised; what numpy needs beside them stays small


# --- as arrays ------------------------------------------------------------------------------------


def quantize(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A matrix in int8 with one scale per row: the nearest of 255 steps up to its largest number.

    Args:
        matrix: [out, in], of a float type.

    Returns:
        (int8 [out, in], float32 [out]); their product is the matrix, to half a step. Rows whose
        step would be below float32's normal numbers (1e-38) become 0.

    Raises:
        ValueError: it holds infinities or NaN.
    """
    quantized, scale = np.empty(matrix.shape, np.int8), np.empty(len(matrix), np.float32)
    rows = max(1, _AT_ONCE // matrix.shape[1])
    for start in range(0, len(matrix), rows):
        part = matrix[start : start + rows].astype(np.float32)
        largest = np.max(np.abs(part), axis=1)
        if not np.isfinite(largest).all():
            raise ValueError("a matrix holds infinities or NaN, which int8 has not")
        step = largest / np.float32(LARGEST)
        step = np.where(step < np.finfo(np.float32).tiny, np.float32(1), step)
        quantized[start : start + rows] = np.rint(part / step[:, None])
        scale[start : start + rows] = step
    return quantized, scale


def quantize_tree(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A tree of float arrays with its matrices in int8; vectors (norms, biases) stay as they are.

    Args:
        tree: a parameter tree of `s3d_jax.model` or a part of it, numpy arrays.

    Raises:
        ValueError: a matrix holds infinities or NaN.
    """
    out: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            out[name] = quantize_tree(value)
        elif value.ndim == 2:
            out[name], out["scale"] = quantize(value)
        else:
            out[name] = value
    return out


def dequantize_tree(tree: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """The way back: a tree with all matrices in a float type.

    Args:
        tree: a parameter tree or a part of it, numpy or jax arrays; float matrices are just cast.
        dtype: of the matrices.
    """
    scale = tree.get("scale") if len(tree) > 1 else None  # a norm's scale is all it has
    out: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            out[name] = dequantize_tree(value, dtype)
        elif value is scale:
            continue
        elif value.ndim == 2 and scale is not None:
            out[name] = (value.astype(np.float32) * scale[:, None]).astype(dtype)
        else:
            out[name] = value.astype(dtype) if value.ndim == 2 else value
    return out


# --- in the model ---------------------------------------------------------------------------------


def declare(
    module: nn.Module, name: str, shape: tuple[int, int], deviation: float
) -> tuple[jax.Array, jax.Array]:
    """A module's int8 matrix [out, in] called `name`, and its scale [out].

    At random they have the given standard deviation.
    """

    def random(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
        return jax.random.randint(key, shape, -LARGEST, LARGEST + 1, jnp.int8)

    init = nn.initializers.constant(deviation / (LARGEST / 3**0.5))  # of integers drawn so
    return module.param(name, random, shape), module.param("scale", init, (shape[0],), jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def project(x: jax.Array, weight: jax.Array, scale: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
    """`x @ (weight * scale).T` for a matrix made by `quantize`.

    On CPUs, which multiply int8 faster than anything else, each row of x is rounded to int8 as
    well (W8A8). A row's result does not depend on the other rows, and int32 sums are exact: a token
    verified in a block gets the very products that it gets alone. Elsewhere the weight is converted
    to the type of x within the product (W8A16), since the point there is to read fewer bytes.

    The gradient is that of the product without rounding, with respect to x alone.

    Args:
        x: [..., in], of a float type.
        weight: int8 [out, in].
        scale: float32 [out].
        out_dtype: of the result.

    Returns:
        [..., out].
    """
    rows = x.reshape(-1, x.shape[-1])
    y = jax.lax.platform_dependent(rows, weight, scale, cpu=_w8a8, default=_w8a16)
    return y.astype(out_dtype).reshape(*x.shape[:-1], -1)


def _w8a8(rows: jax.Array, weight: jax.Array, scale: jax.Array) -> jax.Array:
    count, rows = rows.shape[0], rows.astype(jnp.float32)
    step = row_max(jnp.abs(rows)) / LARGEST
    rounded = jnp.round(rows * jnp.where(step == 0, 0, 1 / step)).astype(jnp.int8)
    weight_first = _multiplies_int8() and rows.shape[1] >= max(_WIDE, _WIDE_PER_ROW * count)
    missing = max(0, 2 - count)  # one row takes up to 16 times as long as two
    rounded = jnp.pad(rounded, ((0, missing), (0, 0)))
    contracted = (((1,), (1,)), ((), ()))
    if weight_first:  # as in linear.py
        sums = jax.lax.dot_general(weight, rounded, contracted, preferred_element_type=jnp.int32)
        sums = jax.lax.optimization_barrier(sums).T
    else:
        sums = jax.lax.dot_general(rounded, weight, contracted, preferred_element_type=jnp.int32)
    # As in `norm`: else XLA might multiply step and scale first, for one row and not for several.
    return jax.lax.optimization_barrier(sums[:count].astype(jnp.float32) * step) * scale


@functools.cache
def _multiplies_int8() -> bool:
    """Whether the CPU has instructions for sums of int8 products (VNNI, AMX); yes if unknown.

    Without them repacking the weight is not what takes the time.
    """
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return True
    return "avx2" not in text or "vnni" in text or "amx_int8" in text


def _w8a16(rows: jax.Array, weight: jax.Array, scale: jax.Array) -> jax.Array:
    return scale * jax.lax.dot_general(
        rows,
        weight.astype(rows.dtype),
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if rows.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _project_forward(
    x: jax.Array, weight: jax.Array, scale: jax.Array, out_dtype: jnp.dtype
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return project(x, weight, scale, out_dtype), (jnp.zeros((), x.dtype), weight, scale)


def _project_backward(
    out_dtype: jnp.dtype, saved: tuple[jax.Array, ...], gradient: jax.Array
) -> tuple[jax.Array | None, ...]:
    like, weight, scale = saved
    scaled = gradient.astype(jnp.float32) * scale
    x_gradient = jax.lax.dot_general(
        scaled.astype(like.dtype).reshape(-1, len(scale)),
        weight.astype(like.dtype),
        (((1,), (0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if like.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    return x_gradient.astype(like.dtype).reshape(*gradient.shape[:-1], -1), None, None


project.defvjp(_project_forward, _project_backward)


# --- the same bits in every program ---------------------------------------------------------------


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
