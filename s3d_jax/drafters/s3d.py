"""S3D (Zhong and Bharadwaj, arXiv 2405.20314): mask tokens through the kept layers, in one pass."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from s3d_jax.decoding.state import Inputs, Proposal, last_token
from s3d_jax.drafters.base import Choice, Drafter, Target, checked_bool, pick_tokens
from s3d_jax.machine import default_device
from s3d_jax.nn.cache import KVCache
from s3d_jax.nn.draft import begin_chain, chained, with_head
from s3d_jax.nn.transformer import hidden_states, logits_of
from s3d_jax.settings.drafting import DraftConfig, PassCosts
from s3d_jax.weights.formats import bound_by_memory


@dataclasses.dataclass(frozen=True)
class S3D(Drafter):
    """Drafts γ tokens at once: x_n and γ-1 mask tokens run through the kept layers."""

    settings: DraftConfig

    name: ClassVar[str] = "s3d"
    options: ClassVar[tuple[str, ...]] = ("gamma", "skip", "adaptive")

    @classmethod
    def default_settings(cls, target: Target) -> DraftConfig:
        """The tuned settings where there are some, else the draft's own."""
        if (tuned := target.tuning) is None:
            return target.draft_config
        return target.draft_config.replace(gamma=tuned.gamma, skip=tuned.skip)

    @classmethod
    def candidates(cls, target: Target) -> list[dict[str, Any]]:
        usual = cls.default_settings(target).gamma
        return [{"gamma": gamma} for gamma in sorted({2, 3, 4, 6, usual})]

    @classmethod
    def choose(cls, target: Target, options: Mapping[str, Any]) -> Choice:
        """With `adaptive` (default True) a row falls back to AR where drafting does not pay."""
        options = dict(options)
        adaptive = checked_bool("adaptive", options.pop("adaptive", True))
        drafter = super().choose(target, options).drafter
        assert isinstance(drafter, S3D)
        if not adaptive:
            return Choice(drafter)
        tuned, draft = target.tuning, drafter.settings
        if tuned is not None and (tuned.gamma, tuned.skip) == (draft.gamma, draft.skip):
            return Choice(drafter, tuned.costs, tuned.improvement_factor)
        memory_bound = bound_by_memory(target.config, default_device().platform)
        return Choice(drafter, PassCosts.estimated(draft, memory_bound))

    def validate(self, target: Target) -> None:
        self.settings.validate_for(target.config)

    def params(self, target: Target) -> Any:
        return target.draft_params

    def described(self, target: Target, costs: PassCosts | None) -> dict[str, Any]:
        """γ; what is skipped, where that is not the draft's own; where the costs come from."""
        found: dict[str, Any] = {"gamma": self.gamma}
        if self.settings.skip != target.draft_config.skip:
            found["skip"] = self.settings.skip
        found["adaptive"] = costs is not None
        if costs is not None:
            tuned = target.tuning is not None and costs == target.tuning.costs
            found["costs"] = "tuned" if tuned else "measured"
        return found

    def propose(self, inputs: Inputs) -> Proposal:
        spec, params, draft = inputs.spec, inputs.params, inputs.drafter_params
        draft = with_head(spec.config, params, draft)
        hidden, cache = self.draft_pass(inputs)
        logits = logits_of(spec.config, params, hidden, draft)
        if not draft.chain or self.gamma == 1:
            noise = None if inputs.noise is None else inputs.noise[:, : self.gamma]
            return Proposal(pick_tokens(inputs, logits, noise, draft.vocabulary), cache)
        chain = begin_chain(spec.config, params, draft, hidden, logits)
        counts, rows = inputs.state.output_counts, jnp.arange(hidden.shape[0])
        tokens: list[jax.Array] = []
        for i in range(self.gamma):
            here = slice(i, i + 1)
            q = logits[:, here]
            if tokens:
                q = chained(spec.config, params, draft, chain.rows(here), q, tokens[-1])
                if spec.features.penalized:
                    counts = counts.at[rows, tokens[-1][:, 0]].add(1)
            noise = None if inputs.noise is None else inputs.noise[:, here]
            state = inputs.state.replace(output_counts=counts)
            tokens.append(pick_tokens(inputs._replace(state=state), q, noise, draft.vocabulary))
        return Proposal(jnp.concatenate(tokens, axis=1), cache)

    def draft_pass(self, inputs: Inputs) -> tuple[jax.Array, KVCache]:
        """The draft pass without the head: [B, γ, D], and the cache."""
        return hidden_states(
            inputs.spec.config,
            inputs.params,
            last_token(inputs.state),
            inputs.state.cache,
            skip=self.settings.skip,
            draft=inputs.drafter_params,
            num_masks=self.gamma - 1,
            bidirectional=self.settings.block_attention == "bidirectional",
            visible=inputs.visible,
        )
