"""The one linear layer: storage layout, arithmetic, and all choices by backend.

Weights are stored `[out, in]`, as in HF checkpoints, so the LM head and the embedding table can be
one array. docs/performance.md has the measurements behind the choices.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

# Up to this many rows a CPU has faster ways than XLA's plain matrix product.
_CPU_FEW_ROWS = 16


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
    if rows.shape[0] <= _CPU_FEW_ROWS:
        y = jax.lax.platform_dependent(rows, weight, cpu=_few_rows_on_cpu, default=_matrix_product)
    else:
        y = _matrix_product(rows, weight)
    return y.astype(out_dtype).reshape(*x.shape[:-1], weight.shape[0])


def _matrix_product(rows: jax.Array, weight: jax.Array) -> jax.Array:
    # HIGHEST matters for float32 on GPUs, which would else multiply in TF32 and lose exactness.
    return jax.lax.dot_general(
        rows,
        weight,
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _few_rows_on_cpu(rows: jax.Array, weight: jax.Array) -> jax.Array:
    """Decoding reads every weight for a handful of rows, so it should run at the speed of memory.

    In float32 one row does, as a matrix-vector product. For a few rows XLA's matrix product costs
    two to three times that, while a multiplication fused into a sum over `in` streams the weights
    once, in parallel, and is vectorised over rows if their number is a multiple of four or eight.
    In the 16-bit types the matrix product is the fast one, but only from four rows on.
    """
    count = rows.shape[0]
    if weight.dtype != jnp.float32:
        return _matrix_product(_pad_rows(rows, 4), weight)[:count]
    if count == 1:
        return (weight @ rows[0])[None]
    rows = _pad_rows(rows, 4 if count <= 4 else 8)
    return jnp.sum(rows[:, None, :] * weight[None], axis=-1)[:count]


def _pad_rows(rows: jax.Array, multiple: int) -> jax.Array:
    return jnp.pad(rows, ((0, -rows.shape[0] % multiple), (0, 0)))


class Linear(nn.Module):
    """A linear layer with weight [out, in] and an optional bias [out]."""

    features: int
    use_bias: bool
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.normal(stddev=0.02)
        weight = self.param("weight", init, (self.features, x.shape[-1]), jnp.dtype(self.dtype))
        y = project(x, weight, x.dtype)
        if self.use_bias:
            y = y + self.param(
                "bias", nn.initializers.zeros, (self.features,), jnp.dtype(self.dtype)
            )
        return y
