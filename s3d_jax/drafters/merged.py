"""Merged mode: the draft's mask rows run within the verify pass, for every possible acceptance.

BiTA (Lin et al., arXiv 2401.12522) and Samragh et al. (arXiv 2507.11851) draft in this way.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from s3d_jax.decoding.sizes import SlotPlan
from s3d_jax.decoding.state import Inputs, Proposal, Verified, last_token, process
from s3d_jax.drafters.base import Choice, Drafter, Target, checked_bool, pick_chained
from s3d_jax.errors import ConfigError
from s3d_jax.nn.transformer import hidden_states, logits_of
from s3d_jax.settings.drafting import DraftConfig, PassCosts, checked_leaves
from s3d_jax.settings.model import ModelConfig


@dataclasses.dataclass(frozen=True)
class Merged(Drafter):
    """Drafts for the next iteration within the verify pass: one pass of (γ+1)² rows per iteration.

    The pass runs x_n and the γ draft tokens as the target, and after each of these tokens γ mask
    rows with the draft's deltas. The mask rows of the last accepted token are the next draft. They
    do not know the bonus token, which they stand at; a chain learns it.

    The state is what the head reads of these rows, [B, γ, D]. It is 0 before the first iteration,
    which therefore proposes nothing useful.

    Attributes:
        settings: of the draft.
        model: the target.
    """

    settings: DraftConfig
    model: ModelConfig

    name: ClassVar[str] = "s3d"
    options: ClassVar[tuple[str, ...]] = ("gamma", "skip", "leaves", "adaptive", "copies")

    @classmethod
    def candidates(cls, target: Target) -> list[dict[str, Any]]:
        return [{"gamma": gamma} for gamma in sorted({2, 3, 4, target.draft_config.gamma})]

    @classmethod
    def choose(cls, target: Target, options: Mapping[str, Any]) -> Choice:
        """Takes γ. Refuses skipped layers, leaves, adaptive drafting and copies.

        Raises:
            ConfigError: a value is wrong, or does not fit the target.
        """
        options = dict(options)
        if any(checked_leaves(options.pop("leaves", ()), target.draft_config.gamma)):
            raise ConfigError(
                "a merged draft has no leaves (--leaves): its verify pass is full of its own masks"
            )
        for name in ("adaptive", "copies"):
            if checked_bool(name, options.pop(name, False)):
                raise ConfigError(
                    f"a merged draft drafts in every iteration: leave out {name} (--{name})"
                )
        drafter = cls(target.draft_config.replace(**options), target.config)
        drafter.validate(target)
        return Choice(drafter)

    def validate(self, target: Target) -> None:
        self.settings.validate_for(target.config)
        if target.draft_params.layers:
            raise ConfigError(
                "the draft's deltas are merged into its layers, which the verify pass of a merged "
                "draft cannot use: take the draft that read_draft returns"
            )

    def params(self, target: Target) -> Any:
        return target.draft_params

    def described(self, target: Target, costs: PassCosts | None) -> dict[str, Any]:
        return {"mode": self.settings.mode, "gamma": self.gamma}

    @property
    def block(self) -> int:
        return (self.gamma + 1) ** 2

    def init(self, plan: SlotPlan) -> jax.Array:
        shape = (len(plan.lengths), self.gamma, self.model.hidden_size)
        return jnp.zeros(shape, self.model.dtype)

    def propose(self, inputs: Inputs) -> Proposal:
        state = inputs.state
        tokens = pick_chained(inputs, state.drafter_state, before=last_token(state))
        return Proposal(tokens, state.cache)

    def verify(self, inputs: Inputs, tokens: jax.Array) -> Verified:
        spec, params, state = inputs.spec, inputs.params, inputs.state
        block = jnp.concatenate([last_token(state), tokens], axis=1)
        hidden, cache = hidden_states(
            spec.config,
            params,
            block,
            state.cache,
            # No layer is skipped, so there is no gap.
            draft=inputs.drafter_params.replace(bridges={}),
            num_masks=self.gamma,
            mask_places="last",
            bidirectional=self.settings.block_attention == "bidirectional",
            visible=inputs.visible,
        )
        count = block.shape[1]
        hidden, masks = hidden[:, :count], hidden[:, count:]
        logits = process(spec, logits_of(spec.config, params, hidden), state, tokens)
        masks = masks.reshape(len(masks), count, self.gamma, -1)
        return Verified(logits, cache, hidden, masks)

    def update(self, inputs: Inputs, verified: Verified, accepted: jax.Array) -> jax.Array:
        state: jax.Array = inputs.state.drafter_state
        if verified.extra is None:  # no row drafted
            return state
        at = accepted[:, None, None, None]
        masks = jnp.take_along_axis(verified.extra, at, axis=1)[:, 0]
        return masks.astype(state.dtype)
