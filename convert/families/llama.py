"""Llama 1 to 3.3 and the many models of its shape (TinyLlama, SmolLM, Vicuna, ...)."""

from typing import Any

from convert.families.common import Family, Fields, Table, decoder_table, rope_fields, take_rope
from s3d_jax.config import ModelConfig

_LAYER = {
    "attention_norm": ["input_layernorm"],
    "attention/qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention/out": ["self_attn.o_proj"],
    "mlp_norm": ["post_attention_layernorm"],
    "mlp/gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp/down": ["mlp.down_proj"],
}
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


def _read(fields: Fields) -> ModelConfig:
    hidden_size, num_heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    head_dim = fields.take("head_dim")
    if head_dim is None:
        if hidden_size % num_heads:
            raise fields.error(
                f"hidden_size {hidden_size} is no multiple of num_attention_heads {num_heads}, and "
                "there is no head_dim"
            )
        head_dim = hidden_size // num_heads
    max_position_embeddings = fields.size("max_position_embeddings", 2048)
    attention_bias = fields.flag("attention_bias", False)
    if fields.flag("rope_interleaved", False):
        raise fields.error("rope_interleaved is true, and HF's Llama rotates the halves of a head")
    rope = take_rope(fields, max_position_embeddings)
    if rope.rotary_fraction != 1:
        raise fields.error("partial_rotary_factor is not 1, and Llama rotates whole heads")
    return ModelConfig(
        vocab_size=fields.size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.size("intermediate_size"),
        num_layers=fields.layers("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=fields.size("num_key_value_heads", num_heads),
        head_dim=head_dim,
        max_position_embeddings=max_position_embeddings,
        rope=rope,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        activation=fields.choice("hidden_act", _ACTIVATIONS, "silu"),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        qkv_bias=attention_bias,
        attention_out_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias", False),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    activations = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        **rope_fields(config.rope),
        "rms_norm_eps": config.norm_eps,
        "hidden_act": activations[config.activation],
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
    }


def _table(config: ModelConfig) -> Table:
    return decoder_table(config, _LAYER)


FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    read=_read,
    write=_write,
    table=_table,
    # Rotary tables, which old versions saved; they follow from the config.
    ignored_tensors=(
        r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
        r"model\.rotary_emb\.inv_freq",
    ),
)
