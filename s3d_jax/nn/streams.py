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
from s3d_jax.nn.draft import DraftParams, begin_chain, chained, with_head
from s3d_jax.nn.transformer import fill_cache, forward, hidden_states, logits_of
from s3d_jax.settings.drafting import DraftConfig
from s3d_jax.settings.model import ModelConfig
from s3d_jax.weights.trees import Params, float_dtype


def target_stream(
    config: ModelConfig, params: Params, tokens: jax.Array, slots: int, *, remat: bool = False
) -> tuple[jax.Array, KVCache]:
    """One full-depth pass over whole texts.

    Args:
        config, params: the target.
        tokens: int [B, T].
        slots: of the cache, T or more.
        remat: see `forward`.

    Returns:
        (logits, cache): float32 [B, T, V]; and the cache with T committed tokens.
    """
    cache = text_cache(config, params, tokens, slots)
    visible = tokens.shape[1]
    logits, cache = forward(config, params, tokens, cache, visible=visible, remat=remat)
    return logits, _committed(cache, tokens)


def target_cache(config: ModelConfig, params: Params, tokens: jax.Array, slots: int) -> KVCache:
    """The cache of `target_stream`, without computing logits."""
    cache = text_cache(config, params, tokens, slots)
    return _committed(fill_cache(config, params, tokens, cache, visible=tokens.shape[1]), tokens)


def text_cache(config: ModelConfig, params: Params, tokens: jax.Array, slots: int) -> KVCache:
    """An empty cache for `target_stream`."""
    # Keys and values are of the weights' type, which in pretraining is not the config's.
    config = config.replace(dtype=float_dtype(params).name)
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
        anchors: int [B, A], the position of each block's first token.
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
    draft = with_head(config, params, draft)
    hidden, _ = hidden_states(
        config,
        params,
        jnp.take_along_axis(tokens, anchors, axis=1),
        cache,
        skip=draft_config.skip if keep is None else None,
        keep=keep,
        draft=draft,
        num_masks=gamma - 1,
        layout=layout_after_anchors(anchors, gamma, length, bidirectional),
        remat=remat,
    )
    logits = logits_of(config, params, hidden, draft)
    if not draft.chain or gamma == 1:
        return logits

    hidden, blocks = (x.reshape(-1, gamma, x.shape[-1]) for x in (hidden, logits))
    places = jnp.minimum(anchors[:, :, None] + jnp.arange(1, gamma), length - 1)
    before = jnp.take_along_axis(tokens, places.reshape(len(tokens), -1), axis=1)
    before, rest = before.reshape(-1, gamma - 1), blocks[:, 1:]
    chain = begin_chain(config, params, draft, hidden[:, 1:], rest)
    rest = chained(config, params, draft, chain, rest, before)
    return jnp.concatenate([blocks[:, :1], rest], axis=1).reshape(logits.shape)
