"""Float weights: a matrix is stored as one array [out, in], as in HF.

docs/log has the measurements for the choices made here.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from s3d_jax.weights.base import Arrays, Init

_FEW_ROWS = 64  # with more rows, transposing the result costs more than repacking the weight


class Dense:
    """Weights of the model's dtype: see `WeightFormat`."""

    exact_sums = False
    trainable = True
    takes_deltas = True

    def __init__(self, exact: bool = False) -> None:
        """`exact`: a row alone has the bits that it has next to a few others, on CPUs."""
        self._exact = exact

    def parts(self, name: str) -> tuple[str, ...]:
        return (name,)

    def declare(
        self, module: nn.Module, name: str, shape: tuple[int, int], dtype: str, init: Init
    ) -> Arrays:
        return (module.param(name, init, shape, jnp.dtype(dtype)),)

    def multiply(self, x: jax.Array, arrays: Arrays, out_dtype: Any) -> jax.Array:
        (weight,) = arrays
        return multiply(x, weight, out_dtype, self._exact)

    def look_up(self, arrays: Arrays, rows: jax.Array, dtype: Any) -> jax.Array:
        (table,) = arrays
        return table[rows]

    def take_rows(self, arrays: Arrays, rows: jax.Array) -> Arrays:
        return tuple(array[rows] for array in arrays)

    def store(self, matrix: np.ndarray) -> tuple[np.ndarray, ...]:
        return (matrix,)

    def widen(self, arrays: Arrays, dtype: Any) -> jax.Array:
        return arrays[0].astype(dtype)

    def bound_by_memory(self, dtype: str, backend: str) -> bool:
        return backend != "cpu" or dtype != "float32"


def multiply(
    x: jax.Array, weight: jax.Array, out_dtype: jnp.dtype, exact: bool = False
) -> jax.Array:
    """`x @ weight.T`, accumulated in float32.

    Args:
        x: [..., in].
        weight: [out, in].
        out_dtype: of the result.
        exact: CPUs sum a single row as they sum two or a few more (docs/log has the limits).

    Returns:
        [..., out].
    """
    rows = x.reshape(-1, x.shape[-1])
    if exact and rows.shape[0] == 1:
        return multiply(jnp.pad(rows, ((0, 1), (0, 0))), weight, out_dtype)[:1].reshape(
            *x.shape[:-1], -1
        )
    if rows.shape[0] <= _FEW_ROWS:
        product = jax.lax.platform_dependent(rows, weight, cpu=_weight_first, default=_rows_first)
    else:
        product = _rows_first(rows, weight)
    return product.astype(out_dtype).reshape(*x.shape[:-1], -1)


def _rows_first(rows: jax.Array, weight: jax.Array) -> jax.Array:
    return product(rows, weight, 1, 1)


def _weight_first(rows: jax.Array, weight: jax.Array) -> jax.Array:
    """For CPUs, which repack the second operand of each product: here it is the smaller one.

    The barrier keeps XLA from exchanging the operands again.
    """
    count = padded = rows.shape[0]
    if weight.dtype == jnp.float32 and 4 < count < 8:
        padded = 8  # eight rows take less time than five
    elif weight.dtype != jnp.float32 and count == 1:
        padded = 2  # two rows take a seventh of the time of one
    rows = jnp.pad(rows, ((0, padded - count), (0, 0)))
    return jax.lax.optimization_barrier(product(weight, rows, 1, 1)).T[:count]


def product(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    """The product of two matrices over one axis of each, accumulated in float32."""
    # HIGHEST matters for float32 on GPUs, which would otherwise multiply in TF32.
    return jax.lax.dot_general(
        a,
        b,
        (((a_axis,), (b_axis,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if b.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
