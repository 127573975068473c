"""OLMo 2: norms after attention and MLP only, and over all query and key heads together."""

from typing import Any

from convert.families.common import (
    LAYER,
    QK_NORMS,
    Family,
    take_biases,
    take_decoder,
    write_biases,
    write_decoder,
)
from convert.families.fields import Fields
from s3d_jax.settings.model import ModelConfig

_LINEAR = ("attention/qkv", "attention/out", "mlp/gate_up", "mlp/down")
_LAYER = {
    **{module: LAYER[module] for module in _LINEAR},
    **QK_NORMS,
    "post_attention_norm": ["post_attention_layernorm"],
    "post_mlp_norm": ["post_feedforward_layernorm"],
}


def _read(fields: Fields) -> ModelConfig:
    return ModelConfig(
        **take_decoder(fields),
        **take_biases(fields),
        qk_norm=True,
        qk_norm_joint=True,
        pre_norms=False,
        post_norms=True,
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    return {**write_decoder(config), **write_biases(config)}


FAMILY = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    read=_read,
    write=_write,
    layer=_LAYER,
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "hidden_act": "silu"},
)
