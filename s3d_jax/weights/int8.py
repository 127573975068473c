"""int8 weights: each output has a scale, and rows are rotated before they are rounded.

A matrix is stored as int8 [out, in] and its scale, float32 [out]. docs/log has the
measurements for the choices made here.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from s3d_jax.machine import is_before_ampere
from s3d_jax.mesh import MODEL, axis_size
from s3d_jax.weights.base import INIT_DEVIATION, Arrays, Init
from s3d_jax.weights.exact import row_max_abs, settled
from s3d_jax.weights.rotation import block_of, rotate, rotate_rounded

LARGEST = 127  # -128 is not used, so that a weight and its negative round alike
_WIDE, _WIDE_PER_ROW = 512, 64  # with more inputs, transposing the result costs less than it saves
_COLUMNS = 4  # what a sum is made for at the cost of one
_SHORT = 1024  # inputs; the order of matrices with fewer depends on how tall they are
_TALL, _TALLEST = 4, 32  # outputs for each input: of a feed-forward layer; of a vocabulary
_ANY_COLUMNS = jax.__version_info__ >= (0, 11)  # its XLA is fast for 3, 5, 6 and 7 columns too
_SLOW_PRODUCTS = jax.__version_info__ < (0, 10)  # measured: 0.7.2, which has no kernels for int8
_LANES = 16  # sums side by side; XLA does not fuse this many slices with the loop that makes them
_FEWEST_TERMS, _TERMS = 8, 24  # of a lane's sum, written out; more take long to compile
_IN_LANES = 32  # rows at most
AT_ONCE = 1 << 20  # numbers that are quantised at once; keeps numpy's temporary arrays small


class Int8:
    """The formats "int8" and "int8-plain": see `WeightFormat`.

    On CPUs activations are rounded too, so models in this format need exact sums (`exact`).
    """

    exact_sums = True
    trainable = False
    takes_deltas = True

    def __init__(self, rotated: bool) -> None:
        """`rotated`: both operands of a product are rotated before they are rounded."""
        self._rotated = rotated

    def parts(self, name: str) -> tuple[str, ...]:
        return name, "scale"

    def declare(
        self, module: nn.Module, name: str, shape: tuple[int, int], dtype: str, init: Init
    ) -> Arrays:
        def random(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
            return jax.random.randint(key, shape, -LARGEST, LARGEST + 1, jnp.int8)

        # The deviation of integers drawn evenly is LARGEST / √3.
        deviation = LARGEST / 3**0.5 * (block_of(shape[1]) ** 0.5 if self._rotated else 1)
        scale = nn.initializers.constant(INIT_DEVIATION / deviation)
        name, scale_name = self.parts(name)
        return (
            module.param(name, random, shape),
            module.param(scale_name, scale, (shape[0],), jnp.float32),
        )

    def multiply(self, x: jax.Array, arrays: Arrays, out_dtype: Any) -> jax.Array:
        weight, scale = arrays
        return multiply(x, weight, scale, out_dtype, self._rotated)

    def look_up(self, arrays: Arrays, rows: jax.Array, dtype: Any) -> jax.Array:
        weight, scale = arrays
        return self.widen((weight[rows], scale[rows]), dtype)

    def take_rows(self, arrays: Arrays, rows: jax.Array) -> Arrays:
        return tuple(array[rows] for array in arrays)

    def store(self, matrix: np.ndarray) -> tuple[np.ndarray, ...]:
        return quantize(matrix, self._rotated)

    def widen(self, arrays: Arrays, dtype: Any) -> jax.Array:
        weight, scale = arrays
        whole = weight.astype(np.float32)
        return ((rotate(whole) if self._rotated else whole) * scale[..., None]).astype(dtype)

    def bound_by_memory(self, dtype: str, backend: str) -> bool:
        return backend != "cpu"


def quantize(matrix: np.ndarray, rotated: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """A matrix in int8 with one scale per row: numbers are rounded to the nearest of 255 steps.

    Args:
        matrix: [out, in], of a float type.
        rotated: rotate the rows first.

    Returns:
        (int8 [out, in], float32 [out]); their product, rotated back, is the matrix. Without a
        rotation it differs by half a step at most. Rows whose step would be below float32's normal
        numbers (1e-38) become 0.

    Raises:
        ValueError: it holds infinities or NaN.
    """
    quantized, scale = np.empty(matrix.shape, np.int8), np.empty(len(matrix), np.float32)
    rows = max(1, AT_ONCE // matrix.shape[1])
    for start in range(0, len(matrix), rows):
        part = finite_rows(matrix[start : start + rows], "int8")
        if rotated:
            part = rotate(part / np.float32(block_of(part.shape[1])))
        step = np.max(np.abs(part), axis=1) / np.float32(LARGEST)
        step = np.where(step < np.finfo(np.float32).tiny, np.float32(1), step)
        quantized[start : start + rows] = np.rint(part / step[:, None])
        scale[start : start + rows] = step
    return quantized, scale


def finite_rows(rows: np.ndarray, precision: str) -> np.ndarray:
    """Rows of a matrix as float32.

    Raises:
        ValueError: they hold infinities or NaN, which the precision cannot represent.
    """
    rows = rows.astype(np.float32)
    if not np.isfinite(rows).all():
        raise ValueError(f"a matrix holds infinities or NaN, which {precision} cannot represent")
    return rows


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def multiply(
    x: jax.Array, weight: jax.Array, scale: jax.Array, out_dtype: jnp.dtype, rotated: bool = False
) -> jax.Array:
    """The product of x with a matrix made by `quantize`, `x @ matrix.T`.

    CPUs multiply int8 faster than anything else, so each row of x is rounded to int8 as well
    (W8A8). A row's result does not depend on the other rows, and int32 sums are exact: a token has
    the same products in a block and alone. GPUs before Ampere do the same. Other backends convert
    the weight to the type of x within the product (W8A16): there the gain is to read fewer bytes.

    The gradient ignores rounding. It exists for x alone.

    Args:
        x: [..., in], of a float type.
        weight: int8 [out, in].
        scale: float32 [out].
        out_dtype: of the result.
        rotated: as in `quantize`.

    Returns:
        [..., out].
    """
    rows = x.reshape(-1, x.shape[-1])
    cpu = functools.partial(_w8a8, rotated=rotated, sums=_int8_sums)
    default = functools.partial(_w8a16, rotated=rotated)
    if is_before_ampere():
        default = functools.partial(_w8a8, rotated=rotated, sums=_product)
    y = jax.lax.platform_dependent(rows, weight, scale, cpu=cpu, default=default)
    return y.astype(out_dtype).reshape(*x.shape[:-1], -1)


def _w8a8(
    rows: jax.Array,
    weight: jax.Array,
    scale: jax.Array,
    rotated: bool,
    sums: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    rows, unit = settled(rows.astype(jnp.float32)), None
    if rotated:
        rows, unit = rotate_rounded(rows)
    step = row_max_abs(rows) / LARGEST
    rounded = jnp.round(rows * jnp.where(step == 0, 0, 1 / step)).astype(jnp.int8)
    step = step if unit is None else step * unit
    # A barrier as in `exact.norm`: XLA might multiply step and scale first, for some shapes only.
    found = sums(rounded, weight).astype(jnp.float32)
    return settled(jax.lax.optimization_barrier(found * step) * scale)


def _int8_sums(rows: jax.Array, weight: jax.Array) -> jax.Array:
    """`rows @ weight.T`, int32 [B, out], of int8 matrices, in the order that is fastest on CPUs."""
    count, (outputs, inputs) = rows.shape[0], weight.shape
    if _takes_lanes(count, inputs):
        return _sums_in_lanes(rows, weight)
    weight_first = _multiplies_int8() and inputs >= max(_WIDE, _WIDE_PER_ROW * count)
    folds = _COLUMNS // max(count, 1)
    if axis_size(MODEL) > 1:
        folds = 1  # outputs cannot be joined to long rows where the rows are divided
    if weight_first and folds > 1 and outputs % folds == 0:
        return _folded_sums(rows, weight, folds)
    tall = outputs // inputs if inputs < _SHORT else 0
    if weight_first and count > 2 and tall >= _TALL:
        # XLA packs its second operand. That is cheaper for a vocabulary, and before jax 0.11 for
        # few rows of any tall matrix.
        weight_first = tall < _TALLEST if _ANY_COLUMNS else count >= 8
    padded = count
    if count == 1:
        padded = 2  # one row takes up to 16 times the time of two
    elif weight_first and _ANY_COLUMNS:
        padded += -count % _COLUMNS if tall >= _TALL else 0
    elif weight_first and 4 < count < 8:
        padded = 8  # eight rows take less time than five
    rows = jnp.pad(rows, ((0, padded - count), (0, 0)))
    if weight_first:  # as in dense.py
        return jax.lax.optimization_barrier(_product(weight, rows)).T[:count]
    return _product(rows, weight)[:count]


def _takes_lanes(count: int, inputs: int) -> bool:
    """Whether `_sums_in_lanes` is faster for so many rows than a product."""
    few = _SLOW_PRODUCTS and count <= _IN_LANES
    # A mesh might divide the inputs of a row, or outputs that are read together.
    return few and _terms(inputs) >= _FEWEST_TERMS and axis_size(MODEL) == 1


def _terms(inputs: int) -> int:
    """How many numbers each lane sums at once: the most that divide its share of the inputs.

    0: the inputs cannot be shared out.
    """
    share, rest = divmod(inputs, _LANES)
    return 0 if rest else max(n for n in range(1, _TERMS + 1) if share % n == 0)


@jax.jit  # traced once for all layers
def _sums_in_lanes(rows: jax.Array, weight: jax.Array) -> jax.Array:
    """As `_int8_sums`, without a product of matrices: XLA makes one vectorised loop of it.

    Each row costs as much as the first one. Without VNNI, newer versions would gain a factor of two
    for one row as well, but compile twice as long.
    """
    (count, inputs), outputs = rows.shape, weight.shape[0]
    terms = _terms(inputs)
    shape = (inputs // _LANES // terms, terms, _LANES)
    # The barrier: rows are widened once, and not for each output; and slices of the weight do not
    # seem to be the same in each step, or XLA would keep a copy of all of them.
    rows, weight = jax.lax.optimization_barrier((rows.astype(jnp.int32), weight))
    rows, weight = rows.reshape(1, count, *shape), weight.reshape(outputs, 1, *shape)
    products = (weight[..., n, :].astype(jnp.int32) * rows[..., n, :] for n in range(terms))
    lanes = jax.lax.optimization_barrier(functools.reduce(jnp.add, products)).sum(2)
    # Not `.sum(2)`: XLA, ignoring the barrier, would make one slow loop of both.
    return functools.reduce(jnp.add, (lanes[..., n] for n in range(_LANES))).T


def _folded_sums(rows: jax.Array, weight: jax.Array, folds: int) -> jax.Array:
    """As `_int8_sums`, with so many outputs in one: rows of the weight joined to longer ones.

    A sum has costs of its own, whatever its length, and a sum for four columns costs that for one.
    So each row is multiplied once per fold, with zeros around it.
    """
    (count, inputs), outputs = rows.shape, weight.shape[0]
    unit = jnp.eye(folds, dtype=jnp.int8)[:, None, :, None]
    columns = (unit * rows[None, :, None, :]).reshape(folds * count, folds * inputs)
    columns = jax.lax.optimization_barrier(columns)
    sums = _product(weight.reshape(outputs // folds, folds * inputs), columns)
    sums = jax.lax.optimization_barrier(sums).reshape(outputs // folds, folds, count)
    return sums.transpose(2, 0, 1).reshape(count, outputs)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    contracted = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(a, b, contracted, preferred_element_type=jnp.int32)


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


def _w8a16(rows: jax.Array, weight: jax.Array, scale: jax.Array, rotated: bool) -> jax.Array:
    if rotated:
        block = block_of(rows.shape[1])  # divided by it, no number grows, which float16 needs
        rows, scale = (rotate(rows.astype(jnp.float32)) / block).astype(rows.dtype), scale * block
    return scale * jax.lax.dot_general(
        rows,
        weight.astype(rows.dtype),
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if rows.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _multiply_forward(
    x: jax.Array, weight: jax.Array, scale: jax.Array, out_dtype: jnp.dtype, rotated: bool
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    y = multiply(x, weight, scale, out_dtype, rotated)
    return y, (jnp.zeros((), x.dtype), weight, scale)


def _multiply_backward(
    out_dtype: jnp.dtype, rotated: bool, saved: tuple[jax.Array, ...], gradient: jax.Array
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
    if rotated:
        x_gradient = rotate(x_gradient)
    return x_gradient.astype(like.dtype).reshape(*gradient.shape[:-1], -1), None, None


multiply.defvjp(_multiply_forward, _multiply_backward)
