"""Classic speculative decoding: a second, smaller model drafts (Leviathan et al., 2211.17192)."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from s3d_jax.decoding.prefill import prefill_chunk
from s3d_jax.decoding.sizes import SlotPlan
from s3d_jax.decoding.state import Chunk, Inputs, Proposal
from s3d_jax.drafters.base import Drafter, Target
from s3d_jax.drafters.token_by_token import draft_token_by_token
from s3d_jax.errors import ConfigError
from s3d_jax.nn.cache import KVCache, init_cache
from s3d_jax.nn.transformer import forward
from s3d_jax.settings.drafting import TwoModelConfig


@dataclasses.dataclass(frozen=True)
class TwoModel(Drafter):
    """A second model drafts token by token, with a cache of its own."""

    settings: TwoModelConfig

    name: ClassVar[str] = "two-model"

    @classmethod
    def default_settings(cls, target: Target) -> TwoModelConfig:
        if target.draft_model is None:
            raise ConfigError(
                "method 'two-model' needs a second model: load(..., draft_model=...), "
                "lm.draft_model = ..., or --draft-model DIR"
            )
        return TwoModelConfig(target.draft_model.config)

    @classmethod
    def candidates(cls, target: Target) -> list[dict[str, Any]]:
        return [{"gamma": gamma} for gamma in (2, 4, 6)]

    def params(self, target: Target) -> Any:
        assert target.draft_model is not None
        return target.draft_model.params

    def described(self, target: Target, costs: Any) -> dict[str, Any]:
        return {"gamma": self.gamma}

    def init(self, plan: SlotPlan) -> KVCache:
        """The second model's cache. Its length means nothing: the target's cache has it."""
        lengths = np.asarray(plan.lengths, np.int32)
        model = self.settings.model
        return init_cache(model, len(lengths), plan.slots, lengths, plan.largest_block)

    def prefill(self, state: KVCache, chunk: Chunk) -> KVCache:
        model, params = self.settings.model, chunk.drafter_params
        return prefill_chunk(model, params, chunk.tokens, state, chunk.offset, chunk.visible)

    def propose(self, inputs: Inputs) -> Proposal:
        params, state, visible = inputs.drafter_params, inputs.state, inputs.visible
        model, n = self.settings.model, state.cache.length

        def one_pass(
            block: jax.Array, before: jax.Array, cache: KVCache
        ) -> tuple[jax.Array, KVCache]:
            cache = cache.replace(length=n + before)
            return forward(model, params, block, cache, visible=visible)

        # The first pass takes the last two tokens: if the last draft was accepted completely, this
        # model has not seen its last token yet. A prompt of one token has none before it: then the
        # pass takes x_0 and scratch after it.
        first = jnp.maximum(n - 1, 0)
        at = first[:, None] + jnp.arange(2)
        block = jnp.take_along_axis(state.tokens, at, axis=1)
        logits, cache = one_pass(block, first - n, state.drafter_state)
        logits = jnp.take_along_axis(logits, (n - first)[:, None, None], axis=1)
        tokens, cache = draft_token_by_token(inputs, one_pass, logits, cache)
        return Proposal(tokens, state.cache, cache)
