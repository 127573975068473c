"""The decoder in flax linen. One forward pass serves prefill, AR step, draft and verify.

Transformer > Block > Attention, MLP, RMSNorm. The model families differ in ModelConfig only.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from s3d_jax.nn.cache import KVCache, init_cache, write
from s3d_jax.nn.linear import (
    INIT_DEVIATION,
    Linear,
    attention_mix,
    attention_scores,
    low_rank,
    project,
    random_weight,
)
from s3d_jax.nn.rope import rotary_table, rotate
from s3d_jax.settings.model import ModelConfig
from s3d_jax.weights import int8

Params = Mapping[str, Any]
Rotary = tuple[jax.Array, jax.Array]  # cosines and sines, see `rotary_table`

_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


class DraftParams(flax.struct.PyTreeNode):
    """What the draft pass has beside the target's own weights.

    Attributes:
        mask_embeddings: [M, D], inputs of the mask tokens; the i-th of a block is row min(i, M-1).
        deltas: low-rank additions to linear layers of kept layers, under the paths of the
            parameter tree: layers_i/attention/qkv/{down [in, r], up [r, out]} and so on. Empty
            where there are none.
        bridges: what stands in for a gap of skipped layers, by the name of the module behind the
            gap (layers_j, or final_norm): {down [D, r], up [r, D]}. Empty where there are none.
        layers: kept layers with the deltas already in their weights (`merge_deltas`), used in place
            of the target's, under its names; {} where there are none. Never stored.
    """

    mask_embeddings: jax.Array
    deltas: Mapping[str, Any] = flax.struct.field(default_factory=dict)
    bridges: Mapping[str, Any] = flax.struct.field(default_factory=dict)
    layers: Mapping[str, Any] = flax.struct.field(default_factory=dict)

    def masks(self, count: int) -> jax.Array:
        """The first `count` mask embeddings, [count, D]."""
        rows = np.minimum(np.arange(count), self.mask_embeddings.shape[0] - 1)
        return self.mask_embeddings[rows]


def untrained_draft(params: Params) -> DraftParams:
    """The draft before any training: one mask embedding, the mean of the token embeddings."""
    mean = mean_embedding(params).astype(float_dtype(params))
    return DraftParams(mask_embeddings=mean[None])


def mean_embedding(params: Params, power: int = 1) -> jax.Array:
    """The mean over the tokens of their embeddings, or of a power of each number: float32 [D]."""
    return _mean_embedding(params["embed"], float_dtype(params), power)


@functools.partial(jax.jit, static_argnums=(1, 2))  # one loop: no table in float32 is made
def _mean_embedding(embed: Params, dtype: jnp.dtype, power: int) -> jax.Array:
    table = int8.dequantize_tree(embed, dtype)["embedding"]
    return jnp.mean(table.astype(jnp.float32) ** power, axis=0)


def float_dtype(params: Params) -> jnp.dtype:
    """The type of the arrays that are not quantised, such as norms."""
    return params["final_norm"]["scale"].dtype


class Layout(flax.struct.PyTreeNode):
    """Where the tokens of one pass are, and what they may see.

    Attributes:
        start: int [B], the slot that each row's first token is written to; the others follow.
        positions: int32 [B, T], of the tokens in the text.
        slot_positions: int32 [B, S] or [1, S], of what each slot holds.
        seen: bool [B, T, S], True where a token may look.
        ring: static; the slots are a ring (see cache.py).
    """

    start: jax.Array
    positions: jax.Array
    slot_positions: jax.Array
    seen: jax.Array
    ring: bool = flax.struct.field(pytree_node=False, default=False)

    def within(self, window: int | None) -> "Layout":
        """Without the slots that lie `window` or more positions back."""
        if window is None:
            return self
        recent = self.slot_positions[:, None, :] > self.positions[:, :, None] - window
        return self.replace(seen=self.seen & recent)


def behind_committed(
    cache: KVCache, length: int, bidirectional: bool, slots: int, visible: int | None = None
) -> Layout:
    """The layout of decoding: `length` tokens behind each row's committed ones.

    Args:
        cache: how far the rows are.
        length: T.
        bidirectional: a token sees those behind it, too.
        slots: of the layer, all of them or a ring.
        visible: only so many slots are read; None reads all.
    """
    positions = cache.length[:, None] + jnp.arange(length, dtype=jnp.int32)
    slot_positions = jnp.arange(min(visible or slots, slots), dtype=jnp.int32)[None]
    ring = slots < cache.slots
    if ring:  # the last position written to each slot; below 0 where there was none
        newest = positions[:, -1:]
        slot_positions = newest - (newest - slot_positions) % slots
    last = positions[:, -1:] if bidirectional else positions
    seen = slot_positions[:, None] <= last[:, :, None]
    if ring:
        seen &= slot_positions[:, None] >= 0
    return Layout(cache.length, positions, slot_positions, seen, ring)


def behind_anchors(anchors: jax.Array, width: int, context: int, bidirectional: bool) -> Layout:
    """The layout of training: a block of `width` tokens at each of many places of one text.

    The cache holds the whole text in its first `context` slots; the blocks lie behind it, one
    after the other. A block sees the text before its anchor, and itself: what it would see in
    decoding.

    Args:
        anchors: int [B, A], position of each block's first token.
        width: tokens per block.
        context: tokens of the text.
        bidirectional: a block's tokens see each other both ways.
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


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang and Sennrich, arXiv 1910.07467), in float32."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg = self.config
        init = nn.initializers.constant(1.0 - cfg.norm_offset)
        scale = self.param("scale", init, (x.shape[-1],), jnp.dtype(cfg.dtype))
        y = x.astype(jnp.float32)
        if cfg.quantization:
            y = int8.norm(y, cfg.norm_eps)
        else:
            y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + cfg.norm_eps)
        return (y * (scale.astype(jnp.float32) + cfg.norm_offset)).astype(x.dtype)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    scale: float,
    softcap: float | None,
    reproducible: bool = False,
) -> jax.Array:
    """Grouped-query attention over all slots of a cache, softmax in float32.

    Where the scores would take more than `_WHOLE_BYTES`, it goes through the slots block by block,
    so that memory does not grow with the product of both lengths.

    Args:
        q: [B, T, N, H].
        k, v: [B, K, S, H].
        mask: bool [B, T, S], True where a query may look; at one slot at least.
        scale: multiplies the scores.
        softcap: c of c · tanh(scores / c), or None.
        reproducible: a token's result has the same bits, however many tokens there are (int8.py);
            not where it goes block by block.

    Returns:
        [B, T, N, H].
    """
    b, t, n, h = q.shape
    kv, s = k.shape[1], k.shape[2]
    # The G queries that share a key head become rows of one matrix product per (row, key head).
    # Token by token, as q lies in memory, so that with one key head nothing is moved.
    rows = q.reshape(b, t, kv, n // kv, h).swapaxes(1, 2).reshape(b, kv, t * (n // kv), h)

    def scores(keys: jax.Array, mask: jax.Array) -> jax.Array:
        """[B, K, T, G, slots]"""
        x = attention_scores(rows, keys, reproducible)
        x = x.reshape(b, kv, t, n // kv, -1) * scale
        if softcap is not None:
            x = softcap * jnp.tanh(x / softcap)
        return jnp.where(mask[:, None, :, None], x, jnp.finfo(jnp.float32).min)

    def mix(weights: jax.Array, values: jax.Array) -> jax.Array:
        """[B, K, T, G, H]"""
        weights = weights.astype(values.dtype).reshape(b, kv, t * (n // kv), -1)
        out = attention_mix(weights, values, reproducible)
        return out.reshape(b, kv, t, n // kv, h)

    bytes_per_slot = 4 * b * n * t
    if s * bytes_per_slot <= _WHOLE_BYTES:
        softmax = int8.softmax if reproducible else jax.nn.softmax
        out = mix(softmax(scores(k, mask)), v)
    else:
        block = min(s, max(_FEWEST_SLOTS, _BLOCK_BYTES // bytes_per_slot))
        out = _block_by_block(scores, mix, k, v, mask, block, (b, kv, t, n // kv, h))
    return out.astype(q.dtype).swapaxes(1, 2).reshape(b, t, n, h)


_WHOLE_BYTES = 64 * 2**20  # of scores that are computed all at once
_BLOCK_BYTES = 16 * 2**20  # of those of a block, otherwise: what a CPU's caches hold
_FEWEST_SLOTS = 128  # in a block; fewer are not worth a product's overhead


def _block_by_block(
    scores: Callable[[jax.Array, jax.Array], jax.Array],
    mix: Callable[[jax.Array, jax.Array], jax.Array],
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    block: int,
    shape: tuple[int, ...],
) -> jax.Array:
    """Softmax attention with a running maximum and sum (Milakov and Gimelshein, arXiv 1805.02867).

    Blocks that no token looks at cost nothing. A gradient computes the scores of each block anew.
    """
    slots = k.shape[2]

    def step(carry: tuple[jax.Array, ...], start: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
        first = jnp.minimum(start, slots - block)  # the last block overlaps the one before
        fresh = first + jnp.arange(block) >= start
        keys, values = (jax.lax.dynamic_slice_in_dim(x, first, block, axis=2) for x in (k, v))
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
    # A token that sees nothing of a block takes all of it in with equal weights, until the first
    # score that counts shrinks them to 0.
    begin = (jnp.zeros(shape, jnp.float32), one, one + jnp.finfo(jnp.float32).min)
    starts = jnp.arange(0, slots, block)
    (out, total, _), _ = jax.lax.scan(jax.checkpoint(step), begin, starts)
    return out / total


def _linear(cfg: ModelConfig, name: str, features: int, use_bias: bool) -> Linear:
    return Linear(features, use_bias, cfg.dtype, cfg.quantization is not None, name=name)


def _norm_heads(cfg: ModelConfig, name: str, heads: jax.Array) -> jax.Array:
    """RMS norm of [B, T, heads, H], over each head or over all together."""
    x = heads.reshape(*heads.shape[:2], -1) if cfg.qk_norm_joint else heads
    return RMSNorm(cfg, name=name)(x).reshape(heads.shape)


class Attention(nn.Module):
    """Self-attention of one layer; writes the block into the cache, then attends to the cache."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        layout: Layout,
        rotary: Rotary | None,
        deltas: Mapping[str, Any],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        cfg = self.config
        b, t, _ = x.shape
        n, kv, h = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        qkv = _linear(cfg, "qkv", cfg.qkv_features, cfg.qkv_bias)(x, deltas.get("qkv"))
        q, k, v = jnp.split(qkv.reshape(b, t, n + 2 * kv, h), (n, n + kv), axis=2)
        if cfg.qk_norm:
            q, k = _norm_heads(cfg, "q_norm", q), _norm_heads(cfg, "k_norm", k)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        keys = write(keys, k.swapaxes(1, 2), layout.start, layout.ring)
        values = write(values, v.swapaxes(1, 2), layout.start, layout.ring)
        scale = h**-0.5 if cfg.attention_scale is None else cfg.attention_scale
        visible = layout.seen.shape[-1]
        k, v = keys[:, :, :visible], values[:, :, :visible]
        reproducible = cfg.quantization is not None
        out = attend(q, k, v, layout.seen, scale, cfg.attention_softcap, reproducible)
        out = out.reshape(b, t, n * h)
        linear = _linear(cfg, "out", cfg.hidden_size, cfg.attention_out_bias)
        return linear(out, deltas.get("out")), keys, values


class MLP(nn.Module):
    """Gated feed-forward layer: down(activation(gate(x)) · up(x))."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, deltas: Mapping[str, Any]) -> jax.Array:
        cfg = self.config
        linear = _linear(cfg, "gate_up", 2 * cfg.intermediate_size, cfg.mlp_bias)
        gate, up = jnp.split(linear(x, deltas.get("gate_up")), 2, axis=-1)
        hidden = _ACTIVATIONS[cfg.activation](gate) * up
        linear = _linear(cfg, "down", cfg.hidden_size, cfg.mlp_bias)
        return linear(hidden, deltas.get("down"))


def _residual(cfg: ModelConfig, norm: str, y: jax.Array) -> jax.Array:
    """What attention or MLP adds to the residual stream, given its output."""
    if cfg.post_norms:
        y = RMSNorm(cfg, name=norm)(y)
    if cfg.residual_scale == 1.0:
        return y
    return (y.astype(jnp.float32) * cfg.residual_scale).astype(y.dtype)


class Block(nn.Module):
    """One layer: attention and MLP, each between norms and around a residual connection."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        layout: Layout,
        rotary: Rotary | None,
        deltas: Mapping[str, Any],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        cfg = self.config
        y = RMSNorm(cfg, name="attention_norm")(x) if cfg.pre_norms else x
        attention = Attention(cfg, name="attention")
        y, keys, values = attention(y, keys, values, layout, rotary, deltas.get("attention", {}))
        x = x + _residual(cfg, "post_attention_norm", y)
        y = RMSNorm(cfg, name="mlp_norm")(x) if cfg.pre_norms else x
        y = MLP(cfg, name="mlp")(y, deltas.get("mlp", {}))
        x = x + _residual(cfg, "post_mlp_norm", y)
        return x, keys, values


class Pass(NamedTuple):
    """What the layers of one pass share.

    Attributes:
        layouts: one for each layer.
        rotary: each layer's cosines and sines; None where nothing is rotated.
        draft: the draft's own parameters; None in a pass of the target.
    """

    layouts: tuple[Layout, ...]
    rotary: tuple[Rotary | None, ...]
    draft: DraftParams | None


class Transformer(nn.Module):
    """The decoder. Its parameter tree is documented in docs/checkpoint.md.

    A pass is `begin`, `cross` and `layer` for each layer, `cross` for the head, and `head`. `bound`
    gives an instance whose methods may be called one by one.

    Attributes:
        config: the model.
        remat: the backward pass computes activations again, layer by layer.
    """

    config: ModelConfig
    remat: bool = False

    def setup(self) -> None:
        cfg = self.config
        block = nn.remat(Block) if self.remat else Block
        self.embed = Embedding(cfg)
        self.layers = [block(cfg) for _ in range(cfg.num_layers)]
        self.final_norm = RMSNorm(cfg)
        if not cfg.tie_embeddings:
            self.lm_head = Head(cfg)

    def __call__(
        self,
        tokens: jax.Array,
        cache: KVCache,
        *,
        skip: tuple[bool, ...] | None = None,
        keep: jax.Array | None = None,
        draft: DraftParams | None = None,
        num_masks: int = 0,
        bidirectional: bool = False,
        visible: int | None = None,
        layout: Layout | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Logits and cache of a block of tokens: see `forward`."""
        x, shared = self.begin(
            tokens,
            cache,
            draft=draft,
            num_masks=num_masks,
            bidirectional=bidirectional,
            visible=visible,
            layout=layout,
        )
        x, cache = self.run_layers(x, cache, shared, skip=skip, keep=keep)
        return self.head(x), cache

    def begin(
        self,
        tokens: jax.Array,
        cache: KVCache,
        *,
        draft: DraftParams | None = None,
        num_masks: int = 0,
        bidirectional: bool = False,
        visible: int | None = None,
        layout: Layout | None = None,
    ) -> tuple[jax.Array, Pass]:
        """The inputs of the first layer, [B, T·(1+num_masks), D], and what all layers share."""
        cfg = self.config
        x = self.embed(tokens)
        if num_masks:
            assert draft is not None
            x = _with_masks(x, draft.masks(num_masks).astype(x.dtype))
        if cfg.embedding_scale != 1.0:
            x = x * jnp.asarray(cfg.embedding_scale, x.dtype)

        # Layers of equal window and slots share one layout, those of equal rotary settings one
        # table.
        kinds = [(cfg.window(i), keys.shape[2]) for i, keys in enumerate(cache.keys)]
        layouts = {}
        for window, slots in dict.fromkeys(kinds):
            whole = layout or behind_committed(cache, x.shape[1], bidirectional, slots, visible)
            if whole.ring and slots < (window or slots) + x.shape[1] - 1:
                raise ValueError(
                    f"a block of {x.shape[1]} tokens does not fit a ring of {slots} slots and a "
                    f"window of {window}: init_cache with largest_block={x.shape[1]} or more"
                )
            layouts[window, slots] = whole.within(window)
        positions = whole.positions
        ropes = [cfg.layer_rope(i) for i in range(cfg.num_layers)]
        rotary = {
            rope: rotary_table(rope, cfg.head_dim, positions, cache.prompt_length)
            for rope in dict.fromkeys(ropes)
            if rope is not None
        }
        by_layer = tuple(None if rope is None else rotary[rope] for rope in ropes)
        return x, Pass(tuple(layouts[kind] for kind in kinds), by_layer, draft)

    def run_layers(
        self,
        x: jax.Array,
        cache: KVCache,
        shared: Pass,
        *,
        skip: tuple[bool, ...] | None = None,
        keep: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """All layers, or those that `skip` or `keep` leave: what the head takes, and the cache."""
        assert skip is None or keep is None
        gap: bool | jax.Array = False  # whether the layer before is skipped
        for i in range(self.config.num_layers):
            if skip is not None and skip[i]:
                gap = True
                continue
            y, cache = self.layer(i, self.cross(i, x, gap, shared), cache, shared)
            if keep is None:
                x, gap = y, False
            else:
                x, gap = jnp.where(keep[i], y, x), ~keep[i]
        return self.cross(self.config.num_layers, x, gap, shared), cache

    def cross(self, i: int, x: jax.Array, gap: bool | jax.Array, shared: Pass) -> jax.Array:
        """Takes x over the bridge to layer i (L: the head), if there is one, where `gap` is True.

        Args:
            i: the layer after the gap.
            x: [B, T, D].
            gap: whether the layer before is skipped; an array is broadcast to [B, T, D].
            shared: of this pass.
        """
        name = f"layers_{i}" if i < self.config.num_layers else "final_norm"
        bridge = None if shared.draft is None else shared.draft.bridges.get(name)
        if bridge is None or gap is False:
            return x
        crossed = _bridge(x, bridge, self.config.norm_eps)
        return crossed if gap is True else jnp.where(gap, crossed, x)

    def layer(
        self, i: int, x: jax.Array, cache: KVCache, shared: Pass
    ) -> tuple[jax.Array, KVCache]:
        """Layer i: from [B, T, D] to [B, T, D]; its keys and values are written into the cache."""
        deltas = {} if shared.draft is None else shared.draft.deltas.get(f"layers_{i}", {})
        keys, values = list(cache.keys), list(cache.values)
        x, keys[i], values[i] = self.layers[i](
            x, keys[i], values[i], shared.layouts[i], shared.rotary[i], deltas
        )
        return x, cache.replace(keys=tuple(keys), values=tuple(values))

    def head(self, x: jax.Array) -> jax.Array:
        """Logits float32 [B, T, V] of what the last layer gives, [B, T, D]."""
        cfg = self.config
        x = self.final_norm(x)
        logits = self.embed.logits(x) if cfg.tie_embeddings else self.lm_head(x)
        if cfg.logit_divisor != 1.0:
            logits = logits / cfg.logit_divisor
        if cfg.logit_softcap is not None:
            logits = cfg.logit_softcap * jnp.tanh(logits / cfg.logit_softcap)
        return logits


class Embedding(nn.Module):
    """The table of token embeddings, [V, D]; in int8 with a scale per token, [V]."""

    config: ModelConfig

    def setup(self) -> None:
        cfg = self.config
        shape = (cfg.vocab_size, cfg.hidden_size)
        if cfg.quantization:
            self.embedding, self.scale = int8.declare(self, "embedding", shape, INIT_DEVIATION)
        else:
            init = nn.initializers.normal(INIT_DEVIATION)
            self.embedding = self.param("embedding", init, shape, jnp.dtype(cfg.dtype))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """The embeddings of tokens [B, T]: [B, T, D]."""
        x = self.embedding[tokens]
        if self.config.quantization:
            x = (x * self.scale[tokens][..., None]).astype(self.config.dtype)
        return x

    def logits(self, x: jax.Array) -> jax.Array:
        """What a head that is tied to the table makes of [B, T, D]: float32 [B, T, V]."""
        if self.config.quantization:
            return int8.project(x, self.embedding, self.scale, jnp.float32)
        return project(x, self.embedding, jnp.float32)


class Head(nn.Module):
    """The output head, weight [V, D]: from [B, T, D] to float32 [B, T, V]."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg = self.config
        shape = (cfg.vocab_size, cfg.hidden_size)
        if cfg.quantization:
            weight, scale = int8.declare(self, "weight", shape, INIT_DEVIATION)
            return int8.project(x, weight, scale, jnp.float32)
        weight = self.param("weight", random_weight, shape, jnp.dtype(cfg.dtype))
        return project(x, weight, jnp.float32)


def _with_masks(x: jax.Array, masks: jax.Array) -> jax.Array:
    """Puts the M mask inputs [M, D] behind each token of [B, T, D]: [B, T·(1+M), D]."""
    b, t, d = x.shape
    masks = jnp.broadcast_to(masks, (b, t, *masks.shape))
    return jnp.concatenate([x[:, :, None], masks], axis=2).reshape(b, -1, d)


def _bridge(x: jax.Array, bridge: Mapping[str, jax.Array], eps: float) -> jax.Array:
    """x with what a low-rank stand-in for the skipped layers adds to the residual stream.

    Nonlinear like the layers it stands for; the input is normalised, as theirs is.
    """
    y = x.astype(jnp.float32)
    y = (y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)).astype(x.dtype)
    return x + low_rank(y, bridge, jax.nn.silu)


def bound(
    config: ModelConfig, params: Params, draft: DraftParams | None = None, *, remat: bool = False
) -> Transformer:
    """The model with its parameters: the merged layers of a draft in place of the target's."""
    if draft is not None:
        params = {**params, **draft.layers}
    return Transformer(config, remat).bind({"params": params})


def forward(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    cache: KVCache,
    *,
    skip: tuple[bool, ...] | None = None,
    keep: jax.Array | None = None,
    draft: DraftParams | None = None,
    num_masks: int = 0,
    bidirectional: bool = False,
    visible: int | None = None,
    layout: Layout | None = None,
    remat: bool = False,
) -> tuple[jax.Array, KVCache]:
    """Runs a block of tokens that follows each row's committed tokens.

    Args:
        config: the model.
        params: its parameter tree.
        tokens: int [B, T], at positions length … length+T-1 of each row.
        cache: keys and values of the committed tokens.
        skip: static, one entry per layer; True leaves the layer out of the program. None runs all.
        keep: bool [L]; a layer whose entry is False is computed and its output is not used. One
            program then serves all sets of layers. Excludes `skip`.
        draft: the draft's own parameters; None runs the target.
        num_masks: static, mask tokens of the draft that follow each of the tokens as more inputs:
            T·(1+num_masks) in all, the T below.
        bidirectional: the block's tokens see each other both ways, not only backwards.
        visible: static; only the first `visible` slots of the cache are read, so that a long cache
            costs nothing while it is empty. The block must end before it. None reads all.
        layout: positions and mask of a block that does not follow the committed tokens (training);
            `bidirectional` and `visible` are then ignored.
        remat: static; the backward pass computes activations again, layer by layer.

    Returns:
        (logits, cache): float32 [B, T, V]; and the cache with the block's keys and values written
        after `length`, which is unchanged: committing is the caller's decision.
    """
    return bound(config, params, draft, remat=remat)(
        tokens,
        cache,
        skip=skip,
        keep=keep,
        draft=draft,
        num_masks=num_masks,
        bidirectional=bidirectional,
        visible=visible,
        layout=layout,
    )


def fill_cache(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    cache: KVCache,
    *,
    visible: int | None = None,
    layout: Layout | None = None,
    remat: bool = False,
) -> KVCache:
    """`forward` of all layers without the logits: the cache with the block's keys and values."""
    model = bound(config, params, remat=remat)
    x, shared = model.begin(tokens, cache, visible=visible, layout=layout)
    return model.run_layers(x, cache, shared)[1]


@functools.partial(jax.jit, static_argnames="config")
def forward_logits(config: ModelConfig, params: Params, tokens: jax.Array) -> jax.Array:
    """Logits of whole sequences, without decoding.

    Args:
        config: the model.
        params: its parameter tree.
        tokens: int [B, T].

    Returns:
        float32 [B, T, V]; row t is the distribution of the token at t+1.
    """
    batch, length = tokens.shape
    cache = init_cache(config, batch, length, jnp.full((batch,), length))
    return forward(config, params, tokens, cache)[0]


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Random parameters, N(0, 0.02²) for weights; the tree that checkpoints hold."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    cache = init_cache(config, 1, 1, jnp.zeros((1,), jnp.int32))
    return Transformer(config).init(key, tokens, cache)["params"]


def abstract_params(config: ModelConfig) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct`s; nothing is allocated."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def num_params(config: ModelConfig) -> int:
    """Parameters of the model; tied embeddings count once, and scales of int8 weights not."""
    unquantized = config.replace(quantization=None)
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(unquantized)))


def weight_bytes(config: ModelConfig) -> int:
    """Bytes of the model's arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract_params(config)))
