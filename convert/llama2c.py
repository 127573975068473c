"""llama2.c's legacy `.bin` format (karpathy/llama2.c, export.py, version 0), under HF's names.

Seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len), then float32
arrays, each stacked over the layers. A negative vocab_size says that the output head is not tied.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from convert.hf import Tensor
from s3d_jax.checkpoint import cast
from s3d_jax.errors import ConversionError

# Of sentencepiece. llama2.c's run.c stops at the first, which stands between its training texts.
SPECIAL_TOKENS = {"bos_token_id": 1, "eos_token_id": [1, 2]}

_HEADER = 7 * 4  # bytes
_MAX_SIZE = 2**31 - 1


class Llama2cSource:
    """Tensors of a llama2.c file.

    llama2.c rotates neighbouring pairs of a head and HF its two halves, so the rows of the query
    and key projections are put in HF's order while reading.

    Args:
        tensors: where each tensor lies.
        rotated: names of the query and key projections, and the heads they have.
    """

    def __init__(self, tensors: dict[str, Tensor], rotated: dict[str, int]) -> None:
        self.tensors = tensors
        self._rotated = rotated

    def read(self, name: str, out: np.ndarray) -> None:
        tensor = self.tensors[name]
        count = math.prod(tensor.shape)
        values = np.fromfile(tensor.file, "<f4", count, offset=tensor.offset)
        if values.size != count:
            raise ConversionError(f"{tensor.file} ended in the middle of {name}: it is truncated")
        values = values.reshape(tensor.shape)
        if name in self._rotated:
            heads, columns = self._rotated[name], tensor.shape[1]
            pairs = values.reshape(heads, -1, 2, columns)
            values = pairs.swapaxes(1, 2).reshape(tensor.shape)
        out[...] = cast(values, out.dtype, name)


def open_file(path: Path) -> tuple[dict[str, Any], Llama2cSource]:
    """The model as HF's config.json would say it, and its tensors.

    Raises:
        ConversionError: the file is of another format, or truncated.
    """
    try:
        size = path.stat().st_size
        header = np.fromfile(path, "<i4", 7)
    except OSError as error:
        raise ConversionError(f"cannot read {path}: {error.strerror}") from error
    if header.size < 7:
        raise ConversionError(f"{path} is truncated: it is no llama2.c file")
    dim, hidden, layers, heads, kv_heads, vocab, length = (int(n) for n in header)
    if header[0] == 0x616B3432:
        raise ConversionError(
            f"{path} is of llama2.c's format version {hidden}; supported is version 0 "
            "(export.py --version 0)"
        )
    tied, vocab = vocab > 0, abs(vocab)
    sizes = (dim, hidden, layers, heads, kv_heads, vocab, length)
    if min(sizes) <= 0 or max(sizes) > _MAX_SIZE or dim % heads or heads % kv_heads:
        raise ConversionError(f"{path} is no llama2.c file: its header says {list(sizes)}")

    head_dim = dim // heads
    kv = kv_heads * head_dim
    stacks = {  # in the order of the file
        "self_attn.q_proj": (dim, dim),
        "self_attn.k_proj": (kv, dim),
        "self_attn.v_proj": (kv, dim),
        "self_attn.o_proj": (dim, dim),
        "post_attention_layernorm": (dim,),
        "mlp.gate_proj": (hidden, dim),
        "mlp.down_proj": (dim, hidden),
        "mlp.up_proj": (hidden, dim),
    }
    rotary_tables = 2 * length * (head_dim // 2)  # real and imaginary; they follow from the sizes
    per_layer = dim + sum(math.prod(shape) for shape in stacks.values())
    numbers = vocab * dim * (1 if tied else 2) + layers * per_layer + dim + rotary_tables
    if _HEADER + 4 * numbers != size:
        raise ConversionError(
            f"{path} is truncated or no llama2.c file: its header describes "
            f"{_HEADER + 4 * numbers} bytes, and the file has {size}"
        )

    tensors: dict[str, Tensor] = {}
    position = _HEADER

    def place(name: str, shape: tuple[int, ...]) -> None:
        nonlocal position
        tensors[f"{name}.weight"] = Tensor("float32", shape, path, position)
        position += 4 * math.prod(shape)

    place("model.embed_tokens", (vocab, dim))
    for name, shape in {"input_layernorm": (dim,), **stacks}.items():
        for i in range(layers):
            place(f"model.layers.{i}.{name}", shape)
    place("model.norm", (dim,))
    position += 4 * rotary_tables
    if not tied:
        place("lm_head", (vocab, dim))

    rotated = {
        f"model.layers.{i}.self_attn.{name}.weight": count
        for i in range(layers)
        for name, count in (("q_proj", heads), ("k_proj", kv_heads))
    }
    fields = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocab,
        "hidden_size": dim,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": length,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        **SPECIAL_TOKENS,
    }
    return fields, Llama2cSource(tensors, rotated)
