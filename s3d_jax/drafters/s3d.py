"""S3D (Zhong and Bharadwaj, arXiv 2405.20314): mask tokens through the kept layers, in one pass.

A draft of the mode "merged" drafts within the verify pass (merged.py).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax

from s3d_jax.decoding.comb import leaf_depths
from s3d_jax.decoding.state import Inputs, Proposal, last_token
from s3d_jax.drafters.base import Choice, Drafter, Target, checked_bool, pick_chained
from s3d_jax.drafters.merged import Merged
from s3d_jax.errors import ConfigError
from s3d_jax.machine import default_device
from s3d_jax.nn.cache import KVCache
from s3d_jax.nn.transformer import hidden_states
from s3d_jax.settings.drafting import DraftConfig, PassCosts, checked_leaves
from s3d_jax.settings.model import ModelConfig
from s3d_jax.weights.formats import bound_by_memory, exact_sums


@dataclasses.dataclass(frozen=True)
class S3D(Drafter):
    """Drafts γ tokens at once: x_n and γ-1 mask tokens run through the kept layers.

    Attributes:
        settings: of the draft.
        leaves: other candidates for the first, second, … draft token, that many of each, which the
            verify pass checks as well (`decoding.comb`).
    """

    settings: DraftConfig
    leaves: tuple[int, ...] = ()

    name: ClassVar[str] = "s3d"
    options: ClassVar[tuple[str, ...]] = ("gamma", "skip", "leaves", "adaptive", "copies")

    @classmethod
    def default_settings(cls, target: Target) -> DraftConfig:
        """The tuned settings where there are some, else the draft's own."""
        if (tuned := target.tuning) is None:
            return target.draft_config
        return target.draft_config.replace(gamma=tuned.gamma, skip=tuned.skip)

    @classmethod
    def candidates(cls, target: Target) -> list[dict[str, Any]]:
        if target.draft_config.mode == "merged":
            return Merged.candidates(target)
        usual = cls.default_settings(target).gamma
        return [{}, *({"gamma": gamma} for gamma in (2, 3, 4, 6) if gamma != usual)]

    @classmethod
    def choose(cls, target: Target, options: Mapping[str, Any]) -> Choice:
        """With `adaptive` (default True) a row falls back to AR where drafting does not pay.

        With `copies` (default: as `adaptive`) it copies where its text repeats itself, which costs
        no draft pass. A merged draft gives the drafter `Merged`, whose rows always draft.
        """
        if target.draft_config.mode == "merged":
            return Merged.choose(target, options)
        options = dict(options)
        adaptive = checked_bool("adaptive", options.pop("adaptive", True))
        copies = checked_bool("copies", options.pop("copies", adaptive))
        tuned = target.tuning
        leaves = options.pop("leaves", None)
        if leaves is None:  # those of tuning are for its own settings
            leaves = () if tuned is None or {"gamma", "skip"} & set(options) else tuned.leaves
        settings = cls.default_settings(target).replace(**options)
        drafter = cls(settings, checked_leaves(leaves, settings.gamma))
        drafter.validate(target)
        if not adaptive:
            return Choice(drafter, copies=copies)
        chosen = settings.gamma, settings.skip, drafter.leaves
        if tuned is not None and (tuned.gamma, tuned.skip, tuned.leaves) == chosen:
            return Choice(drafter, tuned.costs, tuned.improvement_factor, copies)
        memory_bound = bound_by_memory(target.config, default_device().platform)
        return Choice(drafter, PassCosts.estimated(settings, memory_bound), copies=copies)

    def validate(self, target: Target) -> None:
        self.settings.validate_for(target.config)
        if not self.leaves:
            return
        if not takes_leaves(target.config):
            raise ConfigError(
                "leaves (--leaves) would change last bits of this model, whose texts are the same "
                "bits on CPUs by every method: leave them out (they seldom pay on CPUs)"
            )
        most, tokens = max(self.leaves), target.config.vocab_size
        if target.draft_params.vocabulary is not None:
            tokens = len(target.draft_params.vocabulary)
        if most >= tokens:
            raise ConfigError(
                f"leaves (--leaves) has {most} beside one draft token, and the draft has only "
                f"{tokens} tokens to choose from"
            )

    def params(self, target: Target) -> Any:
        return target.draft_params

    def described(self, target: Target, costs: PassCosts | None) -> dict[str, Any]:
        """γ; skipped layers that are not the draft's own; leaves; where the costs come from."""
        found: dict[str, Any] = {"gamma": self.gamma}
        if self.settings.skip != target.draft_config.skip:
            found["skip"] = self.settings.skip
        if self.leaf_depths:
            found["leaves"] = self.leaves
        found["adaptive"] = costs is not None
        if costs is not None:
            tuned = target.tuning is not None and costs == target.tuning.costs
            found["costs"] = "tuned" if tuned else "measured"
        return found

    @property
    def leaf_depths(self) -> tuple[int, ...]:
        return leaf_depths(self.leaves)

    def propose(self, inputs: Inputs) -> Proposal:
        hidden, cache = self.draft_pass(inputs)
        return Proposal(pick_chained(inputs, hidden), cache)

    def draft_pass(self, inputs: Inputs) -> tuple[jax.Array, KVCache]:
        """The draft pass without the head: [B, γ, D], and the cache."""
        return hidden_states(
            inputs.spec.config,
            inputs.params,
            last_token(inputs.state),
            inputs.state.cache,
            skip=self.settings.skip,
            draft=inputs.drafter_params,
            num_masks=self.settings.num_masks,
            bidirectional=self.settings.block_attention == "bidirectional",
            visible=inputs.visible,
        )


def takes_leaves(config: ModelConfig) -> bool:
    """Whether a model's texts are those of plain decoding with leaves too, on this device.

    Where a token has the same bits in any block, a leaf, in a slot of its own, would have others.
    """
    return not exact_sums(config) or default_device().platform != "cpu"


def drafter_of(draft: DraftConfig, model: ModelConfig) -> S3D | Merged:
    """The drafter of a draft's mode."""
    return Merged(draft, model) if draft.mode == "merged" else S3D(draft)
