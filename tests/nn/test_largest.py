"""The largest numbers are those of `argmax` and `top_k`, the first of equal ones first."""

import jax
import numpy as np
import pytest

from s3d_jax.nn.largest import largest, largest_few


def rows_of(size: int) -> np.ndarray:
    """Random rows, many equal numbers, infinities: float32 [2, 5, size]."""
    generator = np.random.default_rng(size)
    rows = [generator.normal(size=size), generator.integers(0, 3, size), np.full(size, -np.inf)]
    for value in (np.inf, -np.inf):
        row = generator.normal(size=size)
        row[generator.integers(0, size, 3)] = value
        rows.append(row)
    return np.array([rows, rows[::-1]], np.float32)


@pytest.mark.parametrize("size", [1, 5, 127, 128, 129, 1000, 49152])
def test_the_largest_is_that_of_argmax(size):
    x = rows_of(size)
    found = jax.jit(largest)(x)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, np.argmax(x, axis=-1))
    x[..., :: max(size // 3, 1)] = np.nan
    assert np.all((np.asarray(largest(x)) >= 0) & (np.asarray(largest(x)) < size))


@pytest.mark.parametrize(
    "size, count",
    [(16, 16), (129, 1), (513, 4), (512, 16), (523, 16), (2048, 16), (2049, 16), (49152, 16)],
)
def test_the_largest_few_are_those_of_top_k(size, count):
    x = rows_of(size)
    found = jax.jit(largest_few, static_argnames="count")(x, count=count)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, jax.lax.top_k(x, count)[1])
