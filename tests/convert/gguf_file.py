"""Writes GGUF files of HF models by the rules of llama.cpp's convert_hf_to_gguf.py (2025-12)."""

import itertools
from pathlib import Path
from typing import Any

import gguf
import numpy as np

# Families whose query and key rows llama.cpp stores in pairs, and those whose norms it adds 1 to.
PAIRED = ("llama", "granite", "smollm3")
SHIFTED = ("gemma", "gemma2", "gemma3")
# Places in a block of the 16-bit floats that scale it; the other bytes may be anything.
_SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
_SCALES |= {"IQ4_NL": (0,)}
UNREADABLE = ("IQ2_XXS", "TQ1_0", "Q8_K")  # some types that are not converted
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


def llama(**changes: Any) -> Any:
    """A random model of HF transformers; always the same one."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        **dict(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
        | dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
        | changes
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def write_gguf(
    path: Path,
    architecture: str,
    model: Any,
    kind: str | list[str] = "F32",
    *,
    tokenizer: dict[str, Any] | None = None,
    changes: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
) -> None:
    """Writes a model, and gives the HF model the weights that the file stands for.

    Args:
        path: the file.
        architecture: llama.cpp's name.
        model: of HF transformers, in float32.
        kind: the type of all matrices; or one for each in turn. Types that the gguf package cannot
            make of numbers get random blocks.
        tokenizer: keys behind "tokenizer.", and their values.
        changes: other keys behind the architecture's name; None removes one.
        extra: more tensors.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    keys = _keys(architecture, config) | (changes or {})
    for key, value in keys.items():
        if value is not None:
            _add(writer, f"{architecture}.{key}", value)
    for key, value in (tokenizer or {}).items():
        _add(writer, f"tokenizer.{key}", value)
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], config.num_hidden_layers)
    state = dict(model.state_dict())
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    turns = itertools.cycle([kind] if isinstance(kind, str) else kind)
    for hf_name, tensor in state.items():
        name = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        values, heads = tensor.numpy().copy(), _paired_heads(architecture, hf_name, config)
        if heads:
            values = _paired(values, heads)
        if architecture in SHIFTED and hf_name.endswith("norm.weight"):
            values = values + 1
        own_kind = gguf.GGMLQuantizationType[next(turns) if values.ndim == 2 else "F32"]
        try:
            stored = gguf.quantize(values, own_kind)
        except NotImplementedError:
            stored = random_blocks(own_kind, values.shape)
        writer.add_tensor(name, stored, raw_dtype=own_kind)
        if values.ndim == 2 and own_kind.name not in UNREADABLE:
            whole = gguf.dequantize(stored, own_kind)
            tensor.copy_(tensor.new_tensor(_halves(whole, heads) if heads else whole))
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_blocks(kind: gguf.GGMLQuantizationType, shape: tuple[int, ...]) -> np.ndarray:
    """Valid blocks of random content for a tensor of that shape."""
    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(kind.value)
    blocks = rng.integers(0, 256, (shape[0], shape[1] // numbers, size), np.uint8)
    for place in _SCALES.get(kind.name, ()):
        scales = rng.normal(0, 0.01, blocks.shape[:2]).astype(np.float16)
        blocks[..., place : place + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(shape[0], -1)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    add |= {str: writer.add_string, list: writer.add_array}
    add[type(value)](key, value)


def _keys(architecture: str, config: Any) -> dict[str, Any]:
    """The settings that llama.cpp stores, without the architecture's name."""
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    rope = config.rope_parameters
    if "full_attention" in rope:
        rope = rope["full_attention"]
    keys = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "vocab_size": config.vocab_size,
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1.0)),
    }
    if rope["rope_type"] in ("linear", "yarn"):
        keys["rope.scaling.type"] = rope["rope_type"]
        keys["rope.scaling.factor"] = rope["factor"]
        if rope["rope_type"] == "yarn":
            original = rope["original_max_position_embeddings"]
            keys["rope.scaling.original_context_length"] = original
    if rope["rope_type"] == "longrope":
        original = rope["original_max_position_embeddings"]
        stretch = config.max_position_embeddings / original
        keys["rope.scaling.original_context_length"] = original
        keys["rope.scaling.attn_factor"] = float(np.sqrt(1 + np.log(stretch) / np.log(original)))
    if architecture in ("gemma2", "gemma3", "phi3") and config.sliding_window:
        keys["attention.sliding_window"] = config.sliding_window
    if architecture == "gemma2":
        keys["attn_logit_softcapping"] = config.attn_logit_softcapping
        keys["final_logit_softcapping"] = config.final_logit_softcapping
    if architecture == "granite":
        keys["attention.scale"] = config.attention_multiplier
        keys["embedding_scale"] = config.embedding_multiplier
        keys["residual_scale"] = config.residual_multiplier
        keys["logit_scale"] = config.logits_scaling
    return keys


def _paired_heads(architecture: str, hf_name: str, config: Any) -> int:
    """The heads of a projection whose rows are stored in pairs; 0 for any other tensor."""
    if architecture not in PAIRED:
        return 0
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return heads.get(hf_name.split(".")[-2], 0)


def _paired(rows: np.ndarray, heads: int) -> np.ndarray:
    """HF's two halves of a head -> neighbours."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _halves(rows: np.ndarray, heads: int) -> np.ndarray:
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
