"""The key/value cache: preallocated, one length per row, rolled back by setting the length.

A layer that sees its whole past has a slot for every position. A layer with a sliding window has a
ring of R = window + largest block slots: position p is in slot p mod R.

A rollback leaves stale keys in the slots after `length`. In a ring, a stale key of position q has
overwritten position q - R. This is harmless: a pass writes at most `largest block` tokens, so q is
at most length + block - 1. Then q - R is at most length - window - 1, and no token at `length` or
later attends to that position.
"""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from s3d_jax.jax_settings import under_usual_jax_settings
from s3d_jax.nn.rope import same_keys
from s3d_jax.nn.rounded import Rounded, Stored, empty, rounded
from s3d_jax.nn.sharding import state_constrained
from s3d_jax.settings.model import ModelConfig
from s3d_jax.weights.base import num_bytes


class KVCache(flax.struct.PyTreeNode):
    """Keys and values of the committed tokens, and scratch after them.

    Rows are left-aligned: in a layer with all slots, slot s holds position s. Positions below
    `length` are committed. Later positions are scratch: masks hide them, and the next pass
    overwrites them. The layers are a tuple of arrays because XLA copies a stacked cache at every
    layer of a loop.

    Attributes:
        keys, values: L arrays [B, K, S, H], or [B, K, R, H] in layers that keep a ring. Heads come
            first, so that attention is a batched matrix product. Each is an array, or `Rounded`.
        length: int32 [B], committed tokens per row.
        prompt_length: int32 [B], tokens of each row's prompt (rotary tables may depend on it).
        slots: static, S, the number of positions that a row has room for.
    """

    keys: tuple[Stored, ...]
    values: tuple[Stored, ...]
    length: jax.Array
    prompt_length: jax.Array
    slots: int = flax.struct.field(pytree_node=False)

    @property
    def kind(self) -> str | None:
        """How keys and values are held, as `ModelConfig.kv_cache` says it."""
        return "int8" if isinstance(self.keys[0], Rounded) else None

    @property
    def is_deleted(self) -> bool:
        """Whether a program has taken the arrays."""
        arrays = jax.tree.leaves((self.keys, self.values, self.prompt_length))
        return any(x.is_deleted() for x in arrays)


def layer_slots(config: ModelConfig, slots: int, largest_block: int | None) -> tuple[int, ...]:
    """Number of slots of each layer if a row has `slots` positions; see `init_cache`."""
    windows = map(config.window, range(config.num_layers))
    return tuple(
        slots if w is None or largest_block is None else min(slots, w + largest_block)
        for w in windows
    )


@under_usual_jax_settings
def init_cache(
    config: ModelConfig,
    batch: int,
    slots: int,
    prompt_length: jax.Array | np.ndarray,
    largest_block: int | None = None,
) -> KVCache:
    """An empty cache for `batch` rows of `slots` positions.

    A pass over T tokens writes T slots, the first at each row's length. XLA clamps a write that
    does not fit, and it then overwrites committed slots. Callers therefore keep slack for a whole
    block (`SlotPlan.block`) after the last token that a row may commit.

    Args:
        config, batch, slots: the model, B and S.
        prompt_length: int [B].
        largest_block: number of tokens of the largest pass; layers with a window keep rings for it.
            None gives every layer all slots, which the blocks of training need.
    """
    sizes = layer_slots(config, slots, largest_block)
    shapes = tuple((batch, config.cached_heads, size, config.head_dim) for size in sizes)
    keys, values = _zeros(shapes, config.dtype, config.kv_cache)()
    # Put there from numpy, which compiles nothing for another number of rows.
    length = jax.device_put(np.zeros(batch, np.int32))
    if isinstance(prompt_length, np.ndarray):
        prompt_length = jax.device_put(prompt_length.astype(np.int32))
    return KVCache(keys, values, length, jnp.asarray(prompt_length, jnp.int32), slots)


@under_usual_jax_settings
def grown(cache: KVCache, config: ModelConfig, slots: int, largest_block: int | None) -> KVCache:
    """The same cache with room for `slots` positions or more; see `init_cache`.

    `slots` is at least what the cache has. Arrays of the right size are not copied.
    """
    assert slots >= cache.slots

    def resize(array: jax.Array, size: int) -> jax.Array:
        if array.shape[2] == size:
            return array
        # A ring that has not wrapped can still be padded.
        assert array.shape[2] == cache.slots, "a ring cannot grow"
        return jnp.pad(array, ((0, 0), (0, 0), (0, size - cache.slots), (0, 0)))

    sizes = layer_slots(config, slots, largest_block)
    keys, values = (
        tuple(
            jax.tree.map(functools.partial(resize, size=n), x)
            for x, n in zip(xs, sizes, strict=True)
        )
        for xs in (cache.keys, cache.values)
    )
    return cache.replace(keys=keys, values=values, slots=slots)


def cache_bytes(config: ModelConfig, slots: int, largest_block: int | None) -> int:
    """Bytes of the keys and values of one row of `slots` positions; see `init_cache`."""
    one = _slot_bytes(config.head_dim, config.dtype, config.kv_cache)
    return 2 * config.cached_heads * one * sum(layer_slots(config, slots, largest_block))


@functools.lru_cache
def _slot_bytes(head_dim: int, dtype: str, kind: str | None) -> int:
    """Of the keys, or the values, of one head and token."""
    return num_bytes(jax.eval_shape(lambda: empty((1, 1, 1, head_dim), dtype, kind)))


@functools.lru_cache(maxsize=32)  # a jitted function of its own, so that its program goes with it
def _zeros(shapes: tuple[tuple[int, ...], ...], dtype: str, kind: str | None) -> Any:
    """A program that makes keys and values: one dispatch, and each array has its own buffer."""

    def make() -> list[tuple[Stored, ...]]:
        return state_constrained([tuple(empty(s, dtype, kind) for s in shapes) for _ in range(2)])

    return jax.jit(make)


@dataclasses.dataclass(frozen=True)
class Kept:
    """The cache of one finished row, kept for a prompt with the same beginning.

    Attributes:
        ids: int32 [n], the tokens whose keys and values the cache holds.
        cache: the cache. The batch that takes it donates it when it runs.
        written: all positions that were written, scratch included, are below this one.
    """

    ids: np.ndarray
    cache: KVCache
    written: int

    def common(self, config: ModelConfig, prompt: np.ndarray) -> int:
        """How many tokens of the prompt need no prefill; the last one always does."""
        n = min(len(self.ids), len(prompt) - 1)
        (different,) = np.nonzero(self.ids[:n] != prompt[:n])
        n = int(different[0]) if len(different) else n
        before, after = int(self.cache.prompt_length[0]), len(prompt)
        ropes = {config.layer_rope(i) for i in range(config.num_layers)}
        if not all(same_keys(rope, before, after) for rope in ropes if rope is not None):
            return 0
        for i, keys in enumerate(self.cache.keys):
            slots, window = keys.shape[2], config.window(i)
            # Scratch in a ring must not have overwritten positions that the next token attends to.
            if slots < self.cache.slots and n + slots - (window or 0) < self.written:
                return 0
        return n


def write(cache: Stored, new: jax.Array, start: jax.Array, ring: bool = False) -> Stored:
    """Writes T positions per row, as the cache stores them.

    Args:
        cache: [B, K, S, H].
        new: float [B, K, T, H].
        start: int [B], first position of each row. Unless the slots are a ring, start + T and
            start + 2 must not exceed S: XLA would clamp silently.
        ring: static; position p goes to slot p mod S.

    Returns:
        The cache with positions start … start+T-1 of each row replaced. The next slot, which is
        scratch, may be replaced too.
    """
    written = rounded(new, cache.dtype) if isinstance(cache, Rounded) else new.astype(cache.dtype)
    return jax.tree.map(lambda x, block: _write(x, block, start, ring), cache, written)


def moved(cache: KVCache, source: jax.Array, target: jax.Array) -> KVCache:
    """The cache with what is at one position of each row at another one as well.

    Args:
        cache: any.
        source, target: int [B]; the position after `target` must have a slot too.
    """

    def move(x: jax.Array) -> jax.Array:
        ring = x.shape[2] < cache.slots
        # The next slot is written as it is, for the reason that `_write` gives.
        at = jnp.stack([source, target + 1], axis=1)
        if ring:
            at %= x.shape[2]
        block = jnp.take_along_axis(x, at[:, None, :, None], axis=2)
        return _write(x, block, target, ring)

    keys, values = jax.tree.map(move, (cache.keys, cache.values))
    return cache.replace(keys=keys, values=values)


def _write(cache: jax.Array, new: jax.Array, start: jax.Array, ring: bool) -> jax.Array:
    if ring:
        at = (start[:, None] + jnp.arange(new.shape[2])) % cache.shape[2]
        put = jax.vmap(lambda row, block, at: row.at[:, at].set(block, unique_indices=True))
        return put(cache, new, at)
    if cache.shape[0] == 1:  # one row needs no scatter
        if new.shape[2] == 1 < cache.shape[2]:
            # XLA repeats the write of a single slot in each of its readers and copies the cache
            # for each, which takes a quarter of a small model's step. The second slot is scratch.
            new = jnp.pad(new, ((0, 0), (0, 0), (0, 1), (0, 0)))
        return jax.lax.dynamic_update_slice(cache, new, (0, 0, start[0], 0))
    update = jax.vmap(lambda row, block, at: jax.lax.dynamic_update_slice(row, block, (0, at, 0)))
    return update(cache, new, start)
