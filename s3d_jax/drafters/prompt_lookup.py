"""Prompt lookup decoding (Saxena 2023): copies what followed the last tokens earlier."""

import dataclasses
from typing import Any, ClassVar

from s3d_jax.decoding.copying import continuation, repetition
from s3d_jax.decoding.state import Inputs, Proposal
from s3d_jax.drafters.base import Drafter, Target
from s3d_jax.settings.drafting import PromptLookupConfig


@dataclasses.dataclass(frozen=True)
class PromptLookup(Drafter):
    """Copies from the text so far.

    It continues after the longest match of the last tokens, up to `ngram` of them; see `repetition`
    and `continuation`.
    """

    settings: PromptLookupConfig

    name: ClassVar[str] = "prompt-lookup"
    options: ClassVar[tuple[str, ...]] = ("gamma", "ngram")

    @classmethod
    def default_settings(cls, target: Target) -> PromptLookupConfig:
        return PromptLookupConfig()

    @classmethod
    def candidates(cls, target: Target) -> list[dict[str, Any]]:
        return [{"gamma": gamma} for gamma in (2, 4, 8)]

    def propose(self, inputs: Inputs) -> Proposal:
        state = inputs.state
        tokens, n = state.tokens[:, : inputs.visible], state.cache.length
        _, period = repetition(tokens, n, self.settings.ngram)
        return Proposal(continuation(tokens, n, period, self.gamma), state.cache)
