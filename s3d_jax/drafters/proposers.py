"""Who drafts: S3D's own pass, and the ways of others, each as one function.

A proposer gets (spec, params, draft_params, state, visible), as `decode.step` does, and returns γ
tokens and the distributions they were drawn from. It may be as wrong as it likes: verification
makes the output the target's. What it needs to know is in `spec.draft`; what it writes into caches
behind the committed tokens is scratch.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from s3d_jax.decoding.sampling import categorical, warp
from s3d_jax.decoding.state import (
    DRAFT,
    DecodeSpec,
    DecodeState,
    DrafterParams,
    Proposal,
    last_token,
    process,
    row_keys,
)
from s3d_jax.nn.cache import KVCache
from s3d_jax.nn.draft import DraftParams
from s3d_jax.nn.transformer import forward
from s3d_jax.settings.drafting import DraftConfig, PromptLookupConfig, TwoModelConfig
from s3d_jax.weights.trees import Params


def draft_pass(
    spec: DecodeSpec,
    params: Params,
    draft_params: DrafterParams,
    state: DecodeState,
    visible: int | None = None,
) -> Proposal:
    """S3D (Zhong and Bharadwaj, arXiv 2405.20314): x_n and γ-1 mask tokens, kept layers, one pass.

    Takes a DraftConfig, and DraftParams.
    """
    assert isinstance(spec.draft, DraftConfig) and isinstance(draft_params, DraftParams)
    logits, cache = forward(
        spec.config,
        params,
        last_token(state),
        state.cache,
        skip=spec.draft.skip,
        draft=draft_params,
        num_masks=spec.gamma - 1,
        bidirectional=spec.draft.block_attention == "bidirectional",
        visible=visible,
    )
    return Proposal(*_chosen(spec, logits, state), cache)


def self_draft(
    spec: DecodeSpec,
    params: Params,
    draft_params: DrafterParams,
    state: DecodeState,
    visible: int | None = None,
) -> Proposal:
    """The target without some of its layers, token by token and untrained.

    With any layers skipped it is Self-Speculative decoding (Zhang et al., arXiv 2309.08168), with
    the last ones skipped early exit: final norm and head straight behind the exit layer, as in
    LayerSkip (Elhoushi et al., arXiv 2404.16710). Takes a DraftConfig, and no parameters of its
    own.
    """
    assert isinstance(spec.draft, DraftConfig)
    skip = spec.draft.skip

    def one_pass(block: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        return forward(spec.config, params, block, cache, skip=skip, visible=visible)

    logits, cache = one_pass(last_token(state), state.cache)
    tokens, q, cache = _one_by_one(spec, state, one_pass, logits, cache)
    return Proposal(tokens, q, cache.replace(length=state.cache.length))


def two_model(
    spec: DecodeSpec,
    params: Params,
    draft_params: DrafterParams,
    state: DecodeState,
    visible: int | None = None,
) -> Proposal:
    """A second model, token by token (Leviathan et al., arXiv 2211.17192).

    Its first pass takes the last two tokens: of a draft that was accepted whole, it has not seen
    the last one yet. Takes a TwoModelConfig, and that model's parameters.
    """
    assert isinstance(spec.draft, TwoModelConfig) and state.draft_cache is not None
    model, n = spec.draft.model, state.cache.length

    def one_pass(block: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        assert draft_params is not None and not isinstance(draft_params, DraftParams)
        return forward(model, draft_params, block, cache, visible=visible)

    # A prompt of one token has none before it: x_0 comes first then, and scratch behind it.
    first = jnp.maximum(n - 1, 0)
    at = first[:, None] + jnp.arange(2)
    block = jnp.take_along_axis(state.tokens, at, axis=1)
    logits, cache = one_pass(block, state.draft_cache.replace(length=first))
    logits = jnp.take_along_axis(logits, (n - first)[:, None, None], axis=1)
    tokens, q, cache = _one_by_one(spec, state, one_pass, logits, cache)
    return Proposal(tokens, q, state.cache, cache)


def prompt_lookup(
    spec: DecodeSpec,
    params: Params,
    draft_params: DrafterParams,
    state: DecodeState,
    visible: int | None = None,
) -> Proposal:
    """What followed the last tokens where they stood before (Saxena 2023, prompt lookup decoding).

    Of all places in the text that end like it, up to `ngram` tokens, the longest match counts, and
    of equal ones the latest. What follows a place less than γ tokens back is taken to repeat; so is
    the last token where nothing matches. Takes a PromptLookupConfig, and no parameters.
    """
    assert isinstance(spec.draft, PromptLookupConfig)
    n = state.cache.length[:, None]
    tokens = state.tokens[:, :visible]
    slots = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    same, match = jnp.ones(tokens.shape, bool), jnp.zeros(tokens.shape, jnp.int32)
    for back in range(spec.draft.ngram):  # match[j]: how many tokens up to j are those up to n
        ours = jnp.take_along_axis(tokens, jnp.maximum(n - back, 0), axis=1)
        theirs = jnp.pad(tokens, ((0, 0), (back, 0)), constant_values=-1)[:, : tokens.shape[1]]
        same = same & (theirs == ours)
        match = match + same
    best = jnp.max(jnp.where(slots < n, match, 0), axis=1, keepdims=True)
    found = (match == best) & (best > 0) & (slots < n)
    place = jnp.max(jnp.where(found, slots, -1), axis=1, keepdims=True)
    period = jnp.where(best > 0, n - place, 1)
    at = n - period + 1 + jnp.arange(spec.gamma) % period
    return Proposal(jnp.take_along_axis(tokens, at, axis=1), None, state.cache)


def _chosen(
    spec: DecodeSpec, logits: jax.Array, state: DecodeState
) -> tuple[jax.Array, jax.Array | None]:
    """Draft tokens from logits [B, T, V], and what they were drawn from, as in Proposal."""
    # A broken draft may cost speed but never correctness: without this, NaN would reach the
    # residual.
    logits = process(spec, jnp.nan_to_num(jnp.clip(logits, -1e30, 1e30)), state)
    if not spec.features.sampled:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), None
    logits = warp(logits, state.sampling, spec.features)
    return categorical(row_keys(state, DRAFT), logits), logits


def _one_by_one(
    spec: DecodeSpec,
    state: DecodeState,
    one_pass: Callable[[jax.Array, KVCache], tuple[jax.Array, KVCache]],
    logits: jax.Array,
    cache: KVCache,
) -> tuple[jax.Array, jax.Array | None, KVCache]:
    """γ draft tokens, each seeing those before it.

    Args:
        spec, state: of the target.
        one_pass: (tokens [B, 1], cache) -> (logits [B, 1, V], cache).
        logits: float32 [B, 1, V], those of the first draft token.
        cache: of whoever drafts; holds what these logits have seen.

    Returns:
        Tokens and logits as in Proposal, and the cache.
    """
    n = state.cache.length
    rows = jnp.arange(n.shape[0])

    def choose(
        logits: jax.Array, i: jax.Array, counts: jax.Array
    ) -> tuple[jax.Array, jax.Array | None, jax.Array]:
        # Keys of the token's own position: those of a draft token that was looked at are never used
        # again, since the next iteration begins behind it.
        here = state.replace(cache=state.cache.replace(length=n + i), output_counts=counts)
        token, q = _chosen(spec, logits, here)
        if spec.features.penalized:
            counts = counts.at[rows, token[:, 0]].add(1)
        return token, q, counts

    def body(
        carry: tuple[jax.Array, KVCache, jax.Array], i: jax.Array
    ) -> tuple[tuple[jax.Array, KVCache, jax.Array], tuple[jax.Array, jax.Array | None]]:
        token, cache, counts = carry
        logits, cache = one_pass(token, cache.replace(length=n + i))
        token, q, counts = choose(logits, i, counts)
        return (token, cache, counts), (token[:, 0], None if q is None else q[:, 0])

    token, q, counts = choose(logits, jnp.int32(0), state.output_counts)
    steps = jnp.arange(1, spec.gamma, dtype=jnp.int32)
    (_, cache, _), (tokens, qs) = jax.lax.scan(body, (token, cache, counts), steps)
    tokens = jnp.concatenate([token, tokens.T], axis=1)
    if q is not None and qs is not None:
        q = jnp.concatenate([q, qs.swapaxes(0, 1)], axis=1)
    return tokens, q, cache
