"""Mistral 7B and its relatives: Llama with a sliding window in every layer, or (v0.2 on) none."""

from typing import Any

from convert.families.common import (
    Family,
    take_decoder,
    take_window,
    write_decoder,
    write_windows,
)
from convert.families.fields import Fields
from s3d_jax.settings.model import ModelConfig


def _read(fields: Fields) -> ModelConfig:
    decoder, window = take_decoder(fields), take_window(fields)
    return ModelConfig(
        **decoder,
        sliding_window=None if window is None else (window,) * decoder["num_layers"],
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_decoder(config),
        "sliding_window": write_windows(config)["sliding_window"],
    }


FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    read=_read,
    write=_write,
    defaults={
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "sliding_window": 4096,
    },
)
