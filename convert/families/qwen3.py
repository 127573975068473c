"""Qwen 3: a norm over each query and key head, no biases."""

from typing import Any

from convert.families.common import LAYER, QK_NORMS, Family, take_biases, write_biases
from convert.families.fields import Fields
from convert.families.qwen2 import DEFAULTS, read_qwen, write_qwen
from s3d_jax.settings.model import ModelConfig


def _read(fields: Fields) -> ModelConfig:
    return read_qwen(fields, qk_norm=True, **take_biases(fields))


def _write(config: ModelConfig) -> dict[str, Any]:
    return {**write_qwen(config), **write_biases(config)}


FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    read=_read,
    write=_write,
    layer=LAYER | QK_NORMS,
    defaults=DEFAULTS | {"head_dim": 128},
)
