"""A native checkpoint -> a HF folder."""

import contextlib
import itertools
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from convert.families import FAMILIES, Family, Part, Table, family_for_export, family_of, pieces
from convert.progress import progress_bar
from convert.sources.base import FLOATS
from convert.sources.safetensors import SafetensorsWriter
from s3d_jax.errors import ConfigError
from s3d_jax.jax_settings import under_usual_jax_settings
from s3d_jax.settings.model import ModelConfig
from s3d_jax.storage.json_files import write_json
from s3d_jax.storage.native import Header, read_group, read_header
from s3d_jax.storage.staging import check_apart, staged_folder
from s3d_jax.storage.tokenizer import copy_tokenizer
from s3d_jax.storage.trees import flatten
from s3d_jax.weights.trees import widen_tree

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@under_usual_jax_settings
def export(
    native: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Writes a HF folder (safetensors) from a native checkpoint.

    Float weights are the same bit for bit. The weights of an int8 checkpoint are written in its
    dtype: int8 times scale, which a dtype of 16 bits rounds once more.

    Args:
        native: a native checkpoint folder.
        out: the folder to write.
        max_shard_size: bytes per safetensors file, or a text such as "500MB"; a larger tensor gets
            a file of its own.
        overwrite: replace an existing checkpoint folder, and all that it holds.
        progress: show a bar on a terminal.

    Returns:
        The folder.

    Raises:
        ConfigError: no HF model family can express the model, or `max_shard_size` is no size.
        CheckpointError: `native` is damaged, or `out` exists or cannot be written.
    """
    limit = parse_size(max_shard_size)
    check_apart(out, native)
    header = read_header(native)
    config = header.config.unquantized()  # HF's folder holds float weights
    family, fields = _hf_config(header, config)
    table = family.table(config)
    tensors = {part.name: part.shape for parts in table.values() for part in parts}
    itemsize = FLOATS[header.config.dtype].itemsize
    sizes = {name: math.prod(shape) * itemsize for name, shape in tensors.items()}
    shards = _shards(sizes, limit)
    total = sum(sizes.values())
    with (
        staged_folder(out, overwrite=overwrite, needs=total) as folder,
        progress_bar("exporting", total, progress) as bar,
    ):
        pieces_in_order = _tensors(header, table)
        for file, names in shards.items():
            announced = {name: (header.config.dtype, tensors[name]) for name in names}
            with contextlib.closing(SafetensorsWriter(folder / file, announced)) as writer:
                for part, piece in itertools.islice(pieces_in_order, len(names)):
                    writer.write(part.name, piece)
                    bar.update(piece.nbytes)
        if len(shards) > 1:
            weight_map = {name: file for file, names in shards.items() for name in names}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(folder / "model.safetensors.index.json", index)
        copy_tokenizer(header.path, folder)
        if header.generation_config:
            write_json(folder / "generation_config.json", header.generation_config)
        write_json(folder / "config.json", fields)
    return Path(out)


def _hf_config(header: Header, config: ModelConfig) -> tuple[Family, dict[str, Any]]:
    """The family and config.json: the original one if it still describes the model."""
    original = header.source.get("config")
    if isinstance(original, dict):
        try:
            family = family_of(original)
            ignored = header.source.get("ignored_fields", ())
            same = family.config(original, ignored).replace(dtype=config.dtype) == config
            same &= family.model_type in FAMILIES  # or only the text model is left of it
        except ConfigError:
            same = False
        if same:
            spelling = "torch_dtype" if "torch_dtype" in original else "dtype"
            return family, family.renew(original, config) | {spelling: config.dtype}
    family = family_for_export(config)
    # Null if there are none: HF's own defaults may lie outside this vocabulary.
    special: dict[str, Any] = {
        name: header.generation_config.get(name)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    return family, {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **family.write(config),
        **special,
        "dtype": config.dtype,
    }


def _tensors(header: Header, table: Table) -> Iterator[tuple[Part, np.ndarray]]:
    """All tensors in the order of the table, one group of arrays in memory at a time."""
    group, arrays = "", dict[str, np.ndarray]()
    for path, parts in table.items():
        if (here := path.partition("/")[0]) != group:
            group = here
            arrays.clear()  # before the next one is read
            dtype = FLOATS[header.config.dtype]
            tree = widen_tree(header.config, read_group(header, group), dtype, group)
            arrays.update(flatten(tree, group))
        yield from pieces(parts, arrays[path])


def _shards(sizes: dict[str, int], limit: int) -> dict[str, list[str]]:
    """File names -> tensors, filled in order."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    count = len(groups)
    return {
        f"model-{i:05d}-of-{count:05d}.safetensors": names
        for i, names in enumerate(groups, start=1)
    }


def parse_size(size: int | str) -> int:
    """Bytes of "500MB", "2GiB" or 123.

    Raises:
        ConfigError: it is no size above 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if match and match[2].upper() in _UNITS:
        count = int(float(match[1]) * _UNITS[match[2].upper()])
        if count > 0:
            return count
    raise ConfigError(f"{size!r} is no size: write it like 500MB, 5GB or 2GiB")
