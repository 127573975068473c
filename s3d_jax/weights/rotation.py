"""Rotation of rows by Hadamard matrices, which spreads a few large numbers over many.

Language models have activations a hundred times as large as the others. If such a row is rounded in
steps of its largest number, little is left of the rest. A matrix product stays the same if both
operands are rotated (QuaRot, arXiv 2404.00456), and rotated rows have no such numbers.

H of b rows holds 1 and -1, is symmetric, and H·H = b. Rows are rotated in blocks, of the largest
power of two that divides their width, and of 512 numbers at most.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from s3d_jax.mesh import MODEL, axis_size
from s3d_jax.weights.exact import exponent_of, power_of_two, row_max_abs

_LARGEST, _INNER = 512, 64  # of a block; of a matrix product
_EXACT_BITS = 24  # whole numbers up to 2^24 are exact in float32
_RANGE = 100  # exponents of the largest number of a row; outside, the row is rounded otherwise


def block_of(width: int) -> int:
    """Numbers in a block of rows of this width."""
    return min(width & -width, _LARGEST)


@functools.cache
def _hadamard(size: int) -> np.ndarray:
    """Sylvester's matrix of a power of two, float32 [size, size]."""
    i = np.arange(size)
    return np.where(np.bitwise_count(i[:, None] & i) % 2, -1, 1).astype(np.float32)


def rotate(x: Any) -> Any:
    """Multiplies each block by H, unscaled; twice gives the rows times `block_of(n)`.

    Sums of whole numbers are exact, so their order does not matter.

    Args:
        x: float32 [..., n], of jax or numpy; whole numbers up to 2^24 / block_of(n), or any.

    Returns:
        float32 [..., n].
    """
    block = block_of(x.shape[-1])
    inner = min(block, _INNER)
    # On a mesh rows may be divided by column, and then must not be joined.
    rows = x.shape[:-1] if axis_size(MODEL) > 1 else ()
    parts = _product(x.reshape(*rows, -1, inner), _hadamard(inner))
    if block == inner:
        return parts.reshape(x.shape)
    # H of the block is that of its parts, combined: sums and differences of pairs, by distance.
    numpy = jnp if isinstance(x, jax.Array) else np
    parts, count = parts.reshape(*rows, -1, block // inner, inner), block // inner
    columns = [parts[..., i, :] for i in range(count)]
    for distance in (1 << k for k in range(count.bit_length() - 1)):
        columns = [
            columns[i ^ distance] - columns[i]
            if i & distance
            else columns[i] + columns[i ^ distance]
            for i in range(count)
        ]
    return numpy.stack(columns, axis=-2).reshape(x.shape)


def rotate_rounded(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rotates rows after rounding them so finely that their sums are exact.

    So a row's result has the same bits in every program. They are rounded to multiples of a power
    of two, which is exact to multiply by, whatever other factors XLA multiplies first. At least 14
    bits remain for blocks of 512, 17 for those of 64.

    Args:
        x: float32 [..., n].

    Returns:
        (whole, unit): whole numbers as float32 [..., n], and what they count, float32 [..., 1].
    """
    bits = _EXACT_BITS - block_of(x.shape[-1]).bit_length() + 1
    exponent = jnp.clip(exponent_of(row_max_abs(x)), -_RANGE, _RANGE) + 1 - bits
    return rotate(jnp.round(x * power_of_two(-exponent))), power_of_two(exponent)


def _product(a: Any, b: np.ndarray) -> Any:
    if isinstance(a, jax.Array):
        return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    return a @ b
