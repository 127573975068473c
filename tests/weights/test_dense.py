"""Products equal numpy's in every dtype and for every number of rows, on each code path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s3d_jax.nn.attention import attention_mix, attention_scores
from s3d_jax.weights.dense import multiply

# Of the result over the size of its terms: float32 rounding, and one rounding to 16 bits.
TOLERANCE = {"float32": 1e-6, "bfloat16": 2**-8, "float16": 2**-10}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 40, 100])
def test_multiply(rows, dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, rows, 50)), dtype)
    weight = jnp.asarray(rng.normal(size=(70, 50)), dtype)
    operands = [np.asarray(a, np.float64) for a in (x[0], weight.T)]
    exact = np.matmul(*operands)
    scale = np.matmul(*map(np.abs, operands))
    for run in (multiply, jax.jit(multiply, static_argnums=2)):
        same = run(x, weight, x.dtype)
        assert same.shape == (1, rows, 70) and same.dtype == x.dtype
        assert (np.abs(np.asarray(same, np.float64)[0] - exact) / scale).max() <= TOLERANCE[dtype]
        wide = np.asarray(run(x, weight, jnp.float32), np.float64)[0]
        assert (np.abs(wide - exact) / scale).max() <= 1e-6  # accumulated in float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 2, 1), (1, 2, 3), (3, 2, 2), (2, 6, 9)])  # B, K, Q
def test_attention_products(shape, dtype):
    rng = np.random.default_rng(0)
    b, k, q = shape
    queries = jnp.asarray(rng.normal(size=(b, k, q, 10)), dtype)
    cached = jnp.asarray(rng.normal(size=(b, k, 33, 10)), dtype)
    weights = jnp.asarray(rng.uniform(size=(b, k, q, 33)), dtype)
    for equation, function, rows in (
        ("bkqh,bksh->bkqs", attention_scores, queries),
        ("bkqs,bksh->bkqh", attention_mix, weights),
    ):
        operands = (np.asarray(rows, np.float64), np.asarray(cached, np.float64))
        exact = np.einsum(equation, *operands)
        scale = np.einsum(equation, *map(np.abs, operands))
        for exact_bits in (True, False):
            product = function(rows, cached, exact_bits)
            assert product.dtype == jnp.float32
            assert (np.abs(np.asarray(product) - exact) / scale).max() <= 1e-6
