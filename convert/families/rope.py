"""Rotary settings: HF's two spellings of them -> RopeConfig, and back."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from convert.families.fields import Fields
from s3d_jax.errors import ConfigError
from s3d_jax.settings.model import ModelConfig, RopeConfig

DEFAULT_THETA = 10000.0
_USUAL_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


def take_rope(
    fields: Fields,
    max_position_embeddings: int,
    *,
    theta: float = DEFAULT_THETA,
    types: Sequence[str] = _USUAL_TYPES,
    aliases: Mapping[str, str] = {},
    partial: bool = False,
) -> RopeConfig:
    """Takes rotary settings in either spelling of HF.

    transformers 4: `rope_theta`, and `rope_scaling` with "type" or "rope_type". transformers 5:
    all of it in `rope_parameters`.

    Args:
        fields: the model's.
        max_position_embeddings: the model's.
        theta: the base if none is given.
        types: the types that HF's code for the family computes.
        aliases: other names of types.
        partial: whether a head may be rotated in part.

    Raises:
        ConfigError: a setting is missing, wrong, given twice or not understood.
    """
    old, new = fields.object("rope_scaling"), fields.object("rope_parameters")
    if old and new and old != new:
        raise fields.error("rope_scaling and rope_parameters are both there and differ: remove one")
    rope = fields.inside("rope_parameters" if new else "rope_scaling", new or old)
    given = fields.agreed((fields, "rope_theta"), (rope, "rope_theta"))
    settings: dict[str, Any] = {"theta": theta if given is None else given}
    fraction = fields.agreed(*((f, "partial_rotary_factor") for f in (fields, rope)))
    if fraction is not None:
        settings["rotary_fraction"] = fraction
        if fraction != 1 and not partial:
            raise fields.error("partial_rotary_factor is not 1: this family rotates whole heads")
    name = "original_max_position_embeddings"
    original = fields.agreed((fields, name), (rope, name))
    return read_rope(rope, settings, original, max_position_embeddings, types, aliases)


def read_rope(
    rope: Fields,
    settings: dict[str, Any],
    original: int | None,
    max_position_embeddings: int,
    types: Sequence[str] = _USUAL_TYPES,
    aliases: Mapping[str, str] = {},
) -> RopeConfig:
    """Reads the settings of one JSON object, in addition to those known already."""
    kind = rope.agreed((rope, "rope_type"), (rope, "type")) or "default"
    kind = aliases.get(kind, kind) if isinstance(kind, str) else kind
    if kind not in types:
        raise rope.error(f"rope type {kind!r:.80} is unknown; known are {tuple(types)}")
    settings = {"type": kind} | settings
    if kind in ("linear", "dynamic", "llama3", "yarn"):
        settings["factor"] = rope.number("factor")
    if kind == "dynamic":
        # HF's formula grows from max_position_embeddings, and ignores any other original length.
        if original not in (None, max_position_embeddings):
            raise rope.error(
                f"original_max_position_embeddings {original!r:.80} differs from "
                f"max_position_embeddings {max_position_embeddings}, from which this type grows"
            )
        original = max_position_embeddings
    if kind == "llama3":
        settings["low_freq_factor"] = rope.number("low_freq_factor")
        settings["high_freq_factor"] = rope.number("high_freq_factor")
    if kind == "yarn":
        rope.require("truncate", True)
        settings["beta_fast"] = rope.number("beta_fast", 32.0)
        settings["beta_slow"] = rope.number("beta_slow", 1.0)
        settings["attention_factor"] = _yarn_attention_factor(rope, settings["factor"])
    if kind == "longrope":
        settings["short_factors"] = rope.numbers("short_factor")
        settings["long_factors"] = rope.numbers("long_factor")
    if kind in ("llama3", "yarn") and original is None:
        original = max_position_embeddings  # as HF's `standardize_rope_params`
    if kind in ("dynamic", "llama3", "yarn", "longrope"):
        settings["original_max_position_embeddings"] = original
    try:
        config = RopeConfig(**settings)
        if kind == "longrope":
            factor = _longrope_attention_factor(rope, config, max_position_embeddings)
            config = config.replace(attention_factor=factor)
    except (ConfigError, TypeError) as error:  # TypeError: a string where a number belongs
        raise rope.error(str(error)) from error
    rope.finish(harmless=())
    return config


def _yarn_attention_factor(rope: Fields, factor: float) -> float:
    """The given factor, or YaRN's (arXiv 2309.00071, section 3.4), or a ratio of two of these."""

    def recommended(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    scale, everywhere = (rope.optional_number(name) for name in ("mscale", "mscale_all_dim"))
    if scale is not None and everywhere is not None:
        return rope.number("attention_factor", recommended(scale) / recommended(everywhere))
    return rope.number("attention_factor", recommended(1.0))


def _longrope_attention_factor(
    rope: Fields, config: RopeConfig, max_position_embeddings: int
) -> float:
    """The given factor, or LongRoPE's for this stretch (arXiv 2402.13753, section 3.3)."""
    original = config.original_max_position_embeddings
    assert original is not None  # RopeConfig checks it
    stretch = rope.number("factor", max_position_embeddings / original)
    recommended = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    return rope.number("attention_factor", recommended)


def rope_fields(config: ModelConfig) -> dict[str, Any]:
    """HF's fields for rotary settings, in the spelling that transformers 4 and 5 both read."""
    rope = config.rope
    fields: dict[str, Any] = {"rope_theta": rope.theta, "rope_scaling": rope_scaling(rope)}
    if rope.rotary_fraction != 1:
        fields["partial_rotary_factor"] = rope.rotary_fraction
    if rope.type == "longrope":
        original = rope.original_max_position_embeddings
        assert original is not None  # RopeConfig checks it
        fields["original_max_position_embeddings"] = original
        fields["rope_scaling"]["factor"] = config.max_position_embeddings / original
    return fields


def rope_scaling(rope: RopeConfig) -> dict[str, Any] | None:
    """HF's object for all settings but the base; None for the default type."""
    scaling: dict[str, Any] = {"rope_type": rope.type}
    if rope.type == "longrope":
        return scaling | {
            "short_factor": list(rope.short_factors),
            "long_factor": list(rope.long_factors),
            "attention_factor": rope.attention_factor,
        }
    scaling["factor"] = rope.factor
    if rope.type in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = rope.original_max_position_embeddings
    if rope.type == "llama3":
        scaling["low_freq_factor"] = rope.low_freq_factor
        scaling["high_freq_factor"] = rope.high_freq_factor
    if rope.type == "yarn":
        scaling |= {
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "attention_factor": rope.attention_factor,
        }
    return None if rope.type == "default" else scaling
