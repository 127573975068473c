"""What is decoded (`Target`), and what every drafter offers (`Drafter`)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from s3d_jax.decoding.sampling import SamplingFeatures, scores
from s3d_jax.decoding.sizes import SlotPlan
from s3d_jax.decoding.state import Inputs, Proposer, process
from s3d_jax.errors import ConfigError
from s3d_jax.nn.draft import DraftParams, begin_chain, chained, with_head
from s3d_jax.nn.features import FeatureDraft
from s3d_jax.nn.largest import largest, largest_few
from s3d_jax.nn.transformer import logits_of
from s3d_jax.settings.drafting import DraftConfig, FeatureConfig, PassCosts, Tuning
from s3d_jax.settings.model import ModelConfig
from s3d_jax.weights.base import num_bytes
from s3d_jax.weights.trees import Params


class SecondModel(NamedTuple):
    """A smaller model of the same vocabulary, which drafts in classic speculative decoding."""

    config: ModelConfig
    params: Params


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """A model with its limits, and what drafters may use of it; knows no tokenizer.

    Attributes:
        config, params: the model.
        max_length: tokens (prompt and output) that a row may have.
        eos_token_ids: tokens that end a text.
        draft_config, draft_params: S3D's draft, trained or not.
        feature_drafts: trained drafts that read hidden states, by their kind ("eagle", "medusa").
        draft_model: a second model, or None.
        tuning: what `s3d tune` chose for this device, or None.
    """

    config: ModelConfig
    params: Params
    max_length: int
    eos_token_ids: tuple[int, ...]
    draft_config: DraftConfig
    draft_params: DraftParams
    feature_drafts: Mapping[str, tuple[FeatureConfig, FeatureDraft]] = dataclasses.field(
        default_factory=dict
    )
    draft_model: SecondModel | None = None
    tuning: Tuning | None = None


class Choice(NamedTuple):
    """A drafter with its settings, and the costs by which each row decides whether to draft.

    Attributes:
        drafter: None is AR.
        costs: None always drafts.
        gain: speed over that of plain decoding as tuning measured it; None where it did not.
        copies: whether rows copy where their text repeats itself, instead of drafting.
    """

    drafter: "Drafter | None" = None
    costs: PassCosts | None = None
    gain: float | None = None
    copies: bool = False


@dataclasses.dataclass(frozen=True)
class Drafter(Proposer):
    """A proposer with settings, as users choose it by the name of its method.

    A subclass names itself, lists its options, and implements `propose`; `registry.register` makes
    it available everywhere. Equal drafters share programs.

    Attributes:
        settings: a frozen record (`settings.records.Record`) with at least `gamma`.
        name: of the method.
        options: names of the generation options that it takes.
    """

    settings: Any

    name: ClassVar[str]
    options: ClassVar[tuple[str, ...]] = ("gamma",)

    @classmethod
    def default_settings(cls, target: Target) -> Any:
        """The settings where the user gives none.

        Raises:
            ConfigError: the target lacks what the drafter needs.
        """
        raise NotImplementedError

    @classmethod
    def candidates(cls, target: Target) -> list[dict[str, Any]]:
        """Options among which `s3d bench` looks for the fastest where the user gives none."""
        return [{}]

    @classmethod
    def choose(cls, target: Target, options: Mapping[str, Any]) -> Choice:
        """The drafter with the given options, which are a subset of `cls.options`.

        Raises:
            ConfigError: a value is wrong, or does not fit the target.
        """
        drafter = cls(cls.default_settings(target).replace(**options))
        drafter.validate(target)
        return Choice(drafter)

    def validate(self, target: Target) -> None:
        """Raises ConfigError where the settings do not fit the target."""

    def params(self, target: Target) -> Any:
        """Parameters in addition to the target's own, a PyTree, or None."""
        return None

    def described(self, target: Target, costs: PassCosts | None) -> dict[str, Any]:
        """The settings in use (JSON), defaults included, as `s3d bench` shows them."""
        return self.settings.to_dict()

    def nbytes(self, target: Target, plan: SlotPlan) -> int:
        """Bytes that it needs in addition to the target's weights and cache."""
        shared = {id(x) for x in jax.tree.leaves(target.params)}
        own = {id(x): num_bytes(x) for x in jax.tree.leaves(self.params(target))}
        weights = sum(size for key, size in own.items() if key not in shared)
        return weights + self.state_bytes(plan)

    def state_bytes(self, plan: SlotPlan) -> int:
        """Bytes of its own state."""
        return num_bytes(jax.eval_shape(lambda: self.init(plan)))

    @property
    def gamma(self) -> int:
        return self.settings.gamma


def pick_tokens(
    inputs: Inputs,
    logits: jax.Array,
    noise: jax.Array | None,
    vocabulary: jax.Array | None = None,
) -> jax.Array:
    """Draft tokens by the rule by which the target chooses: int32 [B, T].

    Sampled rows use the target's own noise. So the more alike both distributions are, the more
    often both choose the same token.

    Args:
        inputs: of the iteration; `inputs.state` has the tokens that the logits have seen.
        logits: float32 [B, T, V], or [B, T, V'] with a vocabulary.
        noise: of these T positions, from `inputs.noise`.
        vocabulary: int32 [V'], the tokens that can be drafted; None is all.
    """
    return pick_few(inputs, logits, noise, vocabulary, 1)[..., 0]


def pick_few(
    inputs: Inputs,
    logits: jax.Array,
    noise: jax.Array | None,
    vocabulary: jax.Array | None,
    count: int,
) -> jax.Array:
    """`pick_tokens`, and after each token the next best ones: int32 [B, T, count]."""
    spec, state = inputs.spec, inputs.state
    # A broken draft may cost speed but never correctness: NaN would be chosen always.
    logits = jnp.nan_to_num(jnp.clip(logits, -1e30, 1e30))

    def best(x: jax.Array) -> jax.Array:
        return largest(x)[..., None] if count == 1 else largest_few(x, count)

    if vocabulary is not None:
        if spec.features == SamplingFeatures():
            return vocabulary[best(logits)]
        others = jnp.full((*logits.shape[:2], spec.config.vocab_size), -1e30)
        logits = others.at[:, :, vocabulary].set(logits)
    processed = process(spec, logits, state)
    found = scores(processed, state.sampling, spec.features, noise)
    if count > 1 and noise is not None:
        # Greedy rows are warped to one token alone, which says nothing of the next ones.
        greedy = state.sampling.temperature == 0
        found = jnp.where(greedy[:, None, None], processed, found)
    return best(found)


def pick_chained(inputs: Inputs, hidden: jax.Array, before: jax.Array | None = None) -> jax.Array:
    """The draft tokens of a block and their leaves, the chain's corrections included.

    Args:
        inputs: of the iteration.
        hidden: [B, γ, D], the input of the head.
        before: int32 [B, 1], the token by which the chain corrects the first row; None does not
            correct it.

    Returns:
        int32 [B, γ+k], as in `Proposal`.
    """
    spec, params, draft = inputs.spec, inputs.params, inputs.drafter_params
    gamma = hidden.shape[1]
    leaves = [spec.leaf_depths.count(i) for i in range(1, gamma + 1)]
    draft = with_head(spec.config, params, draft)
    logits = logits_of(spec.config, params, hidden, draft)
    picked: list[jax.Array] = []  # of each row, [B, 1, 1 + its leaves]
    if not draft.chain or (gamma == 1 and before is None):
        noise = None if inputs.noise is None else inputs.noise[:, :gamma]
        found = pick_few(inputs, logits, noise, draft.vocabulary, 1 + max(leaves))
        picked = [found[:, i : i + 1, : 1 + count] for i, count in enumerate(leaves)]
    else:
        chain = begin_chain(spec.config, params, draft, hidden, logits)
        counts, rows = inputs.state.output_counts, jnp.arange(hidden.shape[0])
        for i, count in enumerate(leaves):
            here = slice(i, i + 1)
            q = logits[:, here]
            if before is not None:
                q = chained(spec.config, params, draft, chain.rows(here), q, before)
            if picked and spec.features.penalized:
                counts = counts.at[rows, picked[-1][:, 0, 0]].add(1)
            noise = None if inputs.noise is None else inputs.noise[:, here]
            state = inputs.state.replace(output_counts=counts)
            known = inputs._replace(state=state)
            picked.append(pick_few(known, q, noise, draft.vocabulary, 1 + count))
            before = picked[-1][:, :, 0]
    tokens = [row[:, :, 0] for row in picked]
    return jnp.concatenate([*tokens, *(row[:, 0, 1:] for row in picked)], axis=1)


def checked_bool(name: str, value: Any) -> bool:
    """Raises ConfigError unless an option is True or False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False, got {value!r:.80}")
    return value
