"""Gemma 3, text only: query and key norms, five local layers to each global one, two rope bases.

From 4B on, it is published with a vision tower: config and weights have a part for the text model.
"""

import dataclasses
from typing import Any

from convert.families.common import QK_NORMS, Family, Names, take_window, take_windows
from convert.families.fields import Fields
from convert.families.gemma import DEFAULTS
from convert.families.gemma2 import SANDWICH, sandwich_fields, write_sandwich
from convert.families.rope import DEFAULT_THETA, read_rope, rope_scaling, take_rope
from s3d_jax.settings.model import ModelConfig, RopeConfig

_GLOBAL_THETA = 1e6


def _take_ropes(fields: Fields, max_position_embeddings: int) -> tuple[RopeConfig, RopeConfig]:
    """Rotary settings of the global and of the local layers."""
    if not (parameters := fields.object("rope_parameters")):
        local = RopeConfig(theta=fields.number("rope_local_base_freq", DEFAULT_THETA))
        return take_rope(fields, max_position_embeddings, theta=_GLOBAL_THETA), local
    kinds = fields.inside("rope_parameters", parameters)
    ropes = []
    for kind, theta in (("full_attention", _GLOBAL_THETA), ("sliding_attention", DEFAULT_THETA)):
        rope = kinds.inside(kind, kinds.object(kind))
        settings = {"theta": rope.number("rope_theta", theta)}
        original = rope.take("original_max_position_embeddings")
        ropes.append(read_rope(rope, settings, original, max_position_embeddings))
    kinds.finish(harmless=())
    return ropes[0], ropes[1]


def _read(fields: Fields) -> ModelConfig:
    gemma = sandwich_fields(fields)
    period = fields.size("sliding_window_pattern", 6)
    fields.take("_sliding_window_pattern")  # HF's note to itself, next to layer_types
    is_sliding = [(i + 1) % period != 0 for i in range(gemma["num_layers"])]
    windows = take_windows(fields, take_window(fields), is_sliding)
    rope, local = _take_ropes(fields, gemma["max_position_embeddings"])
    return ModelConfig(
        **gemma,
        qk_norm=True,
        rope=rope,
        sliding_window=windows,
        local_rope=None if windows is None or local == rope else local,
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    ropes = {"full_attention": config.rope, "sliding_attention": config.local_rope or config.rope}
    return {
        **write_sandwich(config),
        "rope_parameters": {
            kind: {"rope_theta": rope.theta, **(rope_scaling(rope) or {"rope_type": "default"})}
            for kind, rope in ropes.items()
        },
    }


FAMILY = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    read=_read,
    write=_write,
    layer=SANDWICH | QK_NORMS,
    defaults=DEFAULTS
    | {
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
    },
)


def _read_multimodal(fields: Fields) -> ModelConfig:
    """The text model's; without images, nothing of the rest reaches it."""
    text = fields.inside("text_config", {**_TEXT_DEFAULTS, **fields.object("text_config")})
    text.require("model_type", FAMILY.model_type)
    config = FAMILY.take(text)
    if fields.flag("tie_word_embeddings", True) != config.tie_embeddings:
        raise fields.error("tie_word_embeddings is another one in text_config: correct either")
    for name in ("vision_config", "mm_tokens_per_image"):
        fields.take(name)
    for place in ("image", "boi", "eoi"):
        fields.take(f"{place}_token_index")
        fields.take(f"{place}_token_id")
    return config


# The published files leave out even these settings.
_TEXT_DEFAULTS = {**FAMILY.defaults, "vocab_size": 262_208, "num_attention_heads": 8}

MULTIMODAL = dataclasses.replace(
    FAMILY,
    model_type="gemma3",
    architecture="Gemma3ForConditionalGeneration",
    read=_read_multimodal,
    defaults={},
    names=(
        Names("language_model.model.", "language_model.lm_head.weight"),
        Names("model.language_model."),  # in the modules of transformers since 4.52
    ),
    ignored_tensors={
        r"(model\.)?(vision_tower|multi_modal_projector)\..+": "images are not supported"
    },
)
