"""Granite 3 (dense): Llama with multipliers on embeddings, scores, residuals and logits."""

from typing import Any

from convert.families.common import Family, take_biases, take_decoder, write_biases, write_decoder
from convert.families.fields import Fields
from s3d_jax.settings.model import ModelConfig


def _read(fields: Fields) -> ModelConfig:
    return ModelConfig(
        **take_decoder(fields),
        **take_biases(fields, mlp=True),
        embedding_scale=fields.number("embedding_multiplier", 1.0),
        attention_scale=fields.number("attention_multiplier", 1.0),
        residual_scale=fields.number("residual_multiplier", 1.0),
        logit_divisor=fields.number("logits_scaling", 1.0),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    return {
        **write_decoder(config),
        **write_biases(config, mlp=True),
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
