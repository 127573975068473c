"""Small HF folders, written without torch."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from convert.families import family_of
from convert.sources.safetensors import SafetensorsWriter

FIELDS: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}


def random_tensors(fields: dict[str, Any] = FIELDS, dtype: Any = np.float32) -> dict[str, Any]:
    """Every tensor that a model with these settings has, under its HF name."""
    family = family_of(fields)
    rng = np.random.default_rng(0)
    parts = [part for row in family.table(family.config(fields)).values() for part in row]
    return {part.name: rng.normal(0, 0.3, part.shape).astype(dtype) for part in parts}


def write_folder(
    folder: Path,
    tensors: dict[str, Any] | None = None,
    fields: dict[str, Any] = FIELDS,
    shards: int = 1,
) -> Path:
    """A HF folder; with more than one shard, an index too."""
    tensors = random_tensors(fields) if tensors is None else tensors
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        names = list(tensors)[i::shards]
        save_file({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_large_folder(folder: Path, num_layers: int, shards: int) -> int:
    """A float32 folder of 50 MB per layer (and two tables of 66 MB); returns bytes of weights."""
    sizes = dict(vocab_size=16_000, hidden_size=1024, intermediate_size=2816)
    heads = dict(num_attention_heads=16, num_key_value_heads=16, head_dim=64)
    fields = FIELDS | sizes | heads | {"num_hidden_layers": num_layers}
    family = family_of(fields)
    parts = [p for row in family.table(family.config(fields)).values() for p in row]
    block = np.random.default_rng(0).normal(0, 0.02, 1 << 20).astype(np.float32)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(fields))
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        mine = parts[i * len(parts) // shards : (i + 1) * len(parts) // shards]
        writer = SafetensorsWriter(folder / file, {p.name: ("float32", p.shape) for p in mine})
        for part in mine:
            writer.write(part.name, np.resize(block, part.shape))
        writer.close()
        weight_map |= {p.name: file for p in mine}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(4 * math.prod(p.shape) for p in parts)
