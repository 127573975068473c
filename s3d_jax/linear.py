"""The one linear layer: storage layout, arithmetic, and all choices by backend.

Weights are stored `[in, out]`; those in int8 as int8.py says. docs/performance.md has the
measurements behind the choices.
"""

import functools
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from s3d_jax import int8

INIT_DEVIATION = 0.02  # of random weights
# Attention of more query heads than this is not unrolled: each product is compiled on its own.
_MAX_UNROLLED = 16


def project(
    x: jax.Array, weight: jax.Array, out_dtype: jnp.dtype, *, transposed: bool = False
) -> jax.Array:
    """`x @ weight`, accumulated in float32.

    Args:
        x: [..., in].
        weight: [in, out]; [out, in] if `transposed` (an embedding table that is also the head).
        out_dtype: of the result.

    Returns:
        [..., out].
    """
    rows = x.reshape(-1, x.shape[-1])
    product = functools.partial(_matrix_product, transposed=transposed)
    if rows.shape[0] == 1 and weight.dtype != jnp.float32:
        # A single row of a 16-bit type costs a CPU seven times as much as two rows.
        def padded(rows: jax.Array, weight: jax.Array) -> jax.Array:
            return product(jnp.pad(rows, ((0, 1), (0, 0))), weight)[:1]

        y = jax.lax.platform_dependent(rows, weight, cpu=padded, default=product)
    else:
        y = product(rows, weight)
    return y.astype(out_dtype).reshape(*x.shape[:-1], -1)


def _matrix_product(rows: jax.Array, weight: jax.Array, transposed: bool) -> jax.Array:
    # HIGHEST matters for float32 on GPUs, which would else multiply in TF32 and lose exactness.
    return jax.lax.dot_general(
        rows,
        weight,
        (((1,), (1 if transposed else 0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None,
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
    features = project(x, factors["down"].astype(x.dtype), x.dtype)
    features = features if activation is None else activation(features)
    return project(features, factors["up"].astype(x.dtype), x.dtype)


class Linear(nn.Module):
    """A linear layer: weight [in, out], an optional bias [out], a low-rank delta if given one."""

    features: int
    use_bias: bool
    dtype: str
    quantized: bool

    @nn.compact
    def __call__(self, x: jax.Array, delta: Mapping[str, jax.Array] | None = None) -> jax.Array:
        if self.quantized:
            shape = (self.features, x.shape[-1])
            y = int8.project(x, *int8.declare(self, "weight", shape, INIT_DEVIATION), x.dtype)
        else:
            init, shape = nn.initializers.normal(INIT_DEVIATION), (x.shape[-1], self.features)
            y = project(x, self.param("weight", init, shape, jnp.dtype(self.dtype)), x.dtype)
        if self.use_bias:
            y = y + self.param(
                "bias", nn.initializers.zeros, (self.features,), jnp.dtype(self.dtype)
            )
        return y if delta is None else y + low_rank(x, delta)
