"""The metadata of a GGUF file -> the fields of HF's config.json.

The keys, and what llama.cpp's conversion changes on the way, are those of its convert_hf_to_gguf.py
(2025-12); what it hard-codes instead of storing it (windows and scales of Gemma, layers of SmolLM3
without rotation) is HF's default for the family, or stands here.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from convert.sources.gguf.metadata import Metadata
from s3d_jax.settings.records import is_integer


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A model architecture of llama.cpp.

    Attributes:
        model_type, hf: HF's name of the family, and of its class.
        has_paired_rows: whether llama.cpp rotates neighbouring rows of a query or key head, where
            HF rotates its two halves.
        norm_offset: what the stored scales of norms have more than HF's.
        fields: takes what only this architecture has.
    """

    model_type: str
    hf: str
    has_paired_rows: bool = False
    norm_offset: float = 0.0
    fields: Callable[["_Reader"], dict[str, Any]] = lambda reader: {}


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Takes the settings of one architecture.

    Attributes:
        metadata: the file's.
        prefix: of the architecture's keys.
        vectors: the file's one-dimensional tensors, by the names of llama.cpp.
        sizes: HF's fields that have been read.
    """

    metadata: Metadata
    prefix: str
    vectors: Mapping[str, np.ndarray]
    sizes: dict[str, Any]

    def take(self, key: str, kind: type, default: Any = None) -> Any:
        return self.metadata.typed(f"{self.prefix}.{key}", kind, default)

    def size(self, key: str, default: int | None = None) -> int:
        """A number that may be stored once per layer, if all layers have the same."""
        name = f"{self.prefix}.{key}"
        if (value := self.metadata.take(name, default)) is None:
            raise self.metadata.error(f"has no {name}")
        values = value if isinstance(value, list) else [value]
        for size in values or [value]:
            if not is_integer(size) or size < 0:
                raise self.metadata.error(f"has {name} {size!r:.80}, which is no size")
        if len(set(values)) != 1:
            raise self.metadata.error(f"has layers of different {name}: {sorted(set(values))}")
        return int(values[0])


def hf_fields(
    metadata: Metadata, vectors: Mapping[str, np.ndarray], vocab_size: int, is_tied: bool
) -> tuple[Architecture, dict[str, Any]]:
    """The architecture of a file, and its settings as HF's config.json has them.

    Args:
        metadata: the file's.
        vectors: its one-dimensional float tensors, by the names of llama.cpp.
        vocab_size: rows of its embedding table.
        is_tied: whether it has no output head.

    Raises:
        ConversionError: the architecture is not supported, or a setting is missing or unknown.
    """
    name = metadata.need("general.architecture", str)
    if (architecture := ARCHITECTURES.get(name)) is None:
        known = ", ".join(ARCHITECTURES)
        raise metadata.error(f"is of architecture {name!r:.80}, and supported are {known}")
    reader = _Reader(metadata, name, vectors, {})
    hidden, heads = reader.size("embedding_length"), reader.size("attention.head_count")
    head_dim = reader.size("attention.key_length", hidden // max(1, heads))
    if (value_dim := reader.size("attention.value_length", head_dim)) != head_dim:
        raise metadata.error(f"has keys of {head_dim} numbers and values of {value_dim}")
    fields = {
        "model_type": architecture.model_type,
        "architectures": [architecture.hf],
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": reader.size("feed_forward_length"),
        "num_hidden_layers": reader.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": reader.size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": reader.size("context_length"),
        "rms_norm_eps": metadata.need(f"{name}.attention.layer_norm_rms_epsilon", float),
        "tie_word_embeddings": is_tied,
        **_special_tokens(metadata),
    }
    reader.sizes.update(fields)
    fields |= _rope(reader) | architecture.fields(reader)
    metadata.take(f"{name}.vocab_size")  # the padded one of some files; the table's rows count
    for count in ("expert_count", "expert_used_count"):
        if reader.take(count, int, 0):
            raise metadata.error("is a mixture of experts, which is not supported")
    metadata.finish(f"{name}.")
    return architecture, fields


def _special_tokens(metadata: Metadata) -> dict[str, Any]:
    """HF's ids of special tokens; whatever ends a text or a turn is an end."""
    bos, pad, *ends = (
        metadata.typed(f"tokenizer.ggml.{kind}_token_id", int)
        for kind in ("bos", "padding", "eos", "eot", "eom")
    )
    ids = {"bos_token_id": bos, "pad_token_id": pad}
    found = list(dict.fromkeys(end for end in ends if end is not None))
    return {name: i for name, i in ids.items() if i is not None} | (
        {"eos_token_id": found} if found else {}
    )


def _rope(reader: _Reader) -> dict[str, Any]:
    """The rotary fields; the base of an architecture is HF's default where none is stored."""
    error, head_dim = reader.metadata.error, reader.sizes["head_dim"]
    fields: dict[str, Any] = {}
    if (theta := reader.take("rope.freq_base", float)) is not None:
        fields["rope_theta"] = theta
    if (rotated := reader.size("rope.dimension_count", head_dim)) != head_dim:
        fields["partial_rotary_factor"] = rotated / head_dim
    old_factor = reader.take("rope.scale_linear", float)  # of files from 2023
    kind = reader.take("rope.scaling.type", str, "none" if old_factor is None else "linear")
    factor = reader.take("rope.scaling.factor", float, old_factor)
    original = reader.take("rope.scaling.original_context_length", int)
    attention_factor = reader.take("rope.scaling.attn_factor", float)
    reader.take("rope.scaling.finetuned", bool)
    long, short, factors = (
        reader.vectors.get(f"{name}.weight")
        for name in ("rope_factors_long", "rope_factors_short", "rope_freqs")
    )
    if long is not None and short is not None:
        scaling = {"rope_type": "longrope", "short_factor": short.tolist()}
        scaling["long_factor"] = long.tolist()
        if attention_factor is not None:
            scaling["attention_factor"] = attention_factor
        fields["original_max_position_embeddings"] = (
            original or reader.sizes["max_position_embeddings"]
        )
        return fields | {"rope_scaling": scaling}
    if factors is not None:
        return fields | {"rope_scaling": _llama3_scaling(reader, factors, fields.get("rope_theta"))}
    if attention_factor not in (None, 1.0):
        raise error(f"has rope.scaling.attn_factor {attention_factor} without LongRoPE")
    if kind == "linear":
        return fields | {"rope_scaling": {"rope_type": "linear", "factor": factor}}
    if kind == "yarn":
        scaling = {"rope_type": "yarn", "factor": factor}
        if original is not None:
            scaling["original_max_position_embeddings"] = original
        for name in ("beta_fast", "beta_slow"):
            if (beta := reader.take(f"rope.scaling.yarn_{name}", float)) is not None:
                scaling[name] = beta
        return fields | {"rope_scaling": scaling}
    if kind != "none":
        raise error(f"has rope.scaling.type {kind!r:.80}; supported are none, linear and yarn")
    return fields


# Meta's, which llama.cpp takes where a config leaves them out.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _llama3_scaling(reader: _Reader, factors: np.ndarray, theta: float | None) -> dict[str, Any]:
    """The settings that gave these factors, one for each pair of a head.

    llama.cpp keeps only the factors of Llama 3's rope. The largest is the setting `factor`; the
    other settings are Meta's in all published models.
    """
    if theta is None:
        raise reader.metadata.error("has rope_freqs.weight and no rope.freq_base")
    dims = 2 * len(factors)
    factor = float(factors.max())
    frequencies = theta ** -(np.arange(0, dims, 2) / dims)
    turns = _LLAMA3["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    if not np.allclose(1 / ((1 - smooth) / factor + smooth), factors, rtol=1e-4):
        raise reader.metadata.error(
            "has rope_freqs.weight of unknown settings: convert the HF folder of this model"
        )
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}


def _biases(reader: _Reader) -> dict[str, Any]:
    return {"attention_bias": "blk.0.attn_q.bias" in reader.vectors}


def _both_biases(reader: _Reader) -> dict[str, Any]:
    return {**_biases(reader), "mlp_bias": "blk.0.ffn_down.bias" in reader.vectors}


def _phi3(reader: _Reader) -> dict[str, Any]:
    return {"sliding_window": reader.take("attention.sliding_window", int) or None}


def _qwen(reader: _Reader) -> dict[str, Any]:
    return {"use_sliding_window": False}


def _gemma_caps(reader: _Reader, layers_of_27b: int) -> dict[str, Any]:
    """The largest Gemma scales its scores by the width of a head that its embedding would give."""
    sizes = reader.sizes
    scalar = sizes["head_dim"]
    if sizes["num_hidden_layers"] == layers_of_27b:
        scalar = sizes["hidden_size"] // sizes["num_attention_heads"]
    return {
        "query_pre_attn_scalar": scalar,
        "sliding_window": reader.size("attention.sliding_window"),
        "attn_logit_softcapping": reader.take("attn_logit_softcapping", float),
        "final_logit_softcapping": reader.take("final_logit_softcapping", float),
    }


def _gemma2(reader: _Reader) -> dict[str, Any]:
    return _gemma_caps(reader, layers_of_27b=46)


def _gemma3(reader: _Reader) -> dict[str, Any]:
    return {
        **_gemma_caps(reader, layers_of_27b=62),
        "rope_local_base_freq": reader.take("rope.freq_base_swa", float, 10000.0),
        "sliding_window_pattern": reader.size("attention.sliding_window_pattern", 6),
    }


def _granite(reader: _Reader) -> dict[str, Any]:
    return {
        **_both_biases(reader),
        "embedding_multiplier": reader.take("embedding_scale", float, 1.0),
        "residual_multiplier": reader.take("residual_scale", float, 1.0),
        "attention_multiplier": reader.take("attention.scale", float, 1.0),
        "logits_scaling": reader.take("logit_scale", float, 1.0),
    }


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", True, fields=_both_biases),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", fields=_qwen),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", fields=_qwen),
    "phi3": Architecture("phi3", "Phi3ForCausalLM", fields=_phi3),
    "gemma": Architecture("gemma", "GemmaForCausalLM", norm_offset=1.0),
    "gemma2": Architecture("gemma2", "Gemma2ForCausalLM", norm_offset=1.0, fields=_gemma2),
    "gemma3": Architecture("gemma3_text", "Gemma3ForCausalLM", norm_offset=1.0, fields=_gemma3),
    "olmo2": Architecture("olmo2", "Olmo2ForCausalLM", fields=_biases),
    "granite": Architecture("granite", "GraniteForCausalLM", True, fields=_granite),
    "smollm3": Architecture("smollm3", "SmolLM3ForCausalLM", True, fields=_both_biases),
}
