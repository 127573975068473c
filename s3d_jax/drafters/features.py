"""Drafters that read the target's hidden states: in the style of EAGLE, and of Medusa."""

import dataclasses
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from s3d_jax.decoding.prefill import after_chunk, before_chunk
from s3d_jax.decoding.sizes import SlotPlan
from s3d_jax.decoding.state import Chunk, Inputs, Proposal, Verified
from s3d_jax.drafters.base import Drafter, Target, pick_tokens
from s3d_jax.drafters.token_by_token import draft_token_by_token
from s3d_jax.errors import ConfigError
from s3d_jax.mesh import mesh_of
from s3d_jax.nn.cache import KVCache, init_cache
from s3d_jax.nn.draft import with_head
from s3d_jax.nn.features import eagle_pass, layer_config, medusa_states
from s3d_jax.nn.transformer import logits_of
from s3d_jax.settings.drafting import FeatureSettings, PassCosts


class FeatureState(flax.struct.PyTreeNode):
    """What was last seen of the target.

    Attributes:
        hidden: [B, γ+1, D], what its head read at γ + 1 positions; those before x_n count.
        start: int32 [B], the first of these positions; -1 where a row has one token.
        prompt_length: int32 [B].
        last: [B, D], what the head read at the end of the last chunk, in prefill.
        cache: of EAGLE's layer, None in Medusa. Its length means nothing: the target's cache has
            it.
    """

    hidden: jax.Array
    start: jax.Array
    prompt_length: jax.Array
    last: jax.Array
    cache: KVCache | None = None


@dataclasses.dataclass(frozen=True)
class FeatureDrafter(Drafter):
    """Keeps the target's hidden states from pass to pass."""

    settings: FeatureSettings

    reads_hidden: ClassVar[bool] = True

    @classmethod
    def default_settings(cls, target: Target) -> FeatureSettings:
        found = target.feature_drafts.get(cls.name)
        if found is None:
            raise ConfigError(
                f"method {cls.name!r} needs a trained draft of its kind: s3d train --kind "
                f"{cls.name}"
            )
        if mesh_of(target.params) is not None:
            raise ConfigError(f"method {cls.name!r} runs on one device: leave out the mesh")
        return FeatureSettings(layer_config(target.config), found[0].gamma)

    @classmethod
    def candidates(cls, target: Target) -> list[dict[str, Any]]:
        most = cls.default_settings(target).gamma
        return [{"gamma": gamma} for gamma in range(2, most + 1)] or [{}]

    def params(self, target: Target) -> Any:
        return target.feature_drafts[self.name][1]

    def described(self, target: Target, costs: PassCosts | None) -> dict[str, Any]:
        return {"gamma": self.gamma}

    def init(self, plan: SlotPlan) -> FeatureState:
        lengths, size = np.asarray(plan.lengths, np.int32), self.settings.layer.hidden_size
        zeros = jnp.zeros((len(lengths), self.gamma + 1, size), self.settings.layer.dtype)
        # Each its own array: the state is donated.
        return FeatureState(zeros, jnp.asarray(lengths - 2), jnp.array(lengths), zeros[:, 0])

    def prefill(self, state: FeatureState, chunk: Chunk) -> FeatureState:
        assert chunk.hidden is not None  # `reads_hidden`
        hidden = chunk.hidden.astype(state.hidden.dtype)
        at = state.prompt_length - 2 - chunk.offset
        inside = (at >= 0) & (at < hidden.shape[1])
        found = _at(hidden, jnp.clip(at, 0, hidden.shape[1] - 1))
        first = jnp.where(inside[:, None], found, state.hidden[:, 0])
        return state.replace(hidden=state.hidden.at[:, 0].set(first), last=hidden[:, -1])

    def update(self, inputs: Inputs, verified: Verified, accepted: jax.Array) -> FeatureState:
        state = inputs.state.drafter_state
        return state.replace(hidden=verified.hidden.astype(state.hidden.dtype))


@dataclasses.dataclass(frozen=True)
class Medusa(FeatureDrafter):
    """A residual head for each position (Cai et al., arXiv 2401.10774), one candidate of each."""

    name: ClassVar[str] = "medusa"

    def validate(self, target: Target) -> None:
        heads = len(self.params(target).weights)
        if self.gamma > heads:
            raise ConfigError(f"this medusa draft has {heads} heads, and gamma is {self.gamma}")

    def propose(self, inputs: Inputs) -> Proposal:
        config, params, state = inputs.spec.config, inputs.params, inputs.state
        draft = with_head(config, params, inputs.drafter_params)
        own, n = state.drafter_state, state.cache.length
        known = _at(own.hidden, n - 1 - own.start)[:, None]
        states = medusa_states(self.settings.layer, draft, known, self.gamma)[:, 0]
        noise = None if inputs.noise is None else inputs.noise[:, : self.gamma]
        logits = logits_of(config, params, states, draft)
        tokens = pick_tokens(inputs, logits, noise, draft.vocabulary)
        return Proposal(tokens, state.cache, own.replace(start=n))


@dataclasses.dataclass(frozen=True)
class Eagle(FeatureDrafter):
    """A decoder layer over hidden states and tokens (Li et al., arXiv 2401.15077), as a chain."""

    name: ClassVar[str] = "eagle"

    def init(self, plan: SlotPlan) -> FeatureState:
        lengths = np.asarray(plan.lengths, np.int32)
        cache = init_cache(self.settings.layer, len(lengths), plan.slots, lengths)
        return super().init(plan).replace(cache=cache)

    def prefill(self, state: FeatureState, chunk: Chunk) -> FeatureState:
        assert chunk.hidden is not None and state.cache is not None
        before = jnp.concatenate([state.last[:, None], chunk.hidden[:, :-1]], axis=1)
        _, cache = eagle_pass(
            chunk.config,
            chunk.params,
            self.settings.layer,
            chunk.drafter_params,
            chunk.tokens,
            before,
            before_chunk(state.cache, chunk.offset),
            visible=chunk.visible,
        )
        cache = after_chunk(cache, chunk.offset, chunk.tokens)
        return super().prefill(state, chunk).replace(cache=cache)

    def propose(self, inputs: Inputs) -> Proposal:
        config, params, state = inputs.spec.config, inputs.params, inputs.state
        draft = with_head(config, params, inputs.drafter_params)
        own, n = state.drafter_state, state.cache.length

        def run(block: jax.Array, hidden: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
            layer, visible = self.settings.layer, inputs.visible
            return eagle_pass(config, params, layer, draft, block, hidden, cache, visible=visible)

        # The tokens that the last iteration committed, with true hidden states in place of the
        # estimates that they were drafted with; after x_n scratch.
        first = own.start + 1
        at = first[:, None] + jnp.arange(self.gamma + 1)
        block = jnp.take_along_axis(state.tokens, at, axis=1, mode="clip")
        states, cache = run(block, own.hidden, own.cache.replace(length=first))
        estimate = _at(states, n - first)[:, None]

        def one_pass(
            block: jax.Array, before: jax.Array, carried: tuple[jax.Array, KVCache]
        ) -> tuple[jax.Array, tuple[jax.Array, KVCache]]:
            estimate, cache = carried
            estimate, cache = run(block, estimate, cache.replace(length=n + before))
            return logits_of(config, params, estimate, draft), (estimate, cache)

        logits = logits_of(config, params, estimate, draft)
        carried = estimate, cache
        tokens, (_, cache) = draft_token_by_token(
            inputs, one_pass, logits, carried, draft.vocabulary
        )
        return Proposal(tokens, state.cache, own.replace(start=n, cache=cache))


def _at(hidden: jax.Array, places: jax.Array) -> jax.Array:
    """[B, T, D] at one place of each row: [B, D]."""
    return jnp.take_along_axis(hidden, places[:, None, None], axis=1, mode="clip")[:, 0]
