"""What decoding works on: the static description of a program, the state, a proposal.

Everything here is below `step` (which decodes) and below the drafters (which propose).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from s3d_jax.decoding.adaptive import Budget
from s3d_jax.decoding.copying import Copying, new_copying
from s3d_jax.decoding.sampling import SamplingFeatures, SamplingParams, gumbel_noise, penalize
from s3d_jax.decoding.sizes import SlotPlan
from s3d_jax.jax_settings import under_usual_jax_settings
from s3d_jax.nn.cache import KVCache, grown, init_cache
from s3d_jax.nn.transformer import hidden_states, logits_of
from s3d_jax.settings.model import ModelConfig
from s3d_jax.weights.trees import Params


class DecodeState(flax.struct.PyTreeNode):
    """Everything that changes while a batch decodes.

    With n = cache.length: tokens 0 … n of a row are committed, keys and values of 0 … n-1 are in
    the cache.

    Attributes:
        tokens: int32 [B, S], prompt and output; scratch after position n.
        cache: the key/value cache, S slots.
        done: bool [B], rows that have finished; they stay as they are.
        broken: bool [B], rows that have ended since the logits of their next token are no numbers.
        limit: int32 [B], tokens (prompt included) at which a row ends.
        padding: int32 [B], tokens by which a row's prompt is shorter than the longest prompt that
            runs the same prefill programs (`SlotPlan.padded`).
        stop_ids: int32 [E], tokens that end a row (they are committed, nothing after them is); -1,
            which is no token, fills it up. An array, so that other ids compile nothing.
        sampling: the rows' sampling settings and keys.
        prompt_tokens: bool [B, V], and output_counts: int32 [B, V], what penalties need to know of
            the context; [B, 0] where no row is penalized.
        passes: int32 [B, S], a record for `statistics`: at the first token of each iteration, 1 +
            the draft tokens accepted in it, -1 if the row did not draft, more than `COPIED` if it
            copied; 0 at the other committed tokens.
        drafter_state: the drafter's own state, a PyTree (`Proposer.init`), or None.
        budget: what rows decide by whether they draft; None where they always do, or copy.
        copying: what rows may copy; None where they never do.
    """

    tokens: jax.Array
    cache: KVCache
    done: jax.Array
    broken: jax.Array
    limit: jax.Array
    padding: jax.Array
    stop_ids: jax.Array
    sampling: SamplingParams
    prompt_tokens: jax.Array
    output_counts: jax.Array
    passes: jax.Array
    drafter_state: Any = None
    budget: Budget | None = None
    copying: Copying | None = None


COPIED = 1 << 16  # is added to the record of an iteration that copied


class Proposal(NamedTuple):
    """What a drafter proposes.

    Attributes:
        tokens: int32 [B, γ+k], the draft tokens, then the k leaves beside them.
        cache: the target's cache, whose scratch slots may have been written.
        drafter_state: the drafter's own state; None keeps it as it was.
    """

    tokens: jax.Array
    cache: KVCache
    drafter_state: Any = None


class Verified(NamedTuple):
    """What verifying w proposed tokens gave, leaves included.

    Attributes:
        logits: float32 [B, w+1, V], after x_n and after each token; biased and penalized.
        cache: with the keys and values of x_n and the tokens after `length`.
        hidden: [B, w+1, D], what the head made the logits of.
        extra: what a drafter with a pass of its own made in it (`Proposer.verify`), or None.
    """

    logits: jax.Array
    cache: KVCache
    hidden: jax.Array
    extra: Any = None


class Chunk(NamedTuple):
    """A chunk of the prompts, as a drafter gets it.

    Attributes:
        config: the target.
        params: the target's parameters.
        drafter_params: the drafter's.
        tokens: int32 [B, T], at positions offset … offset+T-1; anything after a row's prompt.
        hidden: [B, T, D], what the target's head would read; None where not `reads_hidden`.
        offset: int scalar.
        visible: static, slots that are read.
    """

    config: ModelConfig
    params: Params
    drafter_params: Any
    tokens: jax.Array
    hidden: jax.Array | None
    offset: jax.Array
    visible: int


class Proposer:
    """What decoding asks of a drafter: a static, hashable value with pure functions.

    Proposals need not be correct: verification guarantees the target's output. What a proposer
    writes into caches after the committed tokens is scratch.

    Attributes:
        reads_hidden: whether `prefill` needs the target's hidden states.
    """

    reads_hidden: ClassVar[bool] = False

    @property
    def gamma(self) -> int:
        """Draft tokens per iteration, γ."""
        raise NotImplementedError

    @property
    def leaf_depths(self) -> tuple[int, ...]:
        """The place of each leaf that it proposes beside the draft tokens, from 1 (`comb`).

        With leaves `update` gets what was verified in the order of the block, and an accepted leaf
        is not where the draft token of its place is.
        """
        return ()

    @property
    def block(self) -> int:
        """Slots that an iteration writes after each row's committed tokens, γ+1 or more."""
        return self.gamma + 1 + len(self.leaf_depths)

    @property
    def keeps_state(self) -> bool:
        """Whether it has a state of its own, made by `init`."""
        return type(self).init is not Proposer.init

    @property
    def reads_prompts(self) -> bool:
        """Whether its state takes part in prefill."""
        return type(self).prefill is not Proposer.prefill

    def init(self, plan: SlotPlan) -> Any:
        """The proposer's own state before prefill, a PyTree of arrays; None keeps nothing.

        The first axis of an array is the rows. An array whose shape does not depend on their number
        is shared by all, and stays as it is where a row takes another prompt (`rows`).
        """
        return None

    def prefill(self, state: Any, chunk: Chunk) -> Any:
        """The state after a chunk of the prompts; called only if `reads_prompts`."""
        return state

    def propose(self, inputs: "Inputs") -> Proposal:
        """γ draft tokens for each row, and the leaves.

        With `DecodeSpec.copies` it is not called in iterations in which all rows copy.
        """
        raise NotImplementedError

    def verify(self, inputs: "Inputs", tokens: jax.Array) -> Verified:
        """The target's pass over x_n and the proposed tokens, int32 [B, γ+k].

        A drafter may let rows of its own ride in this pass (`block`).
        """
        return verify_pass(inputs, tokens)

    def update(self, inputs: "Inputs", verified: Verified, accepted: jax.Array) -> Any:
        """The proposer's state after an iteration was committed.

        Args:
            inputs: of the iteration, with the state after the commit.
            verified: of all proposed tokens, copied ones included; of none (w = 0) where no row
                drafted or copied, which happens only with a budget.
            accepted: int32 [B], accepted draft tokens.
        """
        return inputs.state.drafter_state


@dataclasses.dataclass(frozen=True)
class DecodeSpec:
    """Static description of a decoding program; equal specs share one compilation.

    Attributes:
        config: the model.
        drafter: proposes γ tokens per iteration; None is plain AR.
        features: which sampling code is needed.
        copies: whether rows copy where their text repeats itself, instead of drafting.
    """

    config: ModelConfig
    drafter: Proposer | None = None
    features: SamplingFeatures = SamplingFeatures()
    copies: bool = False

    @property
    def gamma(self) -> int:
        """Draft tokens per iteration; 0 for AR."""
        return 0 if self.drafter is None else self.drafter.gamma

    @property
    def leaf_depths(self) -> tuple[int, ...]:
        """The place of each leaf beside the draft tokens, from 1."""
        return () if self.drafter is None else self.drafter.leaf_depths

    def depths_in(self, proposed_tokens: jax.Array) -> tuple[int, ...]:
        """The place of each leaf among proposed tokens, which are none in plain iterations."""
        return self.leaf_depths if proposed_tokens.shape[1] else ()

    @property
    def block(self) -> int:
        """Slots that an iteration writes after each row's committed tokens; 1 for AR."""
        return 1 if self.drafter is None else self.drafter.block


class Inputs(NamedTuple):
    """Inputs of one iteration.

    Attributes:
        spec: the program (static).
        params: the target's parameters.
        drafter_params: the drafter's.
        state: how far decoding is.
        visible: static, slots of the cache that are read; None is all.
        noise: float32 [B, w+1, V], by which sampled rows choose the token of each position, with w
            draft tokens; None where no row is sampled.
    """

    spec: DecodeSpec
    params: Params
    drafter_params: Any
    state: DecodeState
    visible: int | None = None
    noise: jax.Array | None = None


@under_usual_jax_settings
def init_state(
    spec: DecodeSpec,
    sequences: list[np.ndarray],
    plan: SlotPlan,
    sampling: SamplingParams,
    cache: KVCache | None = None,
    stop_ids: Sequence[int] = (),
    budget: Budget | None = None,
    copy_cost: float = 0.0,
) -> DecodeState:
    """The state before prefill.

    Args:
        spec: the program.
        sequences: B arrays of token ids, each with at least one.
        plan: the batch's sizes. A row ends at its limit. With LongRoPE, a row within the turning
            point must end one token after it, and be prefilled again to continue: from there on
            all of its keys are different.
        sampling: from `batch_sampling`.
        cache: one that holds the beginnings of the sequences, `cache.length` tokens of each; may
            have fewer slots. None makes an empty one.
        stop_ids: tokens that end a row.
        budget: by which rows decide whether to draft; None always drafts.
        copy_cost: tokens that are decoded without copies in the time of an iteration that copies; 0
            copies all it can.
    """
    batch, vocab = len(sequences), spec.config.vocab_size
    lengths = np.array([len(sequence) for sequence in sequences], np.int32)
    tokens = np.zeros((batch, plan.slots), np.int32)
    seen = np.zeros((batch, vocab if spec.features.penalized else 0), bool)
    for b, sequence in enumerate(sequences):
        tokens[b, : len(sequence)] = sequence
        if spec.features.penalized:
            seen[b, sequence] = True
    limit = np.asarray(plan.limits, np.int32)
    arrays = jax.device_put(  # all at once, which costs a third of one by one
        dict(
            tokens=tokens,
            done=lengths >= limit,
            broken=np.zeros(batch, bool),
            limit=limit,
            padding=np.asarray(plan.padded, np.int32) - lengths,
            stop_ids=_filled_up(stop_ids),
            prompt_tokens=seen,
            output_counts=np.zeros(seen.shape, np.int32),
            passes=np.zeros((batch, plan.slots), np.int32),
        )
    )
    if cache is None:
        cache = init_cache(spec.config, batch, plan.slots, lengths, plan.largest_block)
    else:
        cache = grown(cache, spec.config, plan.slots, plan.largest_block)
        cache = cache.replace(prompt_length=jax.device_put(lengths))
    return DecodeState(
        cache=cache,
        sampling=sampling,
        drafter_state=None if spec.drafter is None else spec.drafter.init(plan),
        budget=budget,
        copying=new_copying(batch, copy_cost) if spec.copies else None,
        **arrays,
    )


def _filled_up(stop_ids: Sequence[int]) -> np.ndarray:
    """The ids in one of few sizes (8, 64, 512, ...), so that most numbers of ids share programs."""
    size = 8
    while size < len(stop_ids):
        size *= 8
    filled = np.full(size, -1, np.int32)
    filled[: len(stop_ids)] = stop_ids
    return filled


@under_usual_jax_settings
def restart(
    spec: DecodeSpec, state: DecodeState, plan: SlotPlan, running: Sequence[bool]
) -> DecodeState:
    """The state before the rows are prefilled again, with their tokens so far.

    Used where the keys and values in the cache no longer hold, as after LongRoPE's turning point.

    Args:
        spec, state: the program, and how far it is.
        plan: sizes with the new lengths and limits (`SlotPlan.again`).
        running: rows that continue.
    """
    lengths = np.asarray(plan.lengths, np.int32)
    return state.replace(
        cache=state.cache.replace(prompt_length=jax.device_put(lengths)),
        done=jax.device_put(~np.array(running)),
        limit=jax.device_put(np.asarray(plan.limits, np.int32)),
        padding=jax.device_put(np.asarray(plan.padded, np.int32) - lengths),
        drafter_state=None if spec.drafter is None else spec.drafter.init(plan),
    )


_CHOICE = 2  # what a position's key is used for


def choice_noise(spec: DecodeSpec, state: DecodeState, count: int) -> jax.Array | None:
    """The noise by which sampled rows choose their next tokens: float32 [B, count, V].

    It depends on a row's own key and the position alone. So a token is the same whether its
    position is the first after a pass or a later one, in whatever batch and by whatever method.
    None where no row is sampled.
    """
    if not spec.features.sampled:
        return None

    def fold(key: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(key, position), _CHOICE)

    positions = state.cache.length[:, None] + jnp.arange(count)
    keys = jax.vmap(jax.vmap(fold, (None, 0)))(state.sampling.keys, positions)
    return gumbel_noise(keys, spec.config.vocab_size)


def process(
    spec: DecodeSpec,
    logits: jax.Array,
    state: DecodeState,
    proposed_tokens: jax.Array | None = None,
) -> jax.Array:
    """Logit bias and penalties on [B, T, V].

    Position t has seen proposed_tokens[:, :t] as well, and a leaf the tokens before its place.
    """
    sampling = state.sampling
    if spec.features.biased:
        logits = logits + sampling.logit_bias[:, None, :]
    if spec.features.penalized:
        counts = jnp.broadcast_to(state.output_counts[:, None], logits.shape)
        if proposed_tokens is not None:
            one_hot = jax.nn.one_hot(proposed_tokens, logits.shape[-1], dtype=jnp.int32)
            depths = spec.depths_in(proposed_tokens)
            drafted = proposed_tokens.shape[1] - len(depths)
            before = jnp.pad(jnp.cumsum(one_hot[:, :drafted], axis=1), ((0, 0), (1, 0), (0, 0)))
            of_leaves = before[:, np.array(depths, int) - 1] + one_hot[:, drafted:]
            counts = counts + jnp.concatenate([before, of_leaves], axis=1)
        logits = penalize(logits, sampling, state.prompt_tokens, counts)
    return logits


def last_token(state: DecodeState) -> jax.Array:
    """x_n of each row, int32 [B, 1]."""
    return jnp.take_along_axis(state.tokens, state.cache.length[:, None], axis=1)


def verify_pass(inputs: Inputs, proposed_tokens: jax.Array) -> Verified:
    """The full model over x_n and w proposed tokens, leaves included."""
    config, params, state = inputs.spec.config, inputs.params, inputs.state
    block = jnp.concatenate([last_token(state), proposed_tokens], axis=1)
    hidden, cache = hidden_states(
        config,
        params,
        block,
        state.cache,
        leaf_depths=inputs.spec.depths_in(proposed_tokens),
        visible=inputs.visible,
    )
    logits = process(inputs.spec, logits_of(config, params, hidden), state, proposed_tokens)
    return Verified(logits, cache, hidden)
