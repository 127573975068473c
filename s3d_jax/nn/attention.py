"""Attention of a block of tokens to the cache: layouts, products, softmax, the linen module."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from s3d_jax.mesh import DATA, MODEL, constrained
from s3d_jax.nn.cache import KVCache, write
from s3d_jax.nn.layers import Linear, RMSNorm
from s3d_jax.nn.rope import Rotary, rotate
from s3d_jax.nn.rounded import Rounded, Stored
from s3d_jax.nn.sharding import split
from s3d_jax.settings.model import ModelConfig
from s3d_jax.weights.exact import settled
from s3d_jax.weights.exact import softmax as exact_softmax
from s3d_jax.weights.formats import exact_sums


class Layout(flax.struct.PyTreeNode):
    """The positions of the tokens of one pass, and the slots that each token attends to.

    Attributes:
        start: int [B], the slot of each row's first token; the other tokens follow.
        positions: int32 [B, T], positions of the tokens in the text.
        slot_positions: int32 [B, S] or [1, S], position of the token in each slot.
        seen: bool [B, T, S], True where a token attends to a slot.
        ring: static; the slots are a ring (see cache.py).
    """

    start: jax.Array
    positions: jax.Array
    slot_positions: jax.Array
    seen: jax.Array
    ring: bool = flax.struct.field(pytree_node=False, default=False)

    def within(self, window: int | None) -> "Layout":
        """The layout without slots that lie `window` or more positions back."""
        if window is None:
            return self
        recent = self.slot_positions[:, None, :] > self.positions[:, :, None] - window
        return self.replace(seen=self.seen & recent)


def layout_after_committed(
    cache: KVCache, length: int, bidirectional: bool, slots: int, visible: int | None = None
) -> Layout:
    """The layout of decoding: `length` tokens after each row's committed tokens.

    Args:
        cache: holds the committed length of each row.
        length: T.
        bidirectional: a token sees the tokens after it as well.
        slots: number of slots of the layer; fewer than the cache's if the layer keeps a ring.
        visible: number of slots that are read; None reads all.
    """
    positions = cache.length[:, None] + jnp.arange(length, dtype=jnp.int32)
    slot_positions, ring = _in_slots(cache, length, slots, visible)
    last = positions[:, -1:] if bidirectional else positions
    seen = slot_positions[:, None] <= last[:, :, None]
    if ring:
        seen &= slot_positions[:, None] >= 0
    return Layout(cache.length, positions, slot_positions, seen, ring)


def layout_of_merged(
    cache: KVCache,
    num_tokens: int,
    num_masks: int,
    bidirectional: bool,
    slots: int,
    visible: int | None = None,
) -> Layout:
    """The layout of merged mode: tokens after each row's committed ones, then masks of each token.

    The block is t tokens, the masks of the first token, the masks of the second, and so on. A token
    sees what it sees without masks. Mask j = 1 … m of a token stands j positions after it, and sees
    what the token sees and the token's masks up to itself. So these masks are the next draft if
    that token is the last accepted one. The keys of masks are scratch, in slots after those of the
    tokens: the next pass overwrites them or does not see them.

    Args:
        cache: holds the committed length of each row.
        num_tokens, num_masks: t, and m per token; T = t·(1+m).
        bidirectional: a mask sees all masks of its token.
        slots, visible: as in `layout_after_committed`.
    """
    t, m = num_tokens, num_masks
    of_masks = np.repeat(np.arange(t), m)
    token = np.concatenate([np.arange(t), of_masks])  # that a row is, or belongs to
    first = np.concatenate([np.arange(t), t + m * of_masks])
    last = np.arange(t * (1 + m))
    if bidirectional:
        last = np.concatenate([np.arange(t), first[t:] + m - 1])
    places = token + np.concatenate([np.zeros(t, int), np.tile(np.arange(1, m + 1), t)])
    return _layout_of_branches(cache, token, first, last, places, slots, visible)


def layout_of_comb(
    cache: KVCache,
    num_tokens: int,
    leaf_depths: tuple[int, ...],
    slots: int,
    visible: int | None = None,
) -> Layout:
    """The layout of a comb: tokens after each row's committed ones, then leaves beside them.

    A leaf at depth i stands where token i of the block does, and sees the tokens before that one
    and itself. The key of a leaf is scratch, in a slot after those of the tokens.

    Args:
        cache: holds the committed length of each row.
        num_tokens: of the block without the leaves.
        leaf_depths: of each leaf, from 1.
        slots, visible: as in `layout_after_committed`.
    """
    tokens = np.arange(num_tokens)
    own = np.arange(num_tokens + len(leaf_depths))
    trunk = np.concatenate([tokens, np.array(leaf_depths, int) - 1])
    places = np.concatenate([tokens, np.array(leaf_depths, int)])
    return _layout_of_branches(cache, trunk, own, own, places, slots, visible)


def _layout_of_branches(
    cache: KVCache,
    trunk: np.ndarray,
    first: np.ndarray,
    last: np.ndarray,
    places: np.ndarray,
    slots: int,
    visible: int | None,
) -> Layout:
    """The layout of a block after each row's committed tokens that is no plain sequence.

    Args:
        cache: holds the committed length of each row.
        trunk, first, last: int [T]; a row of the block sees the committed tokens, the block's rows
            up to `trunk`, and those from `first` to `last`.
        places: int [T], the position of each row, counted from the first one's.
        slots, visible: as in `layout_after_committed`.
    """
    count = len(trunk)
    written, ring = _in_slots(cache, count, slots, visible)
    row = written - cache.length[:, None]  # of the block; below 0 for committed tokens
    at = row[:, None]
    seen = (at <= trunk[:, None]) | ((at >= first[:, None]) & (at <= last[:, None]))
    if ring:
        seen &= written[:, None] >= 0
    offsets = jnp.asarray(places, jnp.int32)
    positions = cache.length[:, None] + offsets
    of_row = cache.length[:, None] + offsets[jnp.clip(row, 0, count - 1)]
    slot_positions = jnp.where((row >= 0) & (row < count), of_row, written)
    return Layout(cache.length, positions, slot_positions, seen, ring)


def _in_slots(
    cache: KVCache, length: int, slots: int, visible: int | None
) -> tuple[jax.Array, bool]:
    """What each slot holds when `length` rows were written after the committed tokens.

    Returns:
        The place of the last row that was written to a slot, counted from the text's beginning,
        int32 [B, S] or [1, S], below 0 if there is none; and whether the slots are a ring.
    """
    places = jnp.arange(min(visible or slots, slots), dtype=jnp.int32)[None]
    ring = slots < cache.slots
    if ring:
        newest = cache.length[:, None] + length - 1
        places = newest - (newest - places) % slots
    return places, ring


def layout_after_anchors(
    anchors: jax.Array, width: int, context: int, bidirectional: bool
) -> Layout:
    """The layout of training: a block of `width` tokens at each of many anchors of one text.

    The cache holds the whole text in its first `context` slots; the blocks follow, one after the
    other. A block sees the text before its anchor and itself, as in decoding.

    Args:
        anchors: int [B, A], position of each block's first token.
        width: number of tokens in a block.
        context: number of tokens in the text.
        bidirectional: the tokens of a block see each other in both directions.
    """
    rows, count = anchors.shape
    offsets = jnp.arange(width, dtype=jnp.int32)
    positions = (anchors[:, :, None] + offsets).reshape(rows, -1).astype(jnp.int32)
    text = jnp.arange(context, dtype=jnp.int32)
    slot_positions = jnp.concatenate([jnp.broadcast_to(text, (rows, context)), positions], axis=1)
    before = jnp.repeat(text < anchors[:, :, None], width, axis=1)
    block = np.arange(count * width) // width
    own = block[:, None] == block
    if not bidirectional:
        own &= np.tri(count * width, dtype=bool)
    own = jnp.broadcast_to(own, (rows, *own.shape))
    seen = jnp.concatenate([before, own], axis=2)
    start = jnp.full((rows,), context, jnp.int32)
    return Layout(start, positions, slot_positions, seen)


def attend(
    q: jax.Array,
    k: Stored,
    v: Stored,
    mask: jax.Array,
    scale: float,
    softcap: float | None,
    exact: bool = False,
) -> jax.Array:
    """Grouped-query attention over all slots of a cache, softmax in float32.

    If the scores would take more than `_WHOLE_BYTES`, the slots are processed block by block, so
    that memory does not grow with the product of T and S.

    Args:
        q: [B, T, N, H].
        k, v: [B, K, S, H].
        mask: bool [B, T, S], True where a query attends to a slot; each query needs one at least.
        scale: multiplies the scores.
        softcap: c of c · tanh(scores / c), or None.
        exact: a token's result has the same bits for any T (weights/exact.py), unless the slots are
            processed block by block.

    Returns:
        [B, T, N, H].
    """
    b, t, n, h = q.shape
    kv, s = k.shape[1], k.shape[2]
    # The G queries that share a key head become rows of one matrix product per (row, key head).
    # Token by token, as q lies in memory, so that with one key head nothing is moved.
    rows = q.reshape(b, t, kv, n // kv, h).swapaxes(1, 2).reshape(b, kv, t * (n // kv), h)

    def scores(keys: Stored, mask: jax.Array) -> jax.Array:
        """[B, K, T, G, slots]"""
        x = attention_scores(rows, keys, exact)
        x = x.reshape(b, kv, t, n // kv, -1) * scale
        if softcap is not None:
            x = softcap * jnp.tanh(x / softcap)
        if exact:
            x = settled(x)
        return jnp.where(mask[:, None, :, None], x, jnp.finfo(jnp.float32).min)

    def mix(weights: jax.Array, values: Stored) -> jax.Array:
        """[B, K, T, G, H]"""
        out = attention_mix(weights.reshape(b, kv, t * (n // kv), -1), values, exact)
        return out.reshape(b, kv, t, n // kv, h)

    bytes_per_slot = 4 * b * n * t
    if s * bytes_per_slot <= _WHOLE_BYTES:
        softmax = exact_softmax if exact else jax.nn.softmax
        out = mix(softmax(scores(k, mask)), v)
    else:
        block = min(s, max(_FEWEST_SLOTS, _BLOCK_BYTES // bytes_per_slot))
        out = _block_by_block(scores, mix, k, v, mask, block, (b, kv, t, n // kv, h))
    return out.astype(q.dtype).swapaxes(1, 2).reshape(b, t, n, h)


_WHOLE_BYTES = 64 * 2**20  # scores up to this size are computed at once
_BLOCK_BYTES = 16 * 2**20  # scores of one block otherwise; a CPU's caches hold as much
_FEWEST_SLOTS = 128  # in a block; the overhead of a product is not worth fewer


def _block_by_block(
    scores: Callable[[Stored, jax.Array], jax.Array],
    mix: Callable[[jax.Array, Stored], jax.Array],
    k: Stored,
    v: Stored,
    mask: jax.Array,
    block: int,
    shape: tuple[int, ...],
) -> jax.Array:
    """Softmax attention with a running maximum and sum (Milakov and Gimelshein, arXiv 1805.02867).

    Blocks that no token attends to cost nothing. The backward pass computes each block's scores
    again.
    """
    slots = k.shape[2]

    def step(carry: tuple[jax.Array, ...], start: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
        first = jnp.minimum(start, slots - block)  # the last block overlaps the one before
        fresh = first + jnp.arange(block) >= start
        cut = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=block, axis=2
        )
        keys, values = jax.tree.map(cut, (k, v))
        here = jax.lax.dynamic_slice_in_dim(mask, first, block, axis=2) & fresh

        def add(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            out, total, largest = carry
            x = scores(keys, here)
            new = jnp.maximum(largest, jnp.max(x, axis=-1, keepdims=True))
            weights, shrink = jnp.exp(x - new), jnp.exp(largest - new)
            total = total * shrink + jnp.sum(weights, axis=-1, keepdims=True)
            return out * shrink + mix(weights, values), total, new

        return jax.lax.cond(jnp.any(here), add, lambda carry: carry, carry), None

    one = jnp.zeros((*shape[:-1], 1), jnp.float32)
    # A token that sees no slot of a block gives all of them equal weights. The first block that it
    # sees shrinks these weights to 0.
    begin = (jnp.zeros(shape, jnp.float32), one, one + jnp.finfo(jnp.float32).min)
    starts = jnp.arange(0, slots, block)
    (out, total, _), _ = jax.lax.scan(jax.checkpoint(step), begin, starts)
    return out / total


def attention_scores(rows: jax.Array, keys: Stored, exact: bool = False) -> jax.Array:
    """The products of each head's queries with its keys, accumulated in float32.

    Args:
        rows: [B, K, Q, H], the queries that share a key head.
        keys: [B, K, S, H].
        exact: a row's result has the same bits for any Q, and for any S that is a multiple of 64.

    Returns:
        float32 [B, K, Q, S].
    """
    if isinstance(keys, Rounded):
        scores = attention_scores(rows, keys.operand, exact) * keys.by_slot
        return settled(scores) if exact else scores
    count, slots = rows.shape[2], keys.shape[2]
    plain = functools.partial(_batched, "bkqh,bksh->bkqs")
    if exact:
        rows = _two_or_more(rows)

        def in_pieces(rows: jax.Array, keys: jax.Array) -> jax.Array:
            tiles, cuts = _whole_tiles(rows), _cuts(rows.shape[3], _EIGEN_PIECE)
            parts = [plain(tiles[..., cut], keys[..., cut]) for cut in cuts]
            return _in_turn(parts)[:, :, : rows.shape[2]]

        cpu = in_pieces if _EIGEN else plain
        return jax.lax.platform_dependent(rows, keys, cpu=cpu, default=plain)[:, :, :count]
    if count > 4 and slots < 64 * count:
        return plain(rows, keys)

    def keys_first(rows: jax.Array, keys: jax.Array) -> jax.Array:  # as in dense.py
        rows = rows if rows.dtype == jnp.float32 else _two_or_more(rows)
        scores = jax.lax.optimization_barrier(_batched("bksh,bkqh->bksq", keys, rows))
        return scores.swapaxes(2, 3)[:, :, :count]

    return jax.lax.platform_dependent(rows, keys, cpu=keys_first, default=plain)


def attention_mix(weights: jax.Array, values: Stored, exact: bool = False) -> jax.Array:
    """The sums of each head's values by weight, accumulated in float32.

    Args:
        weights: [B, K, Q, S]; rounded to the type of the values, if these are floats.
        values: [B, K, S, H].
        exact: as in `attention_scores`, for at most 256 queries.

    Returns:
        float32 [B, K, Q, H].
    """
    if isinstance(values, Rounded):
        return attention_mix(weights * values.by_slot, values.mixed, exact)
    weights = weights.astype(values.dtype)
    count = weights.shape[2]
    plain = functools.partial(_batched, "bkqs,bksh->bkqh")

    def padded(weights: jax.Array, values: jax.Array) -> jax.Array:
        return plain(_two_or_more(weights), values)[:, :, : weights.shape[2]]

    def in_tiles(weights: jax.Array, values: jax.Array) -> jax.Array:
        return plain(_whole_tiles(weights), values)[:, :, : weights.shape[2]]

    if exact and count <= _MOST_EXACT:  # only CPUs sum in another order
        pieces = functools.partial(_exact_mix, in_tiles if _EIGEN else padded)
        return jax.lax.platform_dependent(weights, values, cpu=pieces, default=padded)
    if count > 1 or weights.dtype == jnp.float32:
        return plain(weights, values)
    return jax.lax.platform_dependent(weights, values, cpu=padded, default=plain)


def _exact_mix(
    mix: Callable[[jax.Array, jax.Array], jax.Array], weights: jax.Array, values: jax.Array
) -> jax.Array:
    """The sums in pieces of a size at which XLA's order of summing depends on nothing."""
    slots, size = values.shape[2:]
    # All slots at once are up to four times as fast, and right for narrow heads (docs/log).
    piece = slots if size <= 64 else 512 if size <= 128 else 256
    cuts = _cuts(slots, _EIGEN_PIECE if _EIGEN else piece)
    parts = [
        _in_turn([mix(weights[:, :, queries, cut], values[:, :, cut]) for cut in cuts])
        for queries in _cuts(weights.shape[2], _EXACT_QUERIES)
    ]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=2)


_EXACT_QUERIES = 32
_MOST_EXACT = 256  # queries; a prompt has more, and nothing has to be equal to it

# Before 0.10, jax multiplied with Eigen on CPUs, whose order depends on the number of threads as
# well, unless the sums are this short.
_EIGEN = jax.__version_info__ < (0, 10)
_EIGEN_PIECE = 64


def _cuts(length: int, piece: int) -> list[slice]:
    return [slice(start, start + piece) for start in range(0, length, piece)]


def _in_turn(parts: list[jax.Array]) -> jax.Array:
    """The sum of arrays, added one after the other."""
    total, *others = parts
    for other in others:
        total = total + jax.lax.optimization_barrier(other)
    return total


def _two_or_more(rows: jax.Array) -> jax.Array:
    """Pads [B, K, Q, ...] to Q ≥ 2: a CPU sums a single row slowly and in another order."""
    return jnp.pad(rows, ((0, 0), (0, 0), (0, max(0, 2 - rows.shape[2])), (0, 0)))


def _whole_tiles(rows: jax.Array) -> jax.Array:
    """Pads [B, K, Q, ...] so that the bits of a row that Eigen sums do not depend on Q.

    Without AVX-512 Eigen takes twelve rows at once. Of the rest it sums four in the same order, and
    some of eight, or of fewer than four, in another.
    """
    count = -(-rows.shape[2] // 4) * 4
    count += 4 * (count % 12 == 8)
    return jnp.pad(rows, ((0, 0), (0, 0), (0, count - rows.shape[2]), (0, 0)))


def _batched(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(
        equation,
        a,
        b,
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _norm_heads(cfg: ModelConfig, name: str, heads: jax.Array) -> jax.Array:
    """RMS norm of [B, T, heads, H], over each head or over all heads together."""
    x = heads.reshape(*heads.shape[:2], -1) if cfg.qk_norm_joint else heads
    return RMSNorm(cfg, name=name)(x).reshape(heads.shape)


class Attention(nn.Module):
    """Self-attention of one layer: writes the block into the cache and attends to the cache.

    Attributes:
        config: the model.
        token_rows: see `Linear`.
    """

    config: ModelConfig
    token_rows: int = 0

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        keys: Stored,
        values: Stored,
        layout: Layout,
        rotary: Rotary | None,
        deltas: Mapping[str, Any],
    ) -> tuple[jax.Array, Stored, Stored]:
        cfg = self.config
        b, t, _ = x.shape
        n, kv, h = cfg.num_heads, cfg.cached_heads, cfg.head_dim
        make = functools.partial(Linear, cfg, token_rows=self.token_rows)
        qkv = make(cfg.qkv_features, cfg.qkv_bias, name="qkv")(x, deltas.get("qkv"))
        if cfg.attention_shards == 1:
            q, k, v = jnp.split(qkv.reshape(b, t, n + 2 * kv, h), (n, n + kv), axis=2)
        else:
            parts = split(qkv, (n * h, kv * h, kv * h), cfg.attention_shards)
            q, k, v = (constrained(x.reshape(b, t, -1, h), DATA, None, MODEL) for x in parts)
        if cfg.qk_norm:
            q, k = _norm_heads(cfg, "q_norm", q), _norm_heads(cfg, "k_norm", k)
        if rotary is not None:
            q, k = rotate(q, *rotary, exact_sums(cfg)), rotate(k, *rotary, exact_sums(cfg))
        # NaN in a value reaches queries that do not see its slot, as 0 · NaN is NaN. So it moves to
        # the key, which the mask hides from them.
        is_number = jnp.isfinite(v)
        k, v = jnp.where(is_number, k, jnp.nan), jnp.where(is_number, v, 0)
        keys = write(keys, k.swapaxes(1, 2), layout.start, layout.ring)
        values = write(values, v.swapaxes(1, 2), layout.start, layout.ring)
        scale = h**-0.5 if cfg.attention_scale is None else cfg.attention_scale
        visible = layout.seen.shape[-1]
        k, v = jax.tree.map(lambda x: x[:, :, :visible], (keys, values))
        exact = exact_sums(cfg)
        # With their masks, tokens could be too many for exact sums (`attend`).
        cuts = [self.token_rows] if exact and self.token_rows else []
        groups = zip(*(jnp.split(x, cuts, axis=1) for x in (q, layout.seen)), strict=True)
        softcap = cfg.attention_softcap
        outs = [attend(q, k, v, seen, scale, softcap, exact) for q, seen in groups]
        out = jnp.concatenate(outs, axis=1).reshape(b, t, n * h)
        linear = make(cfg.hidden_size, cfg.attention_out_bias, name="out")
        return linear(out, deltas.get("out")), keys, values
