"""The key/value cache: preallocated, one length per row, rolled back by setting the length."""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from s3d_jax.config import ModelConfig


class KVCache(flax.struct.PyTreeNode):
    """Keys and values of the committed tokens, and scratch behind them.

    Rows are left-aligned: slot s holds position s. Slots below `length` are committed; what lies
    behind is scratch, never read by a mask and overwritten by the next pass. The layers are a tuple
    of arrays and not one stacked array, because XLA copies a stacked cache at every layer of a
    loop.

    Attributes:
        keys, values: L arrays [B, K, S, H]; heads first, so that attention is a batched matrix
            product.
        length: int32 [B], committed tokens per row.
        prompt_length: int32 [B], tokens of each row's prompt (rotary tables may depend on it).
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    length: jax.Array
    prompt_length: jax.Array

    @property
    def slots(self) -> int:
        """S, the slots allocated per row."""
        return self.keys[0].shape[2]


def init_cache(
    config: ModelConfig, batch: int, slots: int, prompt_length: jax.Array | np.ndarray
) -> KVCache:
    """An empty cache for `batch` rows of `slots` slots.

    A pass over T tokens writes T slots from each row's length on, and XLA clamps a write that does
    not fit onto committed slots. So callers keep γ+1 slots of slack behind the last token a row may
    commit.
    """
    keys, values = _zeros(config, batch, slots)
    length = jnp.zeros((batch,), jnp.int32)
    return KVCache(keys, values, length, jnp.asarray(prompt_length, jnp.int32))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))  # one dispatch for all; a buffer for each
def _zeros(config: ModelConfig, batch: int, slots: int) -> list[tuple[jax.Array, ...]]:
    shape = (batch, config.num_kv_heads, slots, config.head_dim)
    return [
        tuple(jnp.zeros(shape, config.dtype) for _ in range(config.num_layers)) for _ in range(2)
    ]


def write(cache: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """Writes T slots per row.

    Args:
        cache: [B, K, S, H].
        new: [B, K, T, H].
        start: int [B], first slot of each row; start + T must not exceed S (XLA would clamp
            silently).

    Returns:
        The cache with slots start … start+T-1 of each row replaced.
    """
    new = new.astype(cache.dtype)
    if cache.shape[0] == 1:  # one row needs no scatter
        return jax.lax.dynamic_update_slice(cache, new, (0, 0, start[0], 0))
    update = jax.vmap(lambda row, block, at: jax.lax.dynamic_update_slice(row, block, (0, at, 0)))
    return update(cache, new, start)
