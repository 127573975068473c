"""One iteration (draft, verify, accept, commit), and the loop around it.

One speculative step serves everything. Plain autoregressive decoding (AR) is the step without a
drafter; the stream is the loop with one iteration per call. The state is donated, so no second
cache is ever alive.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from s3d_jax.decoding.adaptive import settle
from s3d_jax.decoding.sampling import accept, choose
from s3d_jax.decoding.state import (
    DecodeSpec,
    DecodeState,
    Inputs,
    Verified,
    choice_noise,
    verify_pass,
)
from s3d_jax.jax_settings import under_usual_jax_settings
from s3d_jax.nn.sharding import state_constrained
from s3d_jax.weights.trees import Params


def leading_numbers(logits: jax.Array) -> jax.Array:
    """How many positions of each block come before the first without a usable distribution.

    A position has none if some of its logits are NaN or +infinity, or all are -infinity, as after
    an overflow of float16. Single ones may be -infinity (`logit_bias`).

    Args:
        logits: float32 [B, T, V].

    Returns:
        int32 [B], 0 … T.
    """
    # XLA's largest number is not NaN where there are NaN, so these are looked for.
    no_nan = jnp.sum(jnp.isnan(logits), axis=-1, dtype=jnp.int32) == 0
    finite = jnp.isfinite(jnp.max(logits, axis=-1)) & no_nan
    return jnp.sum(jnp.cumprod(finite, axis=1, dtype=jnp.int32), axis=1)


def commit(
    spec: DecodeSpec,
    state: DecodeState,
    proposed_tokens: jax.Array,
    accepted: jax.Array,
    bonus: jax.Array,
    drafting_rows: jax.Array | None = None,
    usable: jax.Array | None = None,
) -> DecodeState:
    """Appends accepted tokens and bonus to each row, cut at its limit and after a stop token.

    Args:
        spec, state: the program, and how far it is.
        proposed_tokens, accepted, bonus, drafting_rows: of `accept`.
        usable: int32 [B], from `leading_numbers`; a row that needs more of the block ends there, as
            broken. None is all.
    """
    length = state.cache.length
    record = 1 + accepted
    if drafting_rows is not None:
        record = jnp.where(drafting_rows, record, -1)
    block = jnp.pad(proposed_tokens, ((0, 0), (0, 1)))
    column = jnp.arange(block.shape[1], dtype=jnp.int32)
    block = jnp.where(column == accepted[:, None], bonus[:, None], block)
    wanted = count = jnp.minimum(accepted + 1, state.limit - (length + 1))
    if usable is not None:
        count = jnp.minimum(count, usable)
    short = count < wanted
    stops = jnp.any(block[..., None] == state.stop_ids, axis=-1) & (column < count[:, None])
    stopped = jnp.any(stops, axis=1)
    count = jnp.where(stopped, jnp.argmax(stops, axis=1).astype(jnp.int32) + 1, count)
    count = jnp.where(state.done, 0, count)
    broken = short & ~stopped & ~state.done

    put = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))
    counts = state.output_counts
    if spec.features.penalized:
        rows = jnp.arange(block.shape[0])[:, None]
        counts = counts.at[rows, block].add((column < count[:, None]).astype(jnp.int32))
    new_length = length + count
    return state.replace(
        tokens=put(state.tokens, block, length + 1),
        cache=state.cache.replace(length=new_length),
        done=state.done | stopped | broken | (new_length + 1 >= state.limit),
        broken=state.broken | broken,
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
    drafter_params: Any,
    state: DecodeState,
    visible: int | None = None,
) -> DecodeState:
    """One iteration: draft, verify, accept, commit. Rows advance by 1 … γ+1 tokens.

    Without a drafter it is an iteration of AR. A row whose budget says that it does not draft
    (`adaptive`) uses nothing of the proposal, and advances by one token.

    Args:
        spec, params, drafter_params, state: what decodes, and how far it is.
        visible: static, slots to read, at least length + `spec.block` of every unfinished row; None
            reads all.
    """
    if spec.drafter is None:
        return _plain_step(spec, params, drafter_params, state, visible)
    noise = choice_noise(spec, state, spec.gamma + 1)
    inputs = Inputs(spec, params, drafter_params, state, visible, noise)
    proposal = spec.drafter.propose(inputs)
    state = state.replace(cache=proposal.cache)
    if proposal.drafter_state is not None:
        state = state.replace(drafter_state=proposal.drafter_state)
    drafting_rows = None if state.budget is None else state.budget.drafting_rows
    tokens, inputs = state_constrained(proposal.tokens), inputs._replace(state=state)
    return _accept_and_commit(inputs, tokens, spec.drafter.verify(inputs, tokens), drafting_rows)


def _plain_step(
    spec: DecodeSpec,
    params: Params,
    drafter_params: Any,
    state: DecodeState,
    visible: int | None,
) -> DecodeState:
    """An iteration in which no row drafts."""
    nothing = jnp.zeros((state.tokens.shape[0], 0), jnp.int32)
    drafting_rows = None if state.budget is None else jnp.zeros_like(state.done)
    inputs = Inputs(spec, params, drafter_params, state, visible, choice_noise(spec, state, 1))
    return _accept_and_commit(inputs, nothing, verify_pass(inputs, nothing), drafting_rows)


def _accept_and_commit(
    inputs: Inputs,
    proposed_tokens: jax.Array,
    verified: Verified,
    drafting_rows: jax.Array | None,
) -> DecodeState:
    spec, logits = inputs.spec, verified.logits
    state = inputs.state.replace(cache=verified.cache)
    target = state_constrained(choose(logits, state.sampling, spec.features, inputs.noise))
    accepted, bonus = accept(proposed_tokens, target, drafting_rows)
    budget = state.budget
    if drafting_rows is not None and budget is not None:
        budget = settle(budget, drafting_rows, accepted, state.done)
    usable = state_constrained(leading_numbers(logits))
    state = commit(spec, state, proposed_tokens, accepted, bonus, drafting_rows, usable)
    if spec.drafter is not None:
        inputs = inputs._replace(state=state)
        state = state.replace(drafter_state=spec.drafter.update(inputs, verified, accepted))
    return state_constrained(state.replace(budget=budget))


@under_usual_jax_settings
def decode(
    spec: DecodeSpec,
    params: Params,
    drafter_params: Any,
    state: DecodeState,
    max_iterations: jax.Array,
    visible: int | None = None,
    enough: jax.Array | None = None,
) -> DecodeState:
    """Steps until every row is done, `max_iterations` steps at most (1 streams).

    With `enough`, an int scalar, it stops where so many rows are done.

    With `visible` (static) it also stops before a row, its prompt taken as padded, would need more
    slots than that; another program continues from there (`SlotPlan.visible`). A program that reads
    all slots never stops for that.

    A pure function; `decode_jit` is the compiled one, which donates the state.
    """
    Carry = tuple[jax.Array, DecodeState]

    def unfinished(carry: Carry) -> jax.Array:
        i, state = carry
        wanted = state.done.size if enough is None else enough
        continues = (i < max_iterations) & (jnp.sum(state.done) < wanted)
        if visible is None or visible >= state.cache.slots:
            return continues  # SlotPlan has room for every row to its end
        fits = state.cache.length + state.padding + spec.block <= visible
        return continues & jnp.all(fits | state.done)

    def speculate(carry: Carry) -> Carry:
        i, state = carry
        return i + 1, step(spec, params, drafter_params, state, visible)

    if state.budget is None:
        state = jax.lax.while_loop(unfinished, speculate, (jnp.int32(0), state))[1]
        return state_constrained(state)

    def drafting(carry: Carry) -> jax.Array:
        _, state = carry
        assert state.budget is not None
        return jnp.any(state.budget.drafting_rows & ~state.done)

    def decode_plainly(carry: Carry) -> Carry:
        i, state = carry
        return i + 1, _plain_step(spec, params, drafter_params, state, visible)

    def alternate(carry: Carry) -> Carry:
        # Two loops instead of a conditional: XLA copies the cache around a conditional in every
        # iteration.
        carry = jax.lax.while_loop(lambda c: unfinished(c) & drafting(c), speculate, carry)
        return jax.lax.while_loop(lambda c: unfinished(c) & ~drafting(c), decode_plainly, carry)

    state = jax.lax.while_loop(unfinished, alternate, (jnp.int32(0), state))[1]
    return state_constrained(state)


decode_jit: Any = jax.jit(decode, static_argnames=("spec", "visible"), donate_argnames="state")


class Counts(NamedTuple):
    """What a row cost.

    Attributes:
        iterations: those that committed its tokens.
        plain: iterations among them in which it did not draft, though the program can.
        accepted: for each of the γ positions, how often its proposed token was accepted and is one
            of the row's tokens.
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
