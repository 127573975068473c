"""Phi 3, 3.5 and 4-mini: fused projections; LongRoPE in models of 128k tokens."""

from typing import Any

from convert.families.common import (
    LAYER,
    Family,
    take_decoder,
    take_window,
    write_decoder,
    write_windows,
)
from convert.families.fields import Fields
from convert.families.rope import rope_fields
from s3d_jax.settings.model import ModelConfig

_FUSED = LAYER | {"attention/qkv": ["self_attn.qkv_proj"], "mlp/gate_up": ["mlp.gate_up_proj"]}


def _read(fields: Fields) -> ModelConfig:
    for bias in ("attention_bias", "mlp_bias", "lm_head_bias"):
        fields.require(bias, False)
    for stretch in ("full_attn_mod", "interpolate_factor"):
        fields.require(stretch, 1)
    decoder = take_decoder(
        fields,
        types=("default", "longrope"),
        aliases={"su": "longrope", "yarn": "longrope"},  # its earlier names
        partial=True,
    )
    window = take_window(fields)
    return ModelConfig(
        **decoder,
        sliding_window=None if window is None else (window,) * decoder["num_layers"],
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_decoder(config),
        "sliding_window": write_windows(config)["sliding_window"],
    }


def _renew(fields: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Renames "su" to LongRoPE, and adds the `factor` that old files lack."""
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
