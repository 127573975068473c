"""Decoding over token ids: prefill, draft, verify, accept, commit; and the loop around them.

One speculative step serves everything. Plain autoregressive decoding (AR) is the step without a
draft; the stream is the loop with one iteration per call. The state is donated, so no second cache
is ever alive. Token ids only: the texts are made in batch.py and text.py.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from s3d_jax.decoding.adaptive import full_budget, settle
from s3d_jax.decoding.sampling import SamplingParams, accept_greedy, accept_sampled, warp
from s3d_jax.decoding.state import (
    ACCEPT,
    BONUS,
    DecodeSpec,
    DecodeState,
    DrafterParams,
    Proposal,
    last_token,
    process,
    row_keys,
)
from s3d_jax.drafters.proposers import draft_pass
from s3d_jax.nn.cache import KVCache, grown, init_cache
from s3d_jax.nn.transformer import fill_cache, forward
from s3d_jax.settings.drafting import TwoModelConfig
from s3d_jax.settings.model import ModelConfig
from s3d_jax.weights.trees import Params

PREFILL_BUCKETS = (16, 32, 64, 128, 256, 512)
_FIRST_VISIBLE = 256  # slots; below, reading them all costs less than another program


def init_state(
    spec: DecodeSpec,
    prompts: list[np.ndarray],
    slots: int,
    limit: np.ndarray,
    sampling: SamplingParams,
    cache: KVCache | None = None,
) -> DecodeState:
    """The state before prefill.

    Args:
        spec: the program.
        prompts: B arrays of token ids, each with at least one.
        slots: S. Must hold every row's limit and γ+1 slots of slack.
        limit: int [B], tokens (prompt included) at which each row ends. With LongRoPE a row whose
            prompt is within `turning_point` has to end one token behind it, and to be prefilled
            anew if it goes on: from there on its keys are others.
        sampling: from `batch_sampling`.
        cache: one that holds the beginnings of the prompts, `cache.length` tokens of each; may have
            fewer slots. None makes an empty one.

    Raises:
        ValueError: S is too small; a write near the end would be clamped onto committed slots.
    """
    batch, vocab = len(prompts), spec.config.vocab_size
    if slots < int(np.max(limit)) + spec.gamma + 1:
        raise ValueError(
            f"{slots} slots cannot hold {np.max(limit)} tokens and {spec.gamma + 1} of slack"
        )
    tokens = np.zeros((batch, slots), np.int32)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    known = np.zeros(batch, int) if cache is None else np.asarray(cache.length)
    padded = map(padded_length, lengths.tolist(), known.tolist())
    seen = np.zeros((batch, vocab if spec.features.penalized else 0), bool)
    for b, prompt in enumerate(prompts):
        tokens[b, : len(prompt)] = prompt
        if spec.features.penalized:
            seen[b, prompt] = True
    arrays = jax.device_put(  # all at once, which costs a third of one by one
        dict(
            tokens=tokens,
            done=lengths >= limit,
            limit=np.asarray(limit, np.int32),
            padding=np.asarray([*padded], np.int32) - lengths,
            prompt_tokens=seen,
            output_counts=np.zeros(seen.shape, np.int32),
            passes=np.zeros((batch, slots), np.int32),
        )
    )
    largest_block, draft_cache = max(PREFILL_BUCKETS[-1], spec.gamma + 1), None
    if cache is None:
        cache = init_cache(spec.config, batch, slots, lengths, largest_block)
    else:
        cache = grown(cache, spec.config, slots, largest_block)
        cache = cache.replace(prompt_length=jnp.asarray(lengths))
    if isinstance(spec.draft, TwoModelConfig):
        draft_cache = init_cache(spec.draft.model, batch, slots, lengths, largest_block)
    budget = None if spec.costs is None else full_budget(batch)
    return DecodeState(
        cache=cache, sampling=sampling, draft_cache=draft_cache, budget=budget, **arrays
    )


# --- prefill --------------------------------------------------------------------------------------


def prefill_chunks(length: int) -> list[int]:
    """Chunk sizes, each one of PREFILL_BUCKETS, that together cover `length` tokens.

    Only the last chunk is padded, so any two lengths within one bucket run the same programs.
    """
    largest = PREFILL_BUCKETS[-1]
    full, rest = divmod(length, largest)
    tail = [next(b for b in PREFILL_BUCKETS if b >= rest)] if rest else []
    return [largest] * full + tail


def padded_length(length: int, known: int = 0) -> int:
    """Tokens of the longest prompt that runs the same prefill programs as one of `length`.

    The first `known` tokens are in the cache already, and the last one is not prefilled. Caches are
    sized, and `visible` is chosen, by this and not by the prompt itself, so that those who share a
    prefill share all programs.
    """
    return known + sum(prefill_chunks(length - 1 - known)) + 1


def visible_slots(needed: int, slots: int) -> int:
    """The slots that a program should read, where `needed` of a cache of `slots` are in use.

    Powers of two, so that a long generation runs few programs. What is read is at most twice what
    is needed, or 256 slots.
    """
    visible = _FIRST_VISIBLE
    while visible < needed:
        visible *= 2
    return min(visible, slots)


def prefill_chunk(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    cache: KVCache,
    offset: jax.Array,
    visible: int | None = None,
) -> KVCache:
    """Puts keys and values of positions offset … offset+T-1 of every row into the cache.

    Rows whose prompt ends before write scratch, behind their prompt and not there: in a ring it
    would come round to what they still look at. The last token of a prompt stays out of the cache:
    it is x_n, the input of the first step.

    Args:
        config: the model (static).
        params: the model's parameters.
        tokens: int [B, T], padded with anything behind a row's prompt.
        cache: donated by `prefill_jit`. offset + T must not exceed its slots.
        offset: int scalar, the same for all rows.
        visible: static, slots to read, at least offset + T; None reads all.
    """
    here = cache.replace(length=jnp.minimum(offset, cache.prompt_length - 1))
    here = fill_cache(config, params, tokens, here, visible=visible)
    return here.replace(length=jnp.minimum(offset + tokens.shape[1], cache.prompt_length - 1))


# --- one iteration --------------------------------------------------------------------------------


def verify_pass(
    spec: DecodeSpec,
    params: Params,
    state: DecodeState,
    draft: jax.Array,
    visible: int | None = None,
) -> tuple[jax.Array, KVCache]:
    """The full model over x_n and w draft tokens: logits float32 [B, w+1, V], and cache."""
    block = jnp.concatenate([last_token(state), draft], axis=1)
    logits, cache = forward(spec.config, params, block, state.cache, visible=visible)
    return process(spec, logits, state, draft), cache


def accept(
    spec: DecodeSpec,
    state: DecodeState,
    proposal: Proposal,
    logits: jax.Array,
    drafts: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """How many draft tokens stand, and the bonus token: int32 [B] each.

    `drafts` (bool [B]) are the rows whose draft counts; None is all.
    """
    if not spec.features.sampled:
        target = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return accept_greedy(proposal.tokens, target, drafts)
    p = jax.nn.softmax(warp(logits, state.sampling, spec.features), axis=-1)
    if proposal.logits is None:
        q = jax.nn.one_hot(proposal.tokens, p.shape[-1], dtype=jnp.float32)
    else:
        q = jax.nn.softmax(proposal.logits, axis=-1)
    keys = row_keys(state, ACCEPT), row_keys(state, BONUS)
    return accept_sampled(proposal.tokens, q, p, *keys, drafts)


def commit(
    spec: DecodeSpec,
    state: DecodeState,
    draft: jax.Array,
    accepted: jax.Array,
    bonus: jax.Array,
    drafts: jax.Array | None = None,
) -> DecodeState:
    """Appends accepted tokens and bonus to each row, cut at its limit and after a stop token."""
    length = state.cache.length
    record = 1 + accepted if drafts is None else jnp.where(drafts, 1 + accepted, -1)
    block = jnp.pad(draft, ((0, 0), (0, 1)))
    column = jnp.arange(block.shape[1], dtype=jnp.int32)
    block = jnp.where(column == accepted[:, None], bonus[:, None], block)
    count = jnp.minimum(accepted + 1, state.limit - (length + 1))
    stops = jnp.isin(block, jnp.asarray(spec.stop_ids, jnp.int32)) & (column < count[:, None])
    stopped = jnp.any(stops, axis=1)
    count = jnp.where(stopped, jnp.argmax(stops, axis=1).astype(jnp.int32) + 1, count)
    count = jnp.where(state.done, 0, count)

    put = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))
    counts = state.output_counts
    if spec.features.penalized:
        rows = jnp.arange(block.shape[0])[:, None]
        counts = counts.at[rows, block].add((column < count[:, None]).astype(jnp.int32))
    new_length = length + count
    return state.replace(
        tokens=put(state.tokens, block, length + 1),
        cache=state.cache.replace(length=new_length),
        done=state.done | stopped | (new_length + 1 >= state.limit),
        output_counts=counts,
        passes=jnp.where(
            state.done[:, None],
            state.passes,
            put(state.passes, record[:, None], length + 1),
        ),
    )


def step(
    spec: DecodeSpec,
    params: Params,
    draft_params: DrafterParams,
    state: DecodeState,
    visible: int | None = None,
) -> DecodeState:
    """One iteration: draft, verify, accept, commit. Rows advance by 1 … γ+1 tokens.

    Without `spec.draft` it is one of plain decoding. A row whose budget says that it does not draft
    (`adaptive`) takes nothing of the draft, and advances by one token.

    Args:
        spec, params, draft_params, state: what decodes, and how far it is.
        visible: static, slots to read, at least length + γ + 1 of every unfinished row; None reads
            all.
    """
    if spec.draft is None:
        return _plain_step(spec, params, state, visible)
    proposal = (spec.proposer or draft_pass)(spec, params, draft_params, state, visible)
    state = state.replace(cache=proposal.cache, draft_cache=proposal.draft_cache)
    drafts = None if state.budget is None else state.budget.drafts
    return _finish(spec, params, state, proposal, drafts, visible)


def _plain_step(
    spec: DecodeSpec, params: Params, state: DecodeState, visible: int | None
) -> DecodeState:
    """An iteration in which no row drafts."""
    nothing = jnp.zeros((state.tokens.shape[0], 0), jnp.int32)
    drafts = None if state.budget is None else jnp.zeros_like(state.done)
    return _finish(spec, params, state, Proposal(nothing, None, state.cache), drafts, visible)


def _finish(
    spec: DecodeSpec,
    params: Params,
    state: DecodeState,
    proposal: Proposal,
    drafts: jax.Array | None,
    visible: int | None,
) -> DecodeState:
    """Verifies, accepts and commits; `drafts` as in `accept`."""
    logits, cache = verify_pass(spec, params, state, proposal.tokens, visible)
    state = state.replace(cache=cache)
    accepted, bonus = accept(spec, state, proposal, logits, drafts)
    budget = state.budget
    if drafts is not None and budget is not None and spec.costs is not None:
        cost = spec.costs.iteration(spec.gamma)
        budget = settle(cost, budget, drafts, accepted, state.done)
    state = commit(spec, state, proposal.tokens, accepted, bonus, drafts)
    return state.replace(budget=budget)


def decode(
    spec: DecodeSpec,
    params: Params,
    draft_params: DrafterParams,
    state: DecodeState,
    max_iterations: jax.Array,
    visible: int | None = None,
) -> DecodeState:
    """Steps until every row is done, `max_iterations` steps at most (1 streams).

    With `visible` (static) it also stops before a row, its prompt taken as padded, would need more
    than so many slots; from there on another program goes on (`visible_slots`). A program that
    reads all slots never stops for that.

    A pure function; `decode_jit` is the compiled one, which donates the state.
    """
    Carry = tuple[jax.Array, DecodeState]

    def unfinished(carry: Carry) -> jax.Array:
        i, state = carry
        go_on = (i < max_iterations) & ~jnp.all(state.done)
        if visible is None or visible >= state.cache.slots:
            return go_on  # init_state saw to it that every row fits to its end
        fits = state.cache.length + state.padding + spec.gamma + 1 <= visible
        return go_on & jnp.all(fits | state.done)

    def speculate(carry: Carry) -> Carry:
        i, state = carry
        return i + 1, step(spec, params, draft_params, state, visible)

    if state.budget is None:
        return jax.lax.while_loop(unfinished, speculate, (jnp.int32(0), state))[1]

    def drafting(carry: Carry) -> jax.Array:
        _, state = carry
        assert state.budget is not None
        return jnp.any(state.budget.drafts & ~state.done)

    def go_plainly(carry: Carry) -> Carry:
        i, state = carry
        return i + 1, _plain_step(spec, params, state, visible)

    def alternate(carry: Carry) -> Carry:
        # Two loops and no conditional, around which XLA copies the cache in every iteration.
        carry = jax.lax.while_loop(lambda c: unfinished(c) & drafting(c), speculate, carry)
        return jax.lax.while_loop(lambda c: unfinished(c) & ~drafting(c), go_plainly, carry)

    return jax.lax.while_loop(unfinished, alternate, (jnp.int32(0), state))[1]


class Counts(NamedTuple):
    """What a row cost.

    Attributes:
        iterations: those that committed its tokens.
        plain: of these, those in which it did not draft, though the program can.
        accepted: for each of the γ positions, how often its draft token was accepted and is one of
            the tokens.
    """

    iterations: int
    plain: int
    accepted: tuple[int, ...]


def statistics(passes: np.ndarray, prompt_tokens: int, new_tokens: int, gamma: int) -> Counts:
    """What the first `new_tokens` tokens of a row cost.

    Args:
        passes: int [S], the row's part of `DecodeState.passes`.
        prompt_tokens, new_tokens: tokens in and out.
        gamma: draft tokens per iteration.
    """
    passes = passes[prompt_tokens : prompt_tokens + new_tokens]
    (starts,) = np.nonzero(passes)
    committed = np.diff(starts, append=new_tokens)
    accepted = np.minimum(passes[starts] - 1, committed)  # less where a limit cut the block
    return Counts(
        iterations=len(starts),
        plain=int((passes[starts] < 0).sum()),
        accepted=tuple(int((accepted > position).sum()) for position in range(gamma)),
    )


# For those who do not jit their own. Both donate what they return anew.
prefill_jit: Any = jax.jit(
    prefill_chunk, static_argnames=("config", "visible"), donate_argnames="cache"
)
decode_jit: Any = jax.jit(decode, static_argnames=("spec", "visible"), donate_argnames="state")
