"""The decoder in flax linen. One forward pass serves prefill, AR step, draft and verify.

Transformer > Block > Attention, MLP, RMSNorm. The model families differ in ModelConfig only.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from s3d_jax.cache import KVCache, init_cache, write
from s3d_jax.config import ModelConfig
from s3d_jax.linear import Linear, attention_product, project
from s3d_jax.rope import rotary_table, rotate

Params = Mapping[str, Any]

_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


class DraftParams(flax.struct.PyTreeNode):
    """What the draft pass has beside the target's own weights.

    Attributes:
        mask_embeddings: [M, D], inputs of the mask tokens; the i-th of a block is row min(i, M-1).
    """

    mask_embeddings: jax.Array


def untrained_draft(params: Params) -> DraftParams:
    """The draft before any training: one mask embedding, the mean of the token embeddings."""
    embedding = params["embed"]["embedding"]
    mean = jnp.mean(embedding, axis=0, keepdims=True, dtype=jnp.float32)
    return DraftParams(mask_embeddings=mean.astype(embedding.dtype))


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang and Sennrich, arXiv 1910.07467), in float32."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg = self.config
        init = nn.initializers.constant(1.0 - cfg.norm_offset)
        scale = self.param("scale", init, (x.shape[-1],), jnp.dtype(cfg.dtype))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + cfg.norm_eps)
        return (y * (scale.astype(jnp.float32) + cfg.norm_offset)).astype(x.dtype)


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, scale: float, softcap: float | None
) -> jax.Array:
    """Grouped-query attention over all slots of a cache, softmax in float32.

    Args:
        q: [B, T, N, H].
        k, v: [B, K, S, H].
        mask: bool [B, T, S], True where a query may look.
        scale: multiplies the scores.
        softcap: c of c · tanh(scores / c), or None.

    Returns:
        [B, T, N, H].
    """
    b, t, n, h = q.shape
    kv, s = k.shape[1], k.shape[2]
    # The G queries that share a key head become rows of one matrix product per (row, key head).
    rows = q.reshape(b, t, kv, n // kv, h).transpose(0, 2, 3, 1, 4).reshape(b, kv, n // kv * t, h)
    scores = attention_product("bkqh,bksh->bkqs", rows, k, t == 1)
    scores = scores.reshape(b, kv, n // kv, t, s) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(b, kv, n // kv * t, s)
    out = attention_product("bkqs,bksh->bkqh", weights, v, t == 1).astype(q.dtype)
    return out.reshape(b, kv, n // kv, t, h).transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)


class Attention(nn.Module):
    """Self-attention of one layer; writes the block into the cache, then attends to the cache."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        start: jax.Array,
        mask: jax.Array,
        rotary: tuple[jax.Array, jax.Array],
        visible: int | None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        cfg = self.config
        b, t, _ = x.shape
        n, kv, h = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        qkv = Linear(cfg.qkv_features, cfg.qkv_bias, cfg.dtype, name="qkv")(x)
        q, k, v = jnp.split(qkv.reshape(b, t, n + 2 * kv, h), (n, n + kv), axis=2)
        if cfg.qk_norm:
            q, k = RMSNorm(cfg, name="q_norm")(q), RMSNorm(cfg, name="k_norm")(k)
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        keys = write(keys, k.swapaxes(1, 2), start)
        values = write(values, v.swapaxes(1, 2), start)
        scale = h**-0.5 if cfg.attention_scale is None else cfg.attention_scale
        k, v = keys[:, :, :visible], values[:, :, :visible]
        out = attend(q, k, v, mask, scale, cfg.attention_softcap).reshape(b, t, n * h)
        out = Linear(cfg.hidden_size, cfg.attention_out_bias, cfg.dtype, name="out")(out)
        return out, keys, values


class MLP(nn.Module):
    """Gated feed-forward layer: down(activation(gate(x)) · up(x))."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg = self.config
        gate_up = Linear(2 * cfg.intermediate_size, cfg.mlp_bias, cfg.dtype, name="gate_up")(x)
        gate, up = jnp.split(gate_up, 2, axis=-1)
        hidden = _ACTIVATIONS[cfg.activation](gate) * up
        return Linear(cfg.hidden_size, cfg.mlp_bias, cfg.dtype, name="down")(hidden)


class Block(nn.Module):
    """One layer: attention and MLP, each behind a norm and around a residual connection."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        start: jax.Array,
        mask: jax.Array,
        rotary: tuple[jax.Array, jax.Array],
        visible: int | None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        cfg = self.config
        y = RMSNorm(cfg, name="attention_norm")(x)
        attention = Attention(cfg, name="attention")
        y, keys, values = attention(y, keys, values, start, mask, rotary, visible)
        x = x + (RMSNorm(cfg, name="post_attention_norm")(y) if cfg.post_norms else y)
        y = MLP(cfg, name="mlp")(RMSNorm(cfg, name="mlp_norm")(x))
        x = x + (RMSNorm(cfg, name="post_mlp_norm")(y) if cfg.post_norms else y)
        return x, keys, values


class Transformer(nn.Module):
    """The decoder. Its parameter tree is documented in docs/checkpoint.md."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        cache: KVCache,
        *,
        skip: tuple[bool, ...] | None = None,
        mask_embeddings: jax.Array | None = None,
        bidirectional: bool = False,
        compute_logits: bool = True,
        visible: int | None = None,
    ) -> tuple[jax.Array | None, KVCache]:
        """Runs a block of tokens that follows each row's committed tokens.

        Args:
            tokens: int [B, T], at positions length … length+T-1 of each row.
            cache: keys and values of the committed tokens.
            skip: static, one entry per layer; True leaves the layer out of the program. None runs
                all.
            mask_embeddings: [M, D], appended to the block as M more inputs (the draft's mask
                tokens).
            bidirectional: the block's tokens see each other both ways, not only backwards.
            compute_logits: False where only the cache is wanted (prefill).
            visible: static; only the first `visible` slots of the cache are read, so that long
                caches cost nothing while they are empty. The block must end before it. None reads
                all.

        Returns:
            (logits, cache): float32 [B, T+M, V] or None; and the cache with the block's keys and
            values written behind `length`, which is unchanged: committing is the caller's decision.
        """
        cfg = self.config
        embedding = Embedding(cfg, name="embed")()
        x = embedding[tokens]
        if mask_embeddings is not None:
            rows = (x.shape[0], *mask_embeddings.shape)
            x = jnp.concatenate(
                [x, jnp.broadcast_to(mask_embeddings.astype(x.dtype), rows)], axis=1
            )
        if cfg.embedding_scale != 1.0:
            x = x * jnp.asarray(cfg.embedding_scale, x.dtype)

        start = cache.length
        positions = start[:, None] + jnp.arange(x.shape[1], dtype=jnp.int32)
        last = positions[:, -1:] if bidirectional else positions
        slots = jnp.arange(visible or cache.slots, dtype=jnp.int32)
        seen = slots[None, None, :] <= last[:, :, None]
        # Equal windows and equal rotary settings share one mask and one table.
        windows = {w: _in_window(seen, slots, positions, w) for w in set(self._windows())}
        rotary = {
            rope: rotary_table(rope, cfg.head_dim, positions, cache.prompt_length)
            for rope in {self._rope(i) for i in range(cfg.num_layers)}
        }
        keys, values = list(cache.keys), list(cache.values)
        for i in range(cfg.num_layers):
            if skip is not None and skip[i]:
                continue
            x, keys[i], values[i] = Block(cfg, name=f"layers_{i}")(
                x, keys[i], values[i], start, windows[cfg.window(i)], rotary[self._rope(i)], visible
            )
        cache = cache.replace(keys=tuple(keys), values=tuple(values))
        if not compute_logits:
            return None, cache

        x = RMSNorm(cfg, name="final_norm")(x)
        if cfg.tie_embeddings:
            logits = project(x, embedding, jnp.float32, transposed=True)
        else:
            logits = project(x, Head(cfg, name="lm_head")(), jnp.float32)
        if cfg.logit_softcap is not None:
            logits = cfg.logit_softcap * jnp.tanh(logits / cfg.logit_softcap)
        return logits, cache

    def _windows(self) -> list[int | None]:
        return [self.config.window(i) for i in range(self.config.num_layers)]

    def _rope(self, layer: int) -> Any:
        cfg = self.config
        local = cfg.local_rope is not None and cfg.window(layer) is not None
        return cfg.local_rope if local else cfg.rope


class Embedding(nn.Module):
    """The table of token embeddings, [V, D]."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> jax.Array:
        cfg = self.config
        init, shape = nn.initializers.normal(stddev=0.02), (cfg.vocab_size, cfg.hidden_size)
        return self.param("embedding", init, shape, jnp.dtype(cfg.dtype))


class Head(nn.Module):
    """The output head's weight, [D, V]."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> jax.Array:
        cfg = self.config
        init, shape = nn.initializers.normal(stddev=0.02), (cfg.hidden_size, cfg.vocab_size)
        return self.param("weight", init, shape, jnp.dtype(cfg.dtype))


def _in_window(
    seen: jax.Array, slots: jax.Array, positions: jax.Array, window: int | None
) -> jax.Array:
    """Takes away the slots that lie `window` or more positions back."""
    if window is None:
        return seen
    return seen & (slots[None, None, :] > positions[:, :, None] - window)


def forward(
    config: ModelConfig, params: Params, tokens: jax.Array, cache: KVCache, **options: Any
) -> tuple[jax.Array | None, KVCache]:
    """`Transformer.__call__` as a pure function of the parameters; see there."""
    output: Any = Transformer(config).apply({"params": params}, tokens, cache, **options)
    return output


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
    logits, _ = forward(config, params, tokens, cache)
    assert logits is not None
    return logits


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Random parameters, N(0, 0.02²) for weights; the tree that checkpoints hold."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    cache = init_cache(config, 1, 1, jnp.zeros((1,), jnp.int32))
    return Transformer(config).init(key, tokens, cache)["params"]


def abstract_params(config: ModelConfig) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct`s; nothing is allocated."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def num_params(config: ModelConfig) -> int:
    """Parameters of the model; tied embeddings count once."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))
