"""The one linear layer: storage layout, arithmetic, and all choices by backend.

Weights are stored `[out, in]`, as in HF. docs/performance.md has the measurements behind the
choices.
"""

import functools
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from s3d_jax import int8

INIT_DEVIATION = 0.02  # of random weights
_FEW_ROWS = 64  # from where on turning the result costs more than repacking the weight
# Attention of more query heads than this is not unrolled: each product is compiled on its own.
_MAX_UNROLLED = 16


def project(x: jax.Array, weight: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
    """`x @ weight.T`, accumulated in float32.

    Args:
        x: [..., in].
        weight: [out, in].
        out_dtype: of the result.

    Returns:
        [..., out].
    """
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] <= _FEW_ROWS:
        product = jax.lax.platform_dependent(rows, weight, cpu=_weight_first, default=_rows_first)
    else:
        product = _rows_first(rows, weight)
    return product.astype(out_dtype).reshape(*x.shape[:-1], -1)


def _rows_first(rows: jax.Array, weight: jax.Array) -> jax.Array:
    return _product(rows, weight, 1, 1)


def _weight_first(rows: jax.Array, weight: jax.Array) -> jax.Array:
    """On CPUs: of two operands the second one is repacked in each product, so it is the smaller.

    The barrier keeps XLA from exchanging them again.
    """
    count = padded = rows.shape[0]
    if weight.dtype == jnp.float32 and 4 < count < 8:
        padded = 8  # takes less time than five
    elif weight.dtype != jnp.float32 and count == 1:
        padded = 2  # takes a seventh of the time of one
    rows = jnp.pad(rows, ((0, padded - count), (0, 0)))
    return jax.lax.optimization_barrier(_product(weight, rows, 1, 1)).T[:count]


def _product(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    # HIGHEST matters for float32 on GPUs, which would else multiply in TF32 and lose exactness.
    return jax.lax.dot_general(
        *(a, b, (((a_axis,), (b_axis,)), ((), ()))),
        precision=jax.lax.Precision.HIGHEST if b.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def attention_product(
    equation: str, rows: jax.Array, cached: jax.Array, one_token: bool, reproducible: bool = False
) -> jax.Array:
    """The product of each head's rows with its keys or values, accumulated in float32.

    Args:
        equation: "bkqh,bksh->bkqs" or "bkqs,bksh->bkqh".
        rows, cached: its two operands, [B, K, Q, ...] and [B, K, S, H].
        one_token: whether the rows are the query heads of a single token per batch row.
        reproducible: a row's result has the same bits, however many rows there are, and, if their
            number is a multiple of 64, however many slots that weigh nothing.

    Returns:
        float32, as the equation says.
    """
    b, k, q, _ = rows.shape
    batched = functools.partial(_batched, equation)
    if reproducible:  # on CPUs two rows or more are, and a single one is not
        missing = max(0, 2 - q)
        rows = jnp.pad(rows, ((0, 0), (0, 0), (0, missing), (0, 0)))
        return batched(rows, cached)[:, :, :q]
    if one_token and rows.dtype == jnp.float32 and b * k * q <= _MAX_UNROLLED:
        by_row = functools.partial(_row_by_row, equation)
        return jax.lax.platform_dependent(rows, cached, cpu=by_row, default=batched)
    return batched(rows, cached)


def _batched(equation: str, rows: jax.Array, cached: jax.Array) -> jax.Array:
    return jnp.einsum(
        equation,
        rows,
        cached,
        precision=jax.lax.Precision.HIGHEST if rows.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _row_by_row(equation: str, rows: jax.Array, cached: jax.Array) -> jax.Array:
    """One matrix-vector product per row: XLA's batched ones are 2 to 5 times slower on CPUs."""
    one = equation.replace("bkq", "").replace("bk", "")
    b, k, q, _ = rows.shape
    heads = [(i, j) for i in range(b) for j in range(k)]
    products = [jnp.einsum(one, rows[h][r], cached[h]) for h in heads for r in range(q)]
    return jnp.stack(products).reshape(b, k, q, -1)


def low_rank(
    x: jax.Array,
    factors: Mapping[str, jax.Array],
    activation: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """`x @ down @ up`, with an activation between the two if there is one.

    Args:
        x: [..., in].
        factors: {"down": [in, r], "up": [r, out]}; of any float type, used in that of `x`.
        activation: of the r features.

    Returns:
        [..., out], of the type of `x`.
    """
    rows = x.reshape(-1, x.shape[-1])
    features = _product(rows, factors["down"].astype(x.dtype), 1, 0).astype(x.dtype)
    features = features if activation is None else activation(features)
    out = _product(features, factors["up"].astype(x.dtype), 1, 0).astype(x.dtype)
    return out.reshape(*x.shape[:-1], -1)


class Linear(nn.Module):
    """A linear layer: weight [out, in], an optional bias [out], a low-rank delta if given one."""

    features: int
    use_bias: bool
    dtype: str
    quantized: bool

    @nn.compact
    def __call__(self, x: jax.Array, delta: Mapping[str, jax.Array] | None = None) -> jax.Array:
        shape = self.features, x.shape[-1]
        if self.quantized:
            y = int8.project(x, *int8.declare(self, "weight", shape, INIT_DEVIATION), x.dtype)
        else:
            init = nn.initializers.normal(INIT_DEVIATION)
            y = project(x, self.param("weight", init, shape, jnp.dtype(self.dtype)), x.dtype)
        if self.use_bias:
            y = y + self.param(
                "bias", nn.initializers.zeros, (self.features,), jnp.dtype(self.dtype)
            )
        return y if delta is None else y + low_rank(x, delta)
