"""The two streams of a draft's training: the target over whole texts, the draft at many anchors.

In decoding the kept layers see full-depth keys and values of the context, and the short-depth
stream of the mask block alone. So one full-depth pass of the target over the text gives the keys,
values and target logits; then one draft pass runs the blocks of many anchors against them.

Letters: B rows, T tokens of a row, A anchors per row, γ draft tokens, V vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np

from s3d_jax.nn.attention import layout_after_anchors
from s3d_jax.nn.cache import KVCache, init_cache
from s3d_jax.nn.draft import DraftParams, begin_chain, chained, recall, with_head
from s3d_jax.nn.layers import bridge_inputs
from s3d_jax.nn.transformer import bound, fill_cache, hidden_states, logits_of
from s3d_jax.settings.drafting import DraftConfig
from s3d_jax.settings.model import ModelConfig
from s3d_jax.weights.trees import Params, float_dtype


def target_stream(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    slots: int,
    *,
    head: DraftParams | None = None,
    remat: bool = False,
) -> tuple[jax.Array, KVCache]:
    """One full-depth pass over whole texts.

    Args:
        config, params: the target.
        tokens: int [B, T].
        slots: of the cache, T or more.
        head: a draft whose vocabulary is enough; None is the target's.
        remat: see `forward`.

    Returns:
        (logits, cache): float32 [B, T, V], or [B, T, V'] of the draft's vocabulary; and the cache
        with T committed tokens.
    """
    hidden, cache = text_states(config, params, tokens, slots, remat=remat)
    return logits_of(config, params, hidden, head), cache


def text_states(
    config: ModelConfig, params: Params, tokens: jax.Array, slots: int, *, remat: bool = False
) -> tuple[jax.Array, KVCache]:
    """`target_stream` before the head: what it reads, [B, T, D], and the cache."""
    cache = text_cache(config, params, tokens, slots)
    visible = tokens.shape[1]
    hidden, cache = hidden_states(config, params, tokens, cache, visible=visible, remat=remat)
    return hidden, _committed(cache, tokens)


def gap_streams(
    config: ModelConfig,
    params: Params,
    draft_config: DraftConfig,
    draft: DraftParams,
    tokens: jax.Array,
    anchors: jax.Array,
    after: int,
    recalls: int,
) -> tuple[jax.Array, jax.Array]:
    """What a bridge reads, and what it would have to add to stand for the layers of its gap.

    Args:
        config, params, draft_config, draft, tokens, anchors: as in `draft_stream`.
        after: static, the layer after the gap (L: the head). The draft has no bridge there.
        recalls: static, layers that the bridge recalls (`recall`).

    Returns:
        (inputs, wanted): [B, A·γ, D+F], see `bridge_inputs`; and float32 [B, A·γ, D], what the
        target's stream at the token has more than the draft's.
    """
    gamma, length = draft_config.gamma, tokens.shape[1]
    cache = text_cache(config, params, tokens, length + anchors.shape[1] * gamma)
    model = bound(config, params)
    x, shared = model.begin(tokens, cache, visible=length)
    full, cache = model.run_layers(x, cache, shared, layers=range(after))
    rest = range(after, config.num_layers)
    _, cache = model.run_layers(full, cache, shared, layers=rest)
    cache = _committed(cache, tokens)
    bidirectional = draft_config.block_attention == "bidirectional"
    model = bound(config, params, draft)
    x, shared = model.begin(
        jnp.take_along_axis(tokens, anchors, axis=1),
        cache,
        draft=draft,
        num_masks=gamma - 1,
        layout=layout_after_anchors(anchors, gamma, length, bidirectional),
    )
    x, _ = model.run_layers(x, cache, shared, skip=draft_config.skip, layers=range(after))
    known = None
    if recalls:
        known = recall(cache, shared.layouts, recalls, gamma, config.norm_eps)
    rows = jnp.minimum(anchors[:, :, None] + jnp.arange(gamma), length - 1)
    rows = rows.reshape(len(tokens), -1)[:, :, None]
    wanted = jnp.take_along_axis(full, rows, axis=1).astype(jnp.float32) - x.astype(jnp.float32)
    return bridge_inputs(x, config.norm_eps, known), wanted


def target_cache(config: ModelConfig, params: Params, tokens: jax.Array, slots: int) -> KVCache:
    """The cache of `target_stream`, without computing logits."""
    cache = text_cache(config, params, tokens, slots)
    return _committed(fill_cache(config, params, tokens, cache, visible=tokens.shape[1]), tokens)


def text_cache(config: ModelConfig, params: Params, tokens: jax.Array, slots: int) -> KVCache:
    """An empty cache for `target_stream`."""
    # Keys and values are floats of the weights' type, which in pretraining is not the config's.
    config = config.replace(dtype=float_dtype(params).name, kv_cache=None)
    batch = tokens.shape[0]
    # One slot more: a write of a single token takes two (`cache.write`).
    return init_cache(config, batch, slots + 1, np.zeros(batch, np.int32))


def _committed(cache: KVCache, tokens: jax.Array) -> KVCache:
    return cache.replace(length=jnp.full((tokens.shape[0],), tokens.shape[1], jnp.int32))


def draft_stream(
    config: ModelConfig,
    params: Params,
    draft_config: DraftConfig,
    draft: DraftParams,
    tokens: jax.Array,
    anchors: jax.Array,
    cache: KVCache,
    *,
    keep: jax.Array | None = None,
    remat: bool = False,
) -> jax.Array:
    """The draft pass of every anchor's block, all at once.

    Args:
        config, params: the target.
        draft_config, draft: settings and arrays of the draft.
        tokens: int [B, T].
        anchors: int [B, A], the position of each block's first row, and of x_n. Two passes have x_n
            as that row's input. Merged mode has a mask, and only the chain knows x_n.
        cache: of `target_stream`, with A·γ slots after the text.
        keep: bool [L], the layers to run in place of `draft_config.skip`; see `forward`.
        remat: see `forward`.

    Returns:
        float32 [B, A·γ, V]; row a·γ+i is q for the token at position anchors[a] + 1 + i, as the
        S3D drafter gives it if the tokens before that one are drafted. With a vocabulary of its own
        V is the draft's.
    """
    gamma, length = draft_config.gamma, tokens.shape[1]
    bidirectional = draft_config.block_attention == "bidirectional"
    merged = draft_config.mode == "merged"
    draft = with_head(config, params, draft)
    hidden, _ = hidden_states(
        config,
        params,
        jnp.take_along_axis(tokens, anchors, axis=1),
        cache,
        skip=draft_config.skip if keep is None else None,
        keep=keep,
        draft=draft,
        num_masks=draft_config.num_masks,
        mask_places="alone" if merged else "each",
        layout=layout_after_anchors(anchors, gamma, length, bidirectional),
        remat=remat,
    )
    logits = logits_of(config, params, hidden, draft)
    first = 0 if merged else 1  # of a block's rows that the chain corrects
    if not draft.chain or gamma == first:
        return logits

    hidden, blocks = (x.reshape(-1, gamma, x.shape[-1]) for x in (hidden, logits))
    places = jnp.minimum(anchors[:, :, None] + jnp.arange(first, gamma), length - 1)
    before = jnp.take_along_axis(tokens, places.reshape(len(tokens), -1), axis=1)
    before, rest = before.reshape(-1, gamma - first), blocks[:, first:]
    chain = begin_chain(config, params, draft, hidden[:, first:], rest)
    rest = chained(config, params, draft, chain, rest, before)
    return jnp.concatenate([blocks[:, :first], rest], axis=1).reshape(logits.shape)
