"""Prefill: puts the keys and values of prompts into the caches, chunk by chunk."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from s3d_jax.decoding.sizes import SlotPlan
from s3d_jax.decoding.state import Chunk, DecodeSpec, DecodeState, Proposer
from s3d_jax.jax_settings import under_usual_jax_settings
from s3d_jax.nn.cache import KVCache
from s3d_jax.nn.sharding import state_constrained
from s3d_jax.nn.transformer import fill_cache, hidden_states
from s3d_jax.settings.model import ModelConfig
from s3d_jax.weights.trees import Params

# (jitted function, static arguments, arrays) -> its result
Call = Callable[[Any, Mapping[str, Any], Mapping[str, Any]], Any]


@under_usual_jax_settings
def prefill_chunk(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    cache: KVCache,
    offset: jax.Array,
    visible: int | None = None,
) -> KVCache:
    """Puts keys and values of positions offset … offset+T-1 of every row into the cache.

    Rows whose prompt ends earlier write scratch after their prompt and not at `offset`: in a ring,
    scratch at `offset` would wrap around onto slots that the row still looks at. The last token of
    a prompt stays out of the cache: it is x_n, the input of the first step.

    Args:
        config: the model (static).
        params: the model's parameters.
        tokens: int [B, T], padded with anything after a row's prompt.
        cache: donated by `prefill_jit`. offset + T must not exceed its slots.
        offset: int scalar, the same for all rows.
        visible: static, slots to read, at least offset + T; None reads all.
    """
    before = before_chunk(cache, offset)
    cache = fill_cache(config, params, tokens, before, visible=visible)
    return after_chunk(cache, offset, tokens)


@under_usual_jax_settings
def prefill_chunk_hidden(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    cache: KVCache,
    offset: jax.Array,
    visible: int | None = None,
) -> tuple[KVCache, jax.Array]:
    """`prefill_chunk`, and what the head would read, [B, T, D]."""
    before = before_chunk(cache, offset)
    hidden, cache = hidden_states(config, params, tokens, before, visible=visible)
    return after_chunk(cache, offset, tokens), hidden


def before_chunk(cache: KVCache, offset: jax.Array) -> KVCache:
    """The cache as a pass over the chunk at `offset` takes it."""
    return cache.replace(length=jnp.minimum(offset, cache.prompt_length - 1))


def after_chunk(cache: KVCache, offset: jax.Array, tokens: jax.Array) -> KVCache:
    """The cache with that chunk committed, as far as each row's prompt goes."""
    length = jnp.minimum(offset + tokens.shape[1], cache.prompt_length - 1)
    return state_constrained(cache.replace(length=length))


_options: Any = dict(static_argnames=("config", "visible"), donate_argnames="cache")
prefill_jit: Any = jax.jit(prefill_chunk, **_options)
prefill_hidden_jit: Any = jax.jit(prefill_chunk_hidden, **_options)


@functools.partial(
    jax.jit, static_argnames=("config", "drafter", "visible"), donate_argnames="state"
)
def _prefill_drafter(drafter: Proposer, state: Any, **chunk: Any) -> Any:
    return state_constrained(drafter.prefill(state, Chunk(**chunk)))


def call_directly(function: Any, static: Mapping[str, Any], arrays: Mapping[str, Any]) -> Any:
    """Calls a jitted function; jax keeps its programs."""
    return function(**static, **arrays)


@under_usual_jax_settings
def prefill(
    spec: DecodeSpec,
    params: Params,
    drafter_params: Any,
    state: DecodeState,
    sequences: Sequence[np.ndarray],
    plan: SlotPlan,
    *,
    running: Sequence[bool] | None = None,
    call: Call = call_directly,
) -> DecodeState:
    """Prefills the target's cache and the drafter's state with all but the last token of each row.

    Args:
        spec, params, drafter_params: what decodes.
        state: from `init_state` with the same plan; its cache and drafter state are donated.
        sequences: B arrays of token ids.
        plan: the batch's sizes.
        running: rows that decode afterwards; they decide how many chunks there are. None is all.
        call: how each program is called; the engine keeps its programs itself.
    """
    offset = plan.known
    for chunk in plan.chunks(running):
        block = np.zeros((len(sequences), chunk), np.int32)
        for b, sequence in enumerate(sequences):
            part = sequence[offset : offset + chunk]
            block[b, : len(part)] = part
        # The first chunk sees itself alone.
        visible = plan.visible(offset + chunk) if offset else chunk
        common = dict(params=params, tokens=block, offset=np.int32(offset))
        static = dict(config=spec.config, visible=visible)
        reads_hidden = spec.drafter is not None and spec.drafter.reads_hidden
        function = prefill_hidden_jit if reads_hidden else prefill_jit
        cache, hidden = call(function, static, dict(common, cache=state.cache)), None
        if reads_hidden:
            cache, hidden = cache
        state = state.replace(cache=cache)
        if spec.drafter is not None and spec.drafter.reads_prompts:
            arrays = dict(
                common, state=state.drafter_state, drafter_params=drafter_params, hidden=hidden
            )
            own = call(_prefill_drafter, dict(static, drafter=spec.drafter), arrays)
            state = state.replace(drafter_state=own)
        offset += chunk
    return state
