"""The methods by name: who drafts, what each may be told, and what it does where it is not."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from s3d_jax.decoding.state import Draft, Proposal
from s3d_jax.drafters import proposers
from s3d_jax.errors import ConfigError
from s3d_jax.settings.drafting import (
    METHODS,
    DraftConfig,
    PassCosts,
    PromptLookupConfig,
    TwoModelConfig,
    symmetric_skip,
)
from s3d_jax.weights.formats import weight_format

if TYPE_CHECKING:
    from s3d_jax.lm import LM

OPTIONS: dict[str, tuple[str, ...]] = {
    "s3d": ("gamma", "skip", "adaptive"),
    # Unused: the same call, with and without speculation.
    "ar": ("gamma", "skip", "ngram", "adaptive"),
    "prompt-lookup": ("gamma", "ngram"),
    "self-spec": ("gamma", "skip"),
    "early-exit": ("gamma", "skip"),
    "two-model": ("gamma",),
}
_PROPOSERS: dict[str, Callable[..., Proposal]] = {
    "s3d": proposers.draft_pass,
    "prompt-lookup": proposers.prompt_lookup,
    "self-spec": proposers.self_draft,
    "early-exit": proposers.self_draft,
    "two-model": proposers.two_model,
}


def default_settings(lm: "LM", method: str) -> Draft | None:
    """What a method does where nobody says otherwise; None for "ar".

    Raises:
        ConfigError: two models are asked for, and there is one.
    """
    layers = lm.config.num_layers
    match method:
        case "s3d":
            if (tuned := lm.tuning) is None:
                return lm.draft_config
            return lm.draft_config.replace(gamma=tuned.gamma, skip=tuned.skip)
        case "prompt-lookup":
            return PromptLookupConfig()
        case "self-spec":  # as S3D's untrained draft
            return DraftConfig(symmetric_skip(layers, layers // 2))
        case "early-exit":
            kept = (layers + 1) // 2
            return DraftConfig(tuple(i >= kept for i in range(layers)))
        case "two-model":
            if lm.draft_model is None:
                raise ConfigError(
                    "method 'two-model' needs a second model: load(..., draft_model=...), "
                    "lm.draft_model = ..., or --draft-model DIR"
                )
            return TwoModelConfig(lm.draft_model.config)
    return None


class Drafting(NamedTuple):
    """Fields of a `DecodeSpec`."""

    draft: Draft | None = None
    proposer: Callable[..., Proposal] | None = None
    costs: PassCosts | None = None


def drafting(lm: "LM", method: str, **options: Any) -> Drafting:
    """How `DecodeSpec` drafts, who does, and by what costs it is decided when.

    Args:
        lm: the model.
        method: one of METHODS.
        **options: gamma, skip, ngram and adaptive, None where they are not given.

    Raises:
        ConfigError: an unknown method, an option that it does not take, or a wrong value. For "ar"
            too, which uses none.
    """
    if method not in METHODS:
        raise ConfigError(f"method must be one of {METHODS}, got {method!r}")
    given = {name: value for name, value in options.items() if value is not None}
    if foreign := sorted(set(given) - set(OPTIONS[method])):
        raise ConfigError(
            f"method {method!r} has no {', '.join(foreign)}; it has {', '.join(OPTIONS[method])}"
        )
    if method == "ar":
        for other in ("s3d", "prompt-lookup"):
            drafting(lm, other, **{k: v for k, v in given.items() if k in OPTIONS[other]})
        return Drafting()
    adaptive = given.pop("adaptive", True)
    if not isinstance(adaptive, bool):
        raise ConfigError(f"adaptive must be True or False, got {adaptive!r:.80}")
    draft = default_settings(lm, method)
    assert draft is not None
    draft = draft.replace(**given)
    if isinstance(draft, DraftConfig):
        draft.validate_for(lm.config)
        if method == "early-exit" and list(draft.skip) != sorted(draft.skip):
            raise ConfigError(
                "method 'early-exit' skips the last layers and no others, got skip "
                f"{[int(s) for s in draft.skip]}: use method 'self-spec'"
            )
    if method != "s3d" or not adaptive:
        return Drafting(draft, _PROPOSERS[method])
    assert isinstance(draft, DraftConfig)
    return Drafting(draft, _PROPOSERS[method], _costs(lm, draft))


def _costs(lm: "LM", draft: DraftConfig) -> PassCosts:
    """As measured, where the device was tuned to these settings; else as estimated."""
    tuned = lm.tuning
    if tuned is not None and (tuned.gamma, tuned.skip) == (draft.gamma, draft.skip):
        return tuned.costs
    weights, backend = weight_format(lm.config), jax.default_backend()
    return PassCosts.estimated(draft, weights.bound_by_memory(lm.config.dtype, backend))


def candidate_settings(lm: "LM", method: str) -> list[dict[str, Any]]:
    """The options among which `s3d bench` looks for a method's best, where none are given."""
    layers = lm.config.num_layers
    half, quarter = layers // 2, layers // 4
    match method:
        case "s3d":
            usual = default_settings(lm, method)
            assert usual is not None
            return [{"gamma": g} for g in sorted({2, 3, 4, 6, usual.gamma})]
        case "prompt-lookup":
            return [{"gamma": g} for g in (2, 4, 8)]
        case "self-spec":
            skips = [symmetric_skip(layers, skipped) for skipped in sorted({quarter, half})]
        case "early-exit":
            skips = [tuple(i >= layers - n for i in range(layers)) for n in sorted({quarter, half})]
        case "two-model":
            return [{"gamma": g} for g in (2, 4, 6)]
        case _:
            return [{}]
    return [{"gamma": g, "skip": skip} for skip in skips for g in (2, 4)]
