"""Llama 1 to 3.3 and the many models of its shape (TinyLlama, SmolLM 1 and 2, Vicuna, ...)."""

from typing import Any

from convert.families.common import Family, take_biases, take_decoder, write_biases, write_decoder
from convert.families.fields import Fields
from s3d_jax.settings.model import ModelConfig


def _read(fields: Fields) -> ModelConfig:
    if fields.flag("rope_interleaved", False):
        raise fields.error("rope_interleaved is true, and HF's Llama rotates the halves of a head")
    return ModelConfig(**take_decoder(fields), **take_biases(fields, mlp=True))


def _write(config: ModelConfig) -> dict[str, Any]:
    return {**write_decoder(config), **write_biases(config, mlp=True)}


FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    read=_read,
    write=_write,
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "hidden_act": "silu"},
)
