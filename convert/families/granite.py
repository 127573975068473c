"""Granite 3 (dense): Llama with multipliers on embeddings, scores, residuals and logits."""

from typing import Any

from convert.families.common import Family, decoder_fields, write_decoder
from convert.families.fields import Fields
from convert.families.rope import rope_fields, take_rope
from s3d_jax.settings.model import ModelConfig


def _read(fields: Fields) -> ModelConfig:
    decoder = decoder_fields(fields)
    bias = fields.flag("attention_bias", False)
    return ModelConfig(
        **decoder,
        rope=take_rope(fields, decoder["max_position_embeddings"]),
        qkv_bias=bias,
        attention_out_bias=bias,
        mlp_bias=fields.flag("mlp_bias", False),
        embedding_scale=fields.number("embedding_multiplier", 1.0),
        attention_scale=fields.number("attention_multiplier", 1.0),
        residual_scale=fields.number("residual_multiplier", 1.0),
        logit_divisor=fields.number("logits_scaling", 1.0),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    return {
        **write_decoder(config),
        **rope_fields(config),
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "embedding_multiplier": config.embedding_scale,
        "attention_multiplier": scale,
        "residual_multiplier": config.residual_scale,
        "logits_scaling": config.logit_divisor,
    }


FAMILY = Family(
    model_type="granite",
    architecture="GraniteForCausalLM",
    read=_read,
    write=_write,
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "hidden_act": "silu"},
)
