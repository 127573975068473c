"""llama2.c's legacy `.bin` format (karpathy/llama2.c, export.py, version 0), under HF's names.

Seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len), then float32
arrays, each stacked over the layers. A negative vocab_size means that the output head is not tied.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convert.sources.base import FLOATS, StoredTensor, cast_into, reading
from s3d_jax.errors import ConversionError
from s3d_jax.settings.model import MAX_LAYERS, MAX_SIZE

# Ids of sentencepiece. llama2.c's run.c stops at the first, which separates its training texts.
SPECIAL_TOKENS = {"bos_token_id": 1, "eos_token_id": [1, 2]}

_HEADER = 7 * 4  # bytes


class _Sizes(NamedTuple):
    """The header of a file; `length` is the longest sequence, in tokens."""

    dim: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    length: int
    tied: bool


class Llama2cSource:
    """Tensors of a llama2.c file.

    llama2.c rotates neighbouring pairs of a head, and HF rotates its two halves. So the rows of the
    query and key projections are put in HF's order while reading.

    Args:
        tensors: where each tensor lies.
        rotated: names of the query and key projections, and the number of their heads.
    """

    def __init__(self, tensors: dict[str, StoredTensor], rotated: dict[str, int]) -> None:
        self.tensors = tensors
        self.faults: dict[str, str] = {}
        self._rotated = rotated

    def read(self, name: str, out: np.ndarray, first_row: int = 0) -> None:
        tensor = self.tensors[name]
        count = math.prod(tensor.shape)
        with reading(tensor.file):
            values = np.fromfile(tensor.file, "<f4", count, offset=tensor.offset)
        if values.size != count:
            raise ConversionError(f"{tensor.file} ended in the middle of {name}: it is truncated")
        values = values.reshape(tensor.shape)
        if name in self._rotated:
            heads, columns = self._rotated[name], tensor.shape[1]
            pairs = values.reshape(heads, -1, 2, columns)
            values = pairs.swapaxes(1, 2).reshape(tensor.shape)
        cast_into(out, values[first_row : first_row + len(out)], name)


def open_file(path: Path) -> tuple[dict[str, Any], Llama2cSource]:
    """The model in the fields of HF's config.json, and its tensors.

    Raises:
        ConversionError: the file is of another format, or truncated.
    """
    sizes, file_size = _read_header(path)
    tensors, end = _place_tensors(path, sizes)
    if end != file_size:
        raise ConversionError(
            f"{path} is truncated or no llama2.c file: its header describes {end} bytes, and the "
            f"file has {file_size}"
        )
    rotated = {
        f"model.layers.{i}.self_attn.{name}.weight": count
        for i in range(sizes.layers)
        for name, count in (("q_proj", sizes.heads), ("k_proj", sizes.kv_heads))
    }
    fields = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.dim,
        "intermediate_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "max_position_embeddings": sizes.length,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": sizes.tied,
        **SPECIAL_TOKENS,
    }
    return fields, Llama2cSource(tensors, rotated)


def _read_header(path: Path) -> tuple[_Sizes, int]:
    """Reads the header; returns it and the size of the file in bytes."""
    with reading(path):
        file_size = path.stat().st_size
        header = np.fromfile(path, "<i4", 7)
    if header.size < 7:
        raise ConversionError(f"{path} is truncated: it is no llama2.c file")
    dim, hidden, layers, heads, kv_heads, vocab, length = numbers = [int(n) for n in header]
    if dim == 0x616B3432:
        raise ConversionError(
            f"{path} is of llama2.c's format version {hidden}; supported is version 0 "
            "(export.py --version 0)"
        )
    tied, vocab = vocab > 0, abs(vocab)
    sizes = (dim, hidden, layers, heads, kv_heads, vocab, length)
    possible = min(sizes) > 0 and max(sizes) <= MAX_SIZE and layers <= MAX_LAYERS
    if not possible or dim % heads or heads % kv_heads:
        raise ConversionError(f"{path} is no llama2.c file: its header says {numbers}")
    return _Sizes(*sizes, tied), file_size


def _place_tensors(path: Path, sizes: _Sizes) -> tuple[dict[str, StoredTensor], int]:
    """Where each tensor lies, and where the file should end."""
    dim, hidden, layers = sizes.dim, sizes.hidden, sizes.layers
    head_dim = dim // sizes.heads
    kv = sizes.kv_heads * head_dim
    stacks = {  # in the order of the file; each is stacked over the layers
        "input_layernorm": (dim,),
        "self_attn.q_proj": (dim, dim),
        "self_attn.k_proj": (kv, dim),
        "self_attn.v_proj": (kv, dim),
        "self_attn.o_proj": (dim, dim),
        "post_attention_layernorm": (dim,),
        "mlp.gate_proj": (hidden, dim),
        "mlp.down_proj": (dim, hidden),
        "mlp.up_proj": (hidden, dim),
    }
    tensors: dict[str, StoredTensor] = {}
    position = _HEADER

    def place(name: str, shape: tuple[int, ...]) -> None:
        nonlocal position
        dtype, size = "float32", 4 * math.prod(shape)
        tensors[f"{name}.weight"] = StoredTensor(dtype, shape, path, size, FLOATS[dtype], position)
        position += size

    place("model.embed_tokens", (sizes.vocab, dim))
    for name, shape in stacks.items():
        for i in range(layers):
            place(f"model.layers.{i}.{name}", shape)
    place("model.norm", (dim,))
    # Skips the rotary tables, real and imaginary: they follow from the sizes.
    position += 4 * 2 * sizes.length * (head_dim // 2)
    if not sizes.tied:
        place("lm_head", (sizes.vocab, dim))
    return tensors, position
