"""int8 weights: each output has a scale.

A matrix is stored as int8 [out, in] and its scale, float32 [out]. docs/log has the
measurements for the choices made here.
"""

import functools
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from s3d_jax.weights.base import INIT_DEVIATION, Arrays, Init
from s3d_jax.weights.exact import row_max

LARGEST = 127  # -128 is not used, so that a weight and its negative round alike
_WIDE, _WIDE_PER_ROW = 512, 64  # with more inputs, transposing the result costs less than it saves
_AT_ONCE = 1 << 20  # numbers that are quantised at once; keeps numpy's temporary arrays small


class Int8:
    """The format "int8": see `WeightFormat`.

    On CPUs activations are rounded too, so models in this format need exact sums (`exact`).
    """

    exact_sums = True
    trainable = False

    def parts(self, name: str) -> tuple[str, ...]:
        return name, "scale"

    def declare(
        self, module: nn.Module, name: str, shape: tuple[int, int], dtype: str, init: Init
    ) -> Arrays:
        def random(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
            return jax.random.randint(key, shape, -LARGEST, LARGEST + 1, jnp.int8)

        # The deviation of integers drawn evenly is LARGEST / √3.
        scale = nn.initializers.constant(INIT_DEVIATION / (LARGEST / 3**0.5))
        name, scale_name = self.parts(name)
        return (
            module.param(name, random, shape),
            module.param(scale_name, scale, (shape[0],), jnp.float32),
        )

    def multiply(self, x: jax.Array, arrays: Arrays, out_dtype: Any) -> jax.Array:
        weight, scale = arrays
        return multiply(x, weight, scale, out_dtype)

    def look_up(self, arrays: Arrays, rows: jax.Array, dtype: Any) -> jax.Array:
        weight, scale = arrays
        return (weight[rows] * scale[rows][..., None]).astype(dtype)

    def take_rows(self, arrays: Arrays, rows: jax.Array) -> Arrays:
        return tuple(array[rows] for array in arrays)

    def store(self, matrix: np.ndarray) -> tuple[np.ndarray, ...]:
        return quantize(matrix)

    def widen(self, arrays: Arrays, dtype: Any) -> jax.Array:
        weight, scale = arrays
        return (weight.astype(np.float32) * scale[:, None]).astype(dtype)

    def bound_by_memory(self, dtype: str, backend: str) -> bool:
        return backend != "cpu"


def quantize(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A matrix in int8 with one scale per row: numbers are rounded to the nearest of 255 steps.

    Args:
        matrix: [out, in], of a float type.

    Returns:
        (int8 [out, in], float32 [out]); their product differs from the matrix by half a step at
        most. Rows whose step would be below float32's normal numbers (1e-38) become 0.

    Raises:
        ValueError: it holds infinities or NaN.
    """
    quantized, scale = np.empty(matrix.shape, np.int8), np.empty(len(matrix), np.float32)
    rows = max(1, _AT_ONCE // matrix.shape[1])
    for start in range(0, len(matrix), rows):
        part = matrix[start : start + rows].astype(np.float32)
        largest = np.max(np.abs(part), axis=1)
        if not np.isfinite(largest).all():
            raise ValueError("a matrix holds infinities or NaN, which int8 cannot represent")
        step = largest / np.float32(LARGEST)
        step = np.where(step < np.finfo(np.float32).tiny, np.float32(1), step)
        quantized[start : start + rows] = np.rint(part / step[:, None])
        scale[start : start + rows] = step
    return quantized, scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def multiply(x: jax.Array, weight: jax.Array, scale: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
    """`x @ (weight * scale).T` for a matrix made by `quantize`.

    CPUs multiply int8 faster than anything else, so each row of x is rounded to int8 as well
    (W8A8). A row's result does not depend on the other rows, and int32 sums are exact: a token has
    the same products in a block and alone. Other backends convert the weight to the type of x
    within the product (W8A16): there the gain is to read fewer bytes.

    The gradient ignores rounding. It exists for x alone.

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
    missing = max(0, 2 - count)  # one row takes up to 16 times the time of two
    rounded = jnp.pad(rounded, ((0, missing), (0, 0)))
    contracted = (((1,), (1,)), ((), ()))
    if weight_first:  # as in dense.py
        sums = jax.lax.dot_general(weight, rounded, contracted, preferred_element_type=jnp.int32)
        sums = jax.lax.optimization_barrier(sums).T
    else:
        sums = jax.lax.dot_general(rounded, weight, contracted, preferred_element_type=jnp.int32)
    # A barrier as in `exact.norm`: XLA might multiply step and scale first, for some shapes only.
    return jax.lax.optimization_barrier(sums[:count].astype(jnp.float32) * step) * scale


@functools.cache
def _multiplies_int8() -> bool:
    """Whether the CPU has instructions for sums of int8 products (VNNI, AMX); True if unknown.

    Without them, the products take more time than repacking the weight.
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


def _multiply_forward(
    x: jax.Array, weight: jax.Array, scale: jax.Array, out_dtype: jnp.dtype
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return multiply(x, weight, scale, out_dtype), (jnp.zeros((), x.dtype), weight, scale)


def _multiply_backward(
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


multiply.defvjp(_multiply_forward, _multiply_backward)
