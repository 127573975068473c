"""One iteration (draft, verify, accept, commit), and the loop around it.

One speculative step serves everything. Plain autoregressive decoding (AR) is the step without a
drafter; a step in which all rows copy is one without a draft pass; the stream is the loop with one
iteration per call. The state is donated, so no second cache is ever alive.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from s3d_jax.decoding.adaptive import settle
from s3d_jax.decoding.comb import accept_comb, row_depths
from s3d_jax.decoding.copying import continuation
from s3d_jax.decoding.sampling import accept, choose
from s3d_jax.decoding.state import (
    COPIED,
    DecodeSpec,
    DecodeState,
    Inputs,
    Verified,
    choice_noise,
    verify_pass,
)
from s3d_jax.jax_settings import under_usual_jax_settings
from s3d_jax.nn.cache import KVCache, moved
from s3d_jax.nn.sharding import state_constrained
from s3d_jax.weights.trees import Params


def are_usable(logits: jax.Array) -> jax.Array:
    """Which positions have a usable distribution: bool [B, T].

    A position has none if some of its logits are NaN or +infinity, or all are -infinity, as after
    an overflow of float16. Single ones may be -infinity (`logit_bias`).

    Args:
        logits: float32 [B, T, V].
    """
    # XLA's largest number is not NaN where there are NaN, so these are looked for.
    no_nan = jnp.sum(jnp.isnan(logits), axis=-1, dtype=jnp.int32) == 0
    return jnp.isfinite(jnp.max(logits, axis=-1)) & no_nan


def commit(
    spec: DecodeSpec,
    state: DecodeState,
    proposed_tokens: jax.Array,
    accepted: jax.Array,
    bonus: jax.Array,
    drafting_rows: jax.Array | None = None,
    copying_rows: jax.Array | None = None,
    usable: jax.Array | None = None,
) -> DecodeState:
    """Appends accepted tokens and bonus to each row, cut at its limit and after a stop token.

    Args:
        spec, state: the program, and how far it is.
        proposed_tokens, accepted, bonus: of `accept`.
        drafting_rows, copying_rows: bool [B], whose proposals are of the drafter, and copies; None
            is all, and none.
        usable: bool [B, γ+1], whether x_n and each proposed token have a usable distribution after
            them (`are_usable`). A row that needs one which is not ends there, as broken. None is
            all.
    """
    length = state.cache.length
    record = 1 + accepted
    if drafting_rows is not None:
        record = jnp.where(drafting_rows, record, -1)
    if copying_rows is not None:
        record = jnp.where(copying_rows, COPIED + 1 + accepted, record)
    block = jnp.pad(proposed_tokens, ((0, 0), (0, 1)))
    column = jnp.arange(block.shape[1], dtype=jnp.int32)
    block = jnp.where(column == accepted[:, None], bonus[:, None], block)
    wanted = count = jnp.minimum(accepted + 1, state.limit - (length + 1))
    if usable is not None:
        leading = jnp.sum(jnp.cumprod(usable, axis=1, dtype=jnp.int32), axis=1)
        count = jnp.minimum(count, leading)
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
    (`adaptive`) uses nothing of the proposal, and advances by one token. A row that can copy
    proposes that instead, and where all rows do there is no draft pass.

    Args:
        spec, params, drafter_params, state: what decodes, and how far it is.
        visible: static, slots to read, at least length + `spec.block` of every unfinished row; None
            reads all.
    """
    if spec.drafter is None:
        return _plain_step(spec, params, drafter_params, state, visible)
    noise = choice_noise(spec, state, spec.gamma + 1)
    drafting_rows, copying_rows = _proposing_rows(state)
    if state.copying is None:
        tokens, state = _proposed(Inputs(spec, params, drafter_params, state, visible, noise))
    else:
        assert drafting_rows is not None and copying_rows is not None
        period, n = state.copying.period, state.cache.length
        copied = continuation(state.tokens[:, :visible], n, period, spec.gamma)
        copied = jnp.pad(copied, ((0, 0), (0, len(spec.leaf_depths))))

        def propose(carry: tuple[Any, jax.Array, DecodeState]) -> Any:
            inputs = Inputs(spec, params, drafter_params, carry[2], visible, noise)
            return jnp.bool(False), *_proposed(inputs)

        # One turn, or none where no row needs it. XLA copies the cache around a conditional.
        needed = jnp.any(drafting_rows & ~state.done)
        _, tokens, state = jax.lax.while_loop(
            lambda carry: carry[0], propose, (needed, copied, state)
        )
        tokens = jnp.where(copying_rows[:, None], copied, tokens)
    inputs = Inputs(spec, params, drafter_params, state, visible, noise)
    verified = spec.drafter.verify(inputs, tokens)
    return _accept_and_commit(inputs, tokens, verified, drafting_rows, copying_rows)


def _proposing_rows(state: DecodeState) -> tuple[jax.Array | None, jax.Array | None]:
    """(rows that draft, rows that copy) in the next iteration, bool [B]; None is all, and none.

    A row that can copy does so instead of drafting, but for an attempt of its budget to draft.
    """
    drafting = None if state.budget is None else state.budget.drafting_rows
    if state.copying is None:
        return drafting, None
    copying = state.copying.rows
    if state.budget is not None:
        copying &= ~state.budget.attempting_rows
    return (~copying if drafting is None else drafting & ~copying), copying


def _proposed(inputs: Inputs) -> tuple[jax.Array, DecodeState]:
    """The drafter's tokens, int32 [B, γ+k], and the state with what it wrote."""
    state, drafter = inputs.state, inputs.spec.drafter
    assert drafter is not None
    proposal = drafter.propose(inputs)
    state = state.replace(cache=proposal.cache)
    if proposal.drafter_state is not None:
        state = state.replace(drafter_state=proposal.drafter_state)
    return state_constrained(proposal.tokens), state


def _plain_step(
    spec: DecodeSpec,
    params: Params,
    drafter_params: Any,
    state: DecodeState,
    visible: int | None,
) -> DecodeState:
    """An iteration in which no row drafts or copies."""
    nothing = jnp.zeros((state.tokens.shape[0], 0), jnp.int32)
    drafting_rows = None if state.budget is None else jnp.zeros_like(state.done)
    inputs = Inputs(spec, params, drafter_params, state, visible, choice_noise(spec, state, 1))
    return _accept_and_commit(inputs, nothing, verify_pass(inputs, nothing), drafting_rows, None)


def _accept_and_commit(
    inputs: Inputs,
    proposed_tokens: jax.Array,
    verified: Verified,
    drafting_rows: jax.Array | None,
    copying_rows: jax.Array | None,
) -> DecodeState:
    """The state after an iteration.

    Args:
        inputs, proposed_tokens, verified: of the iteration.
        drafting_rows, copying_rows: as in `commit`.
    """
    spec, logits, noise = inputs.spec, verified.logits, inputs.noise
    state = inputs.state.replace(cache=verified.cache)
    depths = spec.depths_in(proposed_tokens)
    if depths and noise is not None:
        noise = noise[:, row_depths(spec.gamma, depths)]
    target = state_constrained(choose(logits, state.sampling, spec.features, noise))
    usable = state_constrained(are_usable(logits))
    proposing = drafting_rows
    if drafting_rows is not None and copying_rows is not None:
        proposing = drafting_rows | copying_rows
    if depths:
        accepted, bonus, path = accept_comb(proposed_tokens, target, depths, proposing)
        proposed_tokens = jnp.take_along_axis(proposed_tokens, path[:, 1:] - 1, axis=1)
        usable = jnp.take_along_axis(usable, path, axis=1)
        # Only the last token of a path can be a leaf.
        last = jnp.take_along_axis(path, accepted[:, None], axis=1)[:, 0]
        last = jnp.where(state.done, accepted, last)
        state = state.replace(cache=_at_its_place(state.cache, last, accepted))
    else:
        accepted, bonus = accept(proposed_tokens, target, proposing)
    if (budget := state.budget) is not None and drafting_rows is not None:
        budget = settle(budget, drafting_rows, accepted, state.done)
    copying = state.copying
    if copying is not None and copying_rows is not None:
        copying = copying.settle(copying_rows & ~state.done, accepted)
    state = commit(
        spec, state, proposed_tokens, accepted, bonus, drafting_rows, copying_rows, usable
    )
    if copying is not None:
        copying = copying.looked_up(state.tokens[:, : inputs.visible], state.cache.length)
    state = state.replace(budget=budget, copying=copying)
    if spec.drafter is not None:
        inputs = inputs._replace(state=state)
        state = state.replace(drafter_state=spec.drafter.update(inputs, verified, accepted))
    return state_constrained(state)


def _at_its_place(cache: KVCache, last: jax.Array, accepted: jax.Array) -> KVCache:
    """The cache with the last committed token's key and value after those of the others.

    Args:
        cache: after the verify pass.
        last: int32 [B], the row of the block that holds it.
        accepted: int32 [B], the place where it belongs.
    """
    n = cache.length

    def move(carry: tuple[jax.Array, KVCache]) -> tuple[jax.Array, KVCache]:
        return jnp.bool(False), moved(carry[1], n + last, n + accepted)

    # One turn, or mostly none; see `step`. A move takes two kernels for each array of the cache.
    needed = jnp.any(last != accepted)
    return jax.lax.while_loop(lambda carry: carry[0], move, (needed, cache))[1]


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

    def iterate(one: Any) -> Any:
        def body(carry: Carry) -> Carry:
            i, state = carry
            return i + 1, one(spec, params, drafter_params, state, visible)

        return body

    if state.budget is None:
        state = jax.lax.while_loop(unfinished, iterate(step), (jnp.int32(0), state))[1]
        return state_constrained(state)

    def proposing(carry: Carry) -> jax.Array:
        """Whether a row drafts, or all copy: for one that copies the others would pay."""
        _, state = carry
        drafting_rows, copying_rows = _proposing_rows(state)
        assert drafting_rows is not None
        drafts = jnp.any(drafting_rows & ~state.done)
        return drafts if copying_rows is None else drafts | jnp.all(copying_rows | state.done)

    def alternate(carry: Carry) -> Carry:
        # Two loops instead of a conditional: XLA copies the cache around a conditional in every
        # iteration.
        carry = jax.lax.while_loop(lambda c: unfinished(c) & proposing(c), iterate(step), carry)
        return jax.lax.while_loop(
            lambda c: unfinished(c) & ~proposing(c), iterate(_plain_step), carry
        )

    state = jax.lax.while_loop(unfinished, alternate, (jnp.int32(0), state))[1]
    return state_constrained(state)


decode_jit: Any = jax.jit(decode, static_argnames=("spec", "visible"), donate_argnames="state")


class Counts(NamedTuple):
    """What a row cost.

    Attributes:
        iterations: those that committed its tokens.
        plain: iterations among them in which it neither drafted nor copied, though the program can.
        accepted: for each of the γ positions of a draft, how often its proposed token was accepted
            and is one of the row's tokens.
        copying: iterations that copied.
        copied: tokens that were accepted in these.
    """

    iterations: int
    plain: int
    accepted: tuple[int, ...]
    copying: int = 0
    copied: int = 0

    @property
    def drafting(self) -> int:
        """Iterations with the drafter's proposal."""
        return self.iterations - self.plain - self.copying


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
    record = passes[starts]
    copying = record > COPIED
    # Less where a limit cut the block.
    accepted = np.minimum(np.where(copying, record - COPIED, record) - 1, committed)
    return Counts(
        iterations=len(starts),
        plain=int((record < 0).sum()),
        accepted=tuple(int((accepted[~copying] > position).sum()) for position in range(gamma)),
        copying=int(copying.sum()),
        copied=int(accepted[copying].sum()),
    )
