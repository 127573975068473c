"""Prompt lookup decoding (Saxena 2023): copies what followed the last tokens earlier."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp

from s3d_jax.decoding.state import Inputs, Proposal
from s3d_jax.drafters.base import Drafter, Target
from s3d_jax.settings.drafting import PromptLookupConfig


@dataclasses.dataclass(frozen=True)
class PromptLookup(Drafter):
    """Copies from the text so far.

    Among all earlier places that end with the same tokens as the text, up to `ngram` tokens, the
    longest match counts, and among equal ones the latest. A match less than γ tokens back is
    continued as a repetition; without a match the last token is repeated.
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
        state, visible = inputs.state, inputs.visible
        n = state.cache.length[:, None]
        tokens = state.tokens[:, :visible]
        slots = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        same, match = jnp.ones(tokens.shape, bool), jnp.zeros(tokens.shape, jnp.int32)
        # match[j]: how many of the tokens up to j equal the tokens up to n.
        for back in range(self.settings.ngram):
            ours = jnp.take_along_axis(tokens, jnp.maximum(n - back, 0), axis=1)
            theirs = jnp.pad(tokens, ((0, 0), (back, 0)), constant_values=-1)
            same = same & (theirs[:, : tokens.shape[1]] == ours)
            match = match + same
        best = jnp.max(jnp.where(slots < n, match, 0), axis=1, keepdims=True)
        found = (match == best) & (best > 0) & (slots < n)
        place = jnp.max(jnp.where(found, slots, -1), axis=1, keepdims=True)
        period = jnp.where(best > 0, n - place, 1)
        at = n - period + 1 + jnp.arange(self.gamma) % period
        return Proposal(jnp.take_along_axis(tokens, at, axis=1), state.cache)
