"""Keys and values in int8, with a scale for each token and key head.

A token's numbers are rounded once, when they are written, and every token reads them rounded, those
of its own block too. So they do not depend on the block in which the token was computed.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

LARGEST = 127  # -128 is not used, so that a number and its negative round alike
_LEAST = 1e-30  # heads whose largest number is smaller become 0


class Rounded(flax.struct.PyTreeNode):
    """Keys or values of one layer in int8; has the shape and dtype of what it stands for.

    All arrays have the axes of a float cache, so what moves, cuts, grows or divides a cache does
    the same to each of them.

    Attributes:
        numbers: int8 [B, K, S, H].
        scales: float32 [B, K, S, 1]; NaN where a number is not finite. They take 4 bytes next to H.
            In 16 bits they would be rounded themselves, or end at 65504, and save 3 % at H = 64.
        dtype: static, of the products with the numbers, which every float type holds exactly.
    """

    numbers: jax.Array
    scales: jax.Array
    dtype: np.dtype = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """[B, K, S, H]."""
        return self.numbers.shape

    @property
    def operand(self) -> jax.Array:
        """The numbers as the operand of a product, [B, K, S, H] of `dtype`."""
        return self.numbers.astype(self.dtype)

    @property
    def mixed(self) -> jax.Array:
        """The same as the operand of a product with weights that are multiplied by the scales.

        They can be smaller than 6e-5, below which float16 is coarse, so that is done in float32.
        """
        wide = self.dtype == jnp.float16
        return self.numbers.astype(jnp.float32) if wide else self.operand

    @property
    def by_slot(self) -> jax.Array:
        """The scales as factors of scores or weights, float32 [B, K, 1, S]."""
        return self.scales.swapaxes(2, 3)


Stored = jax.Array | Rounded  # keys or values of one layer in the cache


def empty(shape: tuple[int, ...], dtype: str, kind: str | None) -> Stored:
    """A cache's zeros for one layer; kind: `ModelConfig.kv_cache`."""
    if kind is None:
        return jnp.zeros(shape, dtype)
    scales = jnp.zeros((*shape[:-1], 1), jnp.float32)
    return Rounded(jnp.zeros(shape, jnp.int8), scales, jnp.dtype(dtype))


def rounded(x: jax.Array, dtype: np.dtype) -> Rounded:
    """Float [B, K, T, H], each head of each token rounded to the nearest of 255 steps."""
    # A barrier, since XLA might else multiply what made x with the scale first, in some programs.
    x = jax.lax.optimization_barrier(x.astype(jnp.float32))
    finite = jnp.all(jnp.isfinite(x), axis=-1, keepdims=True)
    x = jnp.where(finite, x, 0)
    scales = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), _LEAST) / LARGEST
    numbers = jnp.round(x / scales).astype(jnp.int8)
    return Rounded(numbers, jnp.where(finite, scales, jnp.nan), dtype)


def widened(stored: Stored) -> jax.Array:
    """What the cache stands for, [B, K, S, H]: float32 if it is rounded."""
    if isinstance(stored, Rounded):
        return stored.numbers.astype(jnp.float32) * stored.scales
    return stored
