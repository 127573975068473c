"""Qwen 2 and 2.5: Llama with biases on queries, keys and values."""

from typing import Any

from convert.families.common import (
    Family,
    take_decoder,
    take_window,
    take_windows,
    write_decoder,
    write_windows,
)
from convert.families.fields import Fields
from s3d_jax.settings.model import ModelConfig


def read_qwen(fields: Fields, **own: Any) -> ModelConfig:
    """Reads what Qwen 2 and 3 have in common: windows, which are off by default."""
    decoder = take_decoder(fields)
    window, first = take_window(fields), fields.size("max_window_layers", least=0)
    if not fields.flag("use_sliding_window", False):
        window = None
    layers = range(decoder["num_layers"])
    return ModelConfig(
        **decoder,
        sliding_window=take_windows(fields, window, [i >= first for i in layers]),
        **own,
    )


def write_qwen(config: ModelConfig) -> dict[str, Any]:
    """The fields that `read_qwen` reads."""
    windows = write_windows(config)
    return {
        **write_decoder(config),
        **windows,
        "use_sliding_window": windows["sliding_window"] is not None,
    }


def _read(fields: Fields) -> ModelConfig:
    return read_qwen(fields, qkv_bias=True)


DEFAULTS = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "sliding_window": 4096,
    "max_window_layers": 28,
}

FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    read=_read,
    write=write_qwen,
    defaults=DEFAULTS,
)
