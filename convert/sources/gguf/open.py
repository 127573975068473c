"""Opens a GGUF file: the model in HF's fields, its tensors, and its tokenizer."""

from collections import Counter
from pathlib import Path
from typing import Any

from convert.families import family_of
from convert.sources.base import FLOATS
from convert.sources.gguf.config import Architecture, hf_fields
from convert.sources.gguf.metadata import Metadata, damage_named, open_reader
from convert.sources.gguf.tensors import GgufSource, stored_dtype
from convert.sources.gguf.tokenizer import GgufTokenizer

_ROPE = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def open_gguf(
    path: Path, *, with_tokenizer: bool
) -> tuple[dict[str, Any], GgufSource, GgufTokenizer | None]:
    """Opens a file; reads no weights.

    Args:
        path: the file.
        with_tokenizer: whether its tokenizer is wanted.

    Returns:
        The fields of HF's config.json; the tensors; and the tokenizer, or None.

    Raises:
        ConversionError: the file is damaged, of a kind that is not supported, or one part of
            several.
        ConfigError: its settings are wrong.
    """
    reader = open_reader(path)
    metadata = Metadata.of(path, reader)
    if metadata.typed("general.type", str) == "adapter":
        raise metadata.error(
            "is an adapter (LoRA), no model: merge it into its model first "
            "(llama-export-lora, or model.merge_and_unload() in peft), and convert the result"
        )
    if (parts := metadata.typed("split.count", int, 0)) > 1:
        raise metadata.error(
            f"is one of {parts} parts: join them first (llama-gguf-split --merge), and convert the "
            "whole file"
        )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if (table := tensors.get("token_embd.weight")) is None:
        raise metadata.error("has no token_embd.weight: it is no language model")
    with damage_named(path):
        vectors = {name: tensor.data for name, tensor in tensors.items() if len(tensor.shape) == 1}
    architecture, fields = hf_fields(
        metadata, vectors, int(table.shape[1]), "output.weight" not in tensors
    )
    fields["torch_dtype"] = _usual_dtype(tensors.values())
    source = _source(path, tensors, architecture, fields, metadata)
    return fields, source, GgufTokenizer.of(metadata) if with_tokenizer else None


def _usual_dtype(tensors: Any) -> str:
    """The float type that most numbers are stored in; float32 holds what blocks stand for."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[stored_dtype(tensor)] += int(tensor.n_elements)
    usual = sizes.most_common(1)[0][0]
    return usual if usual in FLOATS else "float32"


def _source(
    path: Path,
    tensors: dict[str, Any],
    architecture: Architecture,
    fields: dict[str, Any],
    metadata: Metadata,
) -> GgufSource:
    """The tensors under the names that HF's table of the family asks for."""
    import gguf

    family = family_of(fields)
    config = family.config(fields)  # checks the number of layers, for each of which there are names
    name = metadata.need("general.architecture", str)
    kinds = {value: kind for kind, value in gguf.MODEL_ARCH_NAMES.items()}
    if name not in kinds:
        raise metadata.error(f"is of architecture {name!r}: pip install --upgrade gguf")
    names = gguf.get_tensor_name_map(kinds[name], config.num_layers)
    wanted = [part.name for parts in family.table(config).values() for part in parts]
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    left = {name: tensor for name, tensor in tensors.items() if name not in _ROPE}
    found, num_heads = {}, {}
    for hf_name in wanted:
        own = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        if own in left:
            found[hf_name] = left.pop(own)
            projection = hf_name.split(".")[-2]
            if architecture.has_paired_rows and projection in heads:
                num_heads[hf_name] = heads[projection]
    return GgufSource(path, found | left, num_heads, architecture)
