"""Drafters that run token by token: the target without some of its layers, untrained."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from s3d_jax.decoding.state import Inputs, Proposal, last_token
from s3d_jax.drafters.base import Drafter, Target, pick_tokens
from s3d_jax.errors import ConfigError
from s3d_jax.nn.cache import KVCache
from s3d_jax.nn.transformer import forward
from s3d_jax.settings.drafting import DraftConfig, symmetric_skip

# (tokens [B, 1], how many draft tokens come before, what is carried) -> (logits [B, 1, V], carried)
OnePass = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True)
class SelfSpeculative(Drafter):
    """Self-speculative decoding (Zhang et al., arXiv 2309.08168): any layers are skipped."""

    settings: DraftConfig

    name: ClassVar[str] = "self-spec"
    options: ClassVar[tuple[str, ...]] = ("gamma", "skip")

    @classmethod
    def default_settings(cls, target: Target) -> DraftConfig:
        """Skips the middle half, as S3D's untrained draft."""
        return DraftConfig(cls._skip(target, target.config.num_layers // 2))

    @classmethod
    def candidates(cls, target: Target) -> list[dict[str, Any]]:
        layers = target.config.num_layers
        skips = [cls._skip(target, skipped) for skipped in sorted({layers // 4, layers // 2})]
        return [{"gamma": gamma, "skip": skip} for skip in skips for gamma in (2, 4)]

    @classmethod
    def _skip(cls, target: Target, skipped: int) -> tuple[bool, ...]:
        return symmetric_skip(target.config.num_layers, skipped)

    def validate(self, target: Target) -> None:
        self.settings.validate_for(target.config)

    def described(self, target: Target, costs: Any) -> dict[str, Any]:
        return {"gamma": self.gamma, "skip": self.settings.skip}

    def propose(self, inputs: Inputs) -> Proposal:
        spec, params, state, visible = inputs.spec, inputs.params, inputs.state, inputs.visible
        skip = self.settings.skip

        def one_pass(
            block: jax.Array, before: jax.Array, cache: KVCache
        ) -> tuple[jax.Array, KVCache]:
            cache = cache.replace(length=state.cache.length + before)
            return forward(spec.config, params, block, cache, skip=skip, visible=visible)

        logits, cache = one_pass(last_token(state), jnp.int32(0), state.cache)
        tokens, cache = draft_token_by_token(inputs, one_pass, logits, cache)
        return Proposal(tokens, cache.replace(length=state.cache.length))


@dataclasses.dataclass(frozen=True)
class EarlyExit(SelfSpeculative):
    """Early exit: final norm and head directly after the exit layer, as in LayerSkip.

    LayerSkip is Elhoushi et al., arXiv 2404.16710.
    """

    name: ClassVar[str] = "early-exit"

    @classmethod
    def _skip(cls, target: Target, skipped: int) -> tuple[bool, ...]:
        layers = target.config.num_layers
        return tuple(i >= layers - skipped for i in range(layers))

    def validate(self, target: Target) -> None:
        super().validate(target)
        skip = self.settings.skip
        if list(skip) != sorted(skip):
            raise ConfigError(
                "method 'early-exit' skips the last layers and no others, got skip "
                f"{[int(s) for s in skip]}: use method 'self-spec'"
            )


def draft_token_by_token(
    inputs: Inputs,
    one_pass: OnePass,
    logits: jax.Array,
    carried: Any,
    vocabulary: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """γ draft tokens, each of which sees the ones before it.

    Args:
        inputs: of the iteration.
        one_pass: of the model that drafts.
        logits: float32 [B, 1, V], of the first draft token.
        carried: from pass to pass, a PyTree: the cache with what these logits have seen.
        vocabulary: see `pick_tokens`.

    Returns:
        The tokens, int32 [B, γ], and what is carried.
    """
    spec, state = inputs.spec, inputs.state
    rows = jnp.arange(logits.shape[0])

    def pick(logits: jax.Array, i: jax.Array, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The draft token i, int32 [B, 1], and the counts with it."""
        noise = inputs.noise
        if noise is not None:
            noise = jax.lax.dynamic_slice_in_dim(noise, i, 1, axis=1)
        here = inputs._replace(state=state.replace(output_counts=counts))
        token = pick_tokens(here, logits, noise, vocabulary)
        if spec.features.penalized:
            counts = counts.at[rows, token[:, 0]].add(1)
        return token, counts

    def body(
        carry: tuple[jax.Array, Any, jax.Array], i: jax.Array
    ) -> tuple[tuple[jax.Array, Any, jax.Array], jax.Array]:
        token, carried, counts = carry
        logits, carried = one_pass(token, i, carried)
        token, counts = pick(logits, i, counts)
        return (token, carried, counts), token[:, 0]

    token, counts = pick(logits, jnp.int32(0), state.output_counts)
    steps = jnp.arange(1, spec.gamma, dtype=jnp.int32)
    (_, carried, _), tokens = jax.lax.scan(body, (token, carried, counts), steps)
    return jnp.concatenate([token, tokens.T], axis=1), carried
