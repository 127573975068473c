"""Gemma 2: norms before and after, soft caps, local and global layers in turn."""

from typing import Any

from convert.families.common import LAYER, Family, take_window, take_windows, write_windows
from convert.families.fields import Fields
from convert.families.gemma import DEFAULTS, gemma_fields, write_gemma
from convert.families.rope import rope_fields, take_rope
from s3d_jax.settings.model import ModelConfig

SANDWICH = LAYER | {
    "post_attention_norm": ["post_attention_layernorm"],
    "mlp_norm": ["pre_feedforward_layernorm"],
    "post_mlp_norm": ["post_feedforward_layernorm"],
}


def sandwich_fields(fields: Fields) -> dict[str, Any]:
    """Takes what Gemma 2 and 3 share beyond Gemma 1, as arguments of ModelConfig."""
    return gemma_fields(fields) | {
        "post_norms": True,
        "attention_scale": fields.number("query_pre_attn_scalar") ** -0.5,
        "attention_softcap": fields.optional_number("attn_logit_softcapping"),
        "logit_softcap": fields.optional_number("final_logit_softcapping"),
    }


def write_sandwich(config: ModelConfig) -> dict[str, Any]:
    """The fields that `sandwich_fields` takes, and the windows."""
    scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    return {
        **write_gemma(config),
        **write_windows(config),
        "query_pre_attn_scalar": round(scale**-2),
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
    }


def _read(fields: Fields) -> ModelConfig:
    gemma = sandwich_fields(fields)
    is_sliding = [i % 2 == 0 for i in range(gemma["num_layers"])]
    return ModelConfig(
        **gemma,
        rope=take_rope(fields, gemma["max_position_embeddings"]),
        sliding_window=take_windows(fields, take_window(fields), is_sliding),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    return {**write_sandwich(config), **rope_fields(config)}


FAMILY = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    read=_read,
    write=_write,
    layer=SANDWICH,
    defaults=DEFAULTS
    | {
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
)
