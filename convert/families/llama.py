"""Llama 1 to 3.3 and the many models of its shape (TinyLlama, SmolLM 1 and 2, Vicuna, ...)."""

from typing import Any

from convert.families.common import Family, decoder_fields, write_decoder
from convert.families.fields import Fields
from convert.families.rope import rope_fields, take_rope
from s3d_jax.settings.model import ModelConfig


def _read(fields: Fields) -> ModelConfig:
    decoder = decoder_fields(fields)
    attention_bias = fields.flag("attention_bias", False)
    if fields.flag("rope_interleaved", False):
        raise fields.error("rope_interleaved is true, and HF's Llama rotates the halves of a head")
    return ModelConfig(
        **decoder,
        rope=take_rope(fields, decoder["max_position_embeddings"]),
        qkv_bias=attention_bias,
        attention_out_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias", False),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_decoder(config),
        **rope_fields(config),
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
    }


FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    read=_read,
    write=_write,
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "hidden_act": "silu"},
)
