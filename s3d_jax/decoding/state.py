"""What decoding is about: the program's static description, the state, a proposal.

Below decode.py, which runs it, and proposers.py, which drafts; with what both need of a state.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from s3d_jax.decoding.adaptive import Budget
from s3d_jax.decoding.sampling import SamplingFeatures, SamplingParams, penalize
from s3d_jax.nn.cache import KVCache
from s3d_jax.nn.draft import DraftParams
from s3d_jax.settings.drafting import DraftConfig, PassCosts, PromptLookupConfig, TwoModelConfig
from s3d_jax.settings.model import ModelConfig
from s3d_jax.weights.trees import Params

Draft = DraftConfig | PromptLookupConfig | TwoModelConfig
DrafterParams = DraftParams | Params | None  # what a proposer needs beside the target's own


class DecodeState(flax.struct.PyTreeNode):
    """Everything that changes while a batch decodes.

    With n = cache.length: tokens 0 … n of a row are committed, keys and values of 0 … n-1 are in
    the cache.

    Attributes:
        tokens: int32 [B, S], prompt and output; behind position n it holds scratch.
        cache: the key/value cache, S slots.
        done: bool [B], rows that have finished; they stay as they are.
        limit: int32 [B], tokens (prompt included) at which a row ends.
        padding: int32 [B], tokens by which a row's prompt is shorter than the longest prompt that
            runs the same prefill programs (`padded_length`).
        sampling: the rows' sampling settings and keys.
        prompt_tokens: bool [B, V], and output_counts: int32 [B, V], what penalties need to know of
            the context; [B, 0] where no row is penalized.
        passes: int32 [B, S], a record for `statistics`: where the first token of an iteration was
            committed, 1 + the draft tokens accepted in it, or -1 if the row did not draft; 0 at the
            other committed tokens.
        draft_cache: the cache of a second model that drafts, S slots as well; else None. Its length
            means nothing: what is committed is what `cache` says.
        budget: what rows decide by whether they draft; None where they always do.
    """

    tokens: jax.Array
    cache: KVCache
    done: jax.Array
    limit: jax.Array
    padding: jax.Array
    sampling: SamplingParams
    prompt_tokens: jax.Array
    output_counts: jax.Array
    passes: jax.Array
    draft_cache: KVCache | None = None
    budget: Budget | None = None


class Proposal(NamedTuple):
    """What a proposer returns.

    Attributes:
        tokens: int32 [B, γ].
        logits: float32 [B, γ, V], warped; their softmax is what the tokens were drawn from. None
            where the tokens were chosen without chance.
        cache: the cache, whose scratch slots may have been written.
        draft_cache: the same of a second model, if there is one.
    """

    tokens: jax.Array
    logits: jax.Array | None
    cache: KVCache
    draft_cache: KVCache | None = None


@dataclasses.dataclass(frozen=True)
class DecodeSpec:
    """Static description of a decoding program; equal specs share one compilation.

    Attributes:
        config: the model.
        draft: how to draft, in the words of the proposer; None is plain AR.
        features: which sampling code is needed.
        stop_ids: tokens that end a row (they are committed, nothing behind them is).
        proposer: who proposes the γ tokens: one of proposers.py, or something with its arguments.
            None is S3D's `draft_pass`.
        costs: of the passes, by which each row decides whether to draft (`adaptive`); None always
            drafts.
    """

    config: ModelConfig
    draft: Draft | None = None
    features: SamplingFeatures = SamplingFeatures()
    stop_ids: tuple[int, ...] = ()
    proposer: "Callable[..., Proposal] | None" = None
    costs: PassCosts | None = None

    def __post_init__(self) -> None:
        assert self.costs is None or len(self.costs.verify) == self.gamma + 1

    @property
    def gamma(self) -> int:
        """Draft tokens per iteration; 0 for AR."""
        return 0 if self.draft is None else self.draft.gamma


def row_keys(state: DecodeState, purpose: int) -> jax.Array:
    """Fresh keys [B], from a row's own key and position: its neighbours do not matter."""

    def fold(key: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(key, position), purpose)

    return jax.vmap(fold)(state.sampling.keys, state.cache.length)


DRAFT, ACCEPT, BONUS = range(3)  # purposes of row_keys


def process(
    spec: DecodeSpec, logits: jax.Array, state: DecodeState, draft: jax.Array | None = None
) -> jax.Array:
    """Logit bias and penalties on [B, T, V]; position t has seen draft[:, :t] as well."""
    sampling = state.sampling
    if spec.features.biased:
        logits = logits + sampling.logit_bias[:, None, :]
    if spec.features.penalized:
        counts = jnp.broadcast_to(state.output_counts[:, None], logits.shape)
        if draft is not None:
            one_hot = jax.nn.one_hot(draft, logits.shape[-1], dtype=jnp.int32)
            counts = counts.at[:, 1:].add(jnp.cumsum(one_hot, axis=1))
        logits = penalize(logits, sampling, state.prompt_tokens, counts)
    return logits


def last_token(state: DecodeState) -> jax.Array:
    """x_n of each row, int32 [B, 1]."""
    return jnp.take_along_axis(state.tokens, state.cache.length[:, None], axis=1)
