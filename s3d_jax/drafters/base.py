"""What is decoded (`Target`), and what every drafter offers (`Drafter`)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from s3d_jax.decoding.sampling import categorical, warp
from s3d_jax.decoding.sizes import SlotPlan
from s3d_jax.decoding.state import (
    RNG_DRAFT,
    DecodeSpec,
    DecodeState,
    Proposal,
    process,
    row_keys,
)
from s3d_jax.errors import ConfigError
from s3d_jax.nn.draft import DraftParams
from s3d_jax.settings.drafting import DraftConfig, PassCosts, Tuning
from s3d_jax.settings.model import ModelConfig
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
        draft_model: a second model, or None.
        tuning: what `s3d tune` chose for this device, or None.
    """

    config: ModelConfig
    params: Params
    max_length: int
    eos_token_ids: tuple[int, ...]
    draft_config: DraftConfig
    draft_params: DraftParams
    draft_model: SecondModel | None = None
    tuning: Tuning | None = None


class Choice(NamedTuple):
    """A drafter with its settings, and the costs by which each row decides whether to draft.

    Attributes:
        drafter: None is AR.
        costs: None always drafts.
    """

    drafter: "Drafter | None" = None
    costs: PassCosts | None = None


@dataclasses.dataclass(frozen=True)
class Drafter:
    """Proposes γ tokens per iteration. A static, hashable value: equal ones share programs.

    A subclass is one method of decoding: it names itself, lists its options, and implements
    `propose`; `registry.register` makes it available everywhere. Proposals need not be correct:
    verification guarantees the target's output. What a drafter writes into caches after the
    committed tokens is scratch.

    Attributes:
        settings: a frozen record (`settings.records.Record`) with at least `gamma`.
        name: of the method.
        options: names of the generation options that it takes.
    """

    settings: Any

    name: ClassVar[str]
    options: ClassVar[tuple[str, ...]] = ("gamma",)

    # --- how users choose it ----------------------------------------------------------------------

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
        own = {id(x): x.nbytes for x in jax.tree.leaves(self.params(target))}
        state = jax.tree.leaves(jax.eval_shape(lambda: self.init(plan)))
        weights = sum(size for key, size in own.items() if key not in shared)
        return weights + sum(x.size * x.dtype.itemsize for x in state)

    # --- what decoding asks of it (`decoding.state.DrafterProtocol`) ------------------------------

    @property
    def gamma(self) -> int:
        """Draft tokens per iteration, γ."""
        return self.settings.gamma

    @property
    def keeps_state(self) -> bool:
        """Whether it has a state of its own."""
        return type(self).init is not Drafter.init

    def init(self, plan: SlotPlan) -> Any:
        """The drafter's own state before prefill, a PyTree of arrays; None keeps nothing."""
        return None

    def prefill(
        self, params: Any, state: Any, tokens: jax.Array, offset: jax.Array, visible: int
    ) -> Any:
        """The drafter's state after a chunk of the prompts; called only if there is a state.

        Args:
            params: its own parameters.
            state: before the chunk.
            tokens: int32 [B, T], at positions offset … offset+T-1.
            offset: int scalar.
            visible: static, slots that are read.
        """
        return state

    def propose(
        self,
        spec: DecodeSpec,
        params: Params,
        drafter_params: Any,
        state: DecodeState,
        visible: int | None,
    ) -> Proposal:
        """γ draft tokens for each row, and the distributions they were drawn from.

        Args:
            spec: the program; `spec.config` is the target.
            params: the target's.
            drafter_params: what `params` gave.
            state: how far decoding is.
            visible: static, slots of the cache that are read; None is all.
        """
        raise NotImplementedError

    def update(self, state: DecodeState, accepted: jax.Array) -> Any:
        """The drafter's state after an iteration was committed.

        Args:
            state: after the commit.
            accepted: int32 [B], accepted draft tokens.
        """
        return state.drafter


def pick_tokens(
    spec: DecodeSpec, logits: jax.Array, state: DecodeState
) -> tuple[jax.Array, jax.Array | None]:
    """Draft tokens from logits [B, T, V], and what they were drawn from, as in `Proposal`."""
    # A broken draft may cost speed but never correctness: without this, NaN would reach the
    # residual.
    logits = process(spec, jnp.nan_to_num(jnp.clip(logits, -1e30, 1e30)), state)
    if not spec.features.sampled:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), None
    logits = warp(logits, state.sampling, spec.features)
    return categorical(row_keys(state, RNG_DRAFT), logits), logits


def checked_bool(name: str, value: Any) -> bool:
    """Raises ConfigError unless an option is True or False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False, got {value!r:.80}")
    return value
