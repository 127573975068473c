"""The one linear layer: storage layout, arithmetic, and all choices by backend.

Weights are stored `[out, in]`, as in HF. docs/log has the measurements behind the
choices.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from s3d_jax.weights import int8

INIT_DEVIATION = 0.02  # of random weights
_FEW_ROWS = 64  # from where on turning the result costs more than repacking the weight


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


def attention_scores(rows: jax.Array, keys: jax.Array, reproducible: bool = False) -> jax.Array:
    """The products of each head's queries with its keys, accumulated in float32.

    Args:
        rows: [B, K, Q, H], the queries that share a key head.
        keys: [B, K, S, H].
        reproducible: a row's result has the same bits, however many rows there are, and, if their
            number is a multiple of 64, however many slots.

    Returns:
        float32 [B, K, Q, S].
    """
    count, slots = rows.shape[2], keys.shape[2]
    plain = functools.partial(_batched, "bkqh,bksh->bkqs")
    if reproducible:
        return plain(_two_or_more(rows), keys)[:, :, :count]
    if count > 4 and slots < 64 * count:
        return plain(rows, keys)

    def keys_first(rows: jax.Array, keys: jax.Array) -> jax.Array:  # as `_weight_first`
        rows = rows if rows.dtype == jnp.float32 else _two_or_more(rows)
        scores = jax.lax.optimization_barrier(_batched("bksh,bkqh->bksq", keys, rows))
        return scores.swapaxes(2, 3)[:, :, :count]

    return jax.lax.platform_dependent(rows, keys, cpu=keys_first, default=plain)


def attention_mix(weights: jax.Array, values: jax.Array, reproducible: bool = False) -> jax.Array:
    """The sums of each head's values by weight, accumulated in float32.

    Args:
        weights: [B, K, Q, S].
        values: [B, K, S, H].
        reproducible: as in `attention_scores`.

    Returns:
        float32 [B, K, Q, H].
    """
    count = weights.shape[2]
    plain = functools.partial(_batched, "bkqs,bksh->bkqh")

    def padded(weights: jax.Array, values: jax.Array) -> jax.Array:
        return plain(_two_or_more(weights), values)[:, :, :count]

    if reproducible:
        return padded(weights, values)
    if count > 1 or weights.dtype == jnp.float32:
        return plain(weights, values)
    return jax.lax.platform_dependent(weights, values, cpu=padded, default=plain)


def _two_or_more(rows: jax.Array) -> jax.Array:
    """[B, K, Q, ...] with Q ≥ 2: a CPU sums a single row in an order of its own, and slowly."""
    return jnp.pad(rows, ((0, 0), (0, 0), (0, max(0, 2 - rows.shape[2])), (0, 0)))


def _batched(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(
        equation,
        a,
        b,
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


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


def random_weight(key: jax.Array, shape: tuple[int, int], dtype: Any) -> jax.Array:
    """N(0, 0.02²), [out, in].

    Drawn as [in, out], so that a seed gives the model that it gave when weights were stored so: the
    recipes' logs are of such.
    """
    return jax.random.normal(key, shape[::-1], dtype).T * jnp.asarray(INIT_DEVIATION, dtype)


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
            weight = self.param("weight", random_weight, shape, jnp.dtype(self.dtype))
            y = project(x, weight, x.dtype)
        if self.use_bias:
            y = y + self.param(
                "bias", nn.initializers.zeros, (self.features,), jnp.dtype(self.dtype)
            )
        return y if delta is None else y + low_rank(x, delta)
