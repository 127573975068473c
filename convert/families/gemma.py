"""Gemma 1: norms whose scales are stored around 0, scaled embeddings, a GELU-gated MLP."""

from collections.abc import Sequence
from typing import Any

from convert.families.common import Family, take_biases, take_sizes, write_biases, write_sizes
from convert.families.fields import Fields
from convert.families.rope import rope_fields, take_rope
from s3d_jax.settings.model import ModelConfig

TANH = "gelu_pytorch_tanh"


def gemma_fields(fields: Fields, activations: Sequence[str] = (TANH,)) -> dict[str, Any]:
    """Takes what all Gemmas have, as arguments of ModelConfig.

    Args:
        fields: the model's.
        activations: HF's names of the family's only activation.
    """
    if fields.flag("use_bidirectional_attention", False):
        raise fields.error("use_bidirectional_attention is true, and only decoders are supported")
    for name in ("hidden_act", "hidden_activation"):  # many files have both
        fields.choice(name, dict.fromkeys(activations, "gelu_tanh"), TANH)
    sizes = take_sizes(fields, activation="gelu_tanh")
    return {
        **sizes,
        **take_biases(fields),
        "norm_offset": 1.0,
        "embedding_scale": sizes["hidden_size"] ** 0.5,
    }


def write_gemma(config: ModelConfig) -> dict[str, Any]:
    """The fields that `gemma_fields` takes."""
    fields = {**write_sizes(config), **write_biases(config)}
    return {**fields, "hidden_activation": fields["hidden_act"]}


def _read(fields: Fields) -> ModelConfig:
    # "gelu" in the first files means the tanh form, with which the weights were trained.
    gemma = gemma_fields(fields, (TANH, "gelu"))
    return ModelConfig(**gemma, rope=take_rope(fields, gemma["max_position_embeddings"]))


def _write(config: ModelConfig) -> dict[str, Any]:
    return {**write_gemma(config), **rope_fields(config)}


DEFAULTS = {
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}

FAMILY = Family(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    read=_read,
    write=_write,
    defaults=DEFAULTS | {"num_key_value_heads": 16},
    renew=lambda fields, config: fields | {"hidden_act": TANH},
)
