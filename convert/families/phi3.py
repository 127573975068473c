"""Phi 3, 3.5 and 4-mini: fused projections; LongRoPE in those of 128k tokens."""

from typing import Any

from convert.families.common import (
    LAYER,
    Family,
    decoder_fields,
    take_window,
    write_decoder,
    write_windows,
)
from convert.families.fields import Fields
from convert.families.rope import rope_fields, take_rope
from s3d_jax.settings.model import ModelConfig

_FUSED = LAYER | {"attention/qkv": ["self_attn.qkv_proj"], "mlp/gate_up": ["mlp.gate_up_proj"]}


def _read(fields: Fields) -> ModelConfig:
    decoder = decoder_fields(fields)
    window = take_window(fields)
    for bias in ("attention_bias", "mlp_bias", "lm_head_bias"):
        fields.require(bias, False)
    for stretch in ("full_attn_mod", "interpolate_factor"):
        fields.require(stretch, 1)
    rope = take_rope(
        fields,
        decoder["max_position_embeddings"],
        types=("default", "longrope"),
        aliases={"su": "longrope", "yarn": "longrope"},  # names that it had before
        partial=True,
    )
    return ModelConfig(
        **decoder,
        rope=rope,
        sliding_window=None if window is None else (window,) * decoder["num_layers"],
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_decoder(config),
        **rope_fields(config),
        "sliding_window": write_windows(config)["sliding_window"],
    }


def _renew(fields: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Files of LongRoPE call it "su", or lack its `factor`."""
    if config.rope.type != "longrope":
        return fields
    return {k: v for k, v in fields.items() if k != "rope_parameters"} | rope_fields(config)


FAMILY = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    read=_read,
    write=_write,
    layer=_FUSED,
    defaults={
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
    },
    renew=_renew,
)
