"""SmolLM 3: Llama that rotates nothing in every fourth layer (NoPE)."""

from typing import Any

from convert.families.common import (
    Family,
    take_biases,
    take_decoder,
    take_window,
    take_windows,
    write_biases,
    write_decoder,
    write_windows,
)
from convert.families.fields import Fields
from s3d_jax.settings.model import ModelConfig

_THETA = 2e6


def _take_rope_layers(fields: Fields, num_layers: int) -> tuple[bool, ...]:
    period = fields.size("no_rope_layer_interval", 4)
    usual = [int((i + 1) % period != 0) for i in range(num_layers)]
    rotated = fields.take("no_rope_layers", usual)  # despite the name, 1 is a layer with rotation
    if not isinstance(rotated, list) or any(entry not in (0, 1) for entry in rotated):
        raise fields.error(f"no_rope_layers must list 0 or 1, got {rotated!r:.80}")
    if len(rotated) != num_layers:
        raise fields.error(f"no_rope_layers has {len(rotated)} entries, the model {num_layers}")
    return tuple(map(bool, rotated))


def _read(fields: Fields) -> ModelConfig:
    decoder = take_decoder(fields, theta=_THETA)
    rotated = _take_rope_layers(fields, decoder["num_layers"])
    window = take_window(fields)
    if not fields.flag("use_sliding_window", False):
        window = None
    fields.take("max_window_layers")  # Qwen's; HF's code does not use it here
    return ModelConfig(
        **decoder,
        rope_layers=None if all(rotated) else rotated,
        sliding_window=take_windows(fields, window, [not rotates for rotates in rotated]),
        **take_biases(fields, mlp=True),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    windows = write_windows(config)
    return {
        **write_decoder(config),
        **windows,
        "use_sliding_window": windows["sliding_window"] is not None,
        "no_rope_layers": [int(rotates) for rotates in config.rope_layers or ()]
        or [1] * config.num_layers,
        **write_biases(config, mlp=True),
    }


FAMILY = Family(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    read=_read,
    write=_write,
    defaults={
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    },
)
