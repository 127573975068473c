"""The trained drafts of a checkpoint: one target may carry several, under names of their own.

drafts/<name>/config.json    {"format": "s3d_jax draft", "version": 1, "draft": {...},
                             "training": {...}, "arrays": {path: shape and CRC-32}}
drafts/<name>/weights/       an orbax checkpoint: mask_embeddings, deltas, bridges
"""

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from s3d_jax.errors import CheckpointError, ConfigError
from s3d_jax.nn.transformer import DraftParams, Params
from s3d_jax.settings.drafting import DraftConfig
from s3d_jax.settings.model import ModelConfig
from s3d_jax.storage.arrays import ArrayWriter, cast, index_from_json, index_to_json, read_array
from s3d_jax.storage.json_files import read_json_object, write_json
from s3d_jax.storage.native import read_header
from s3d_jax.storage.staging import staged_folder
from s3d_jax.storage.trees import flatten, unflatten
from s3d_jax.weights import int8

FORMAT, VERSION = "s3d_jax draft", 1
DEFAULT = "default"  # the name of the draft that is used where none is asked for
_AGAIN = "train it again, or restore it from a copy"


@dataclasses.dataclass(frozen=True)
class Draft:
    """A draft as it is stored.

    Attributes:
        name: its name in the checkpoint.
        config: skip, γ, block attention.
        params: its arrays, in the target's type; None where only the settings were read.
        training: how it was made, and what it reached (free form, JSON).
        num_params: parameters it has beside the target's.
    """

    name: str
    config: DraftConfig
    params: DraftParams | None
    training: dict[str, Any]
    num_params: int


def save_draft(
    model: str | os.PathLike[str],
    name: str,
    config: DraftConfig,
    params: DraftParams,
    training: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> Path:
    """Adds a draft to a checkpoint; it appears whole or not at all.

    Args:
        model: the native checkpoint folder.
        name: letters, digits, ".", "-" and "_".
        config: skip, γ, block attention.
        params: arrays of any float type; stored in the target's.
        training: how it was made (JSON).
        overwrite: replace a draft of that name.

    Returns:
        The draft's folder.

    Raises:
        CheckpointError: no such checkpoint, a name that cannot be one, a draft of that name, or
            one whose deltas are merged into its layers.
    """
    check_name(name)
    header = read_header(model)
    config.validate_for(header.config)
    folder = header.path / "drafts" / name
    with staged_folder(folder, overwrite=overwrite) as partial:
        write_draft(partial, header.config, config, params, training)
    return folder


def write_draft(
    folder: Path,
    model: ModelConfig,
    config: DraftConfig,
    params: DraftParams,
    training: Mapping[str, Any],
) -> None:
    """Writes the files of a draft into a folder that is being staged.

    Args:
        folder: drafts/<name> of a checkpoint, or where that is being put together.
        model: the target's settings.
        config, params, training: as in `save_draft`.

    Raises:
        CheckpointError: the deltas are merged into the layers, which cannot be stored.
    """
    if params.layers:
        raise CheckpointError(
            "the draft's deltas are merged into its layers, as load does for small models, and "
            "cannot be stored: save the draft that drafts.read_draft gives"
        )
    dtype = jnp.dtype(model.dtype)
    writer = ArrayWriter(folder / "weights")
    for path, x in flatten(_tree(params)).items():
        writer.add({path: cast(np.asarray(x), dtype, path)})
    writer.finish()
    fields = {
        "format": FORMAT,
        "version": VERSION,
        "draft": config.to_dict(),
        "training": dict(training),
        "arrays": index_to_json(writer.index),
    }
    write_json(folder / "config.json", fields)


def draft_names(model: str | os.PathLike[str]) -> tuple[str, ...]:
    """The names of a checkpoint's drafts, sorted."""
    folder = Path(model) / "drafts"
    return tuple(sorted(p.parent.name for p in folder.glob("*/config.json") if _is_name(p.parent)))


def choose_draft(model: str | os.PathLike[str], name: str | None) -> str | None:
    """The draft to use: `name`; without one the default, or the only one there is.

    Returns:
        Its name, or None where the checkpoint has no draft.

    Raises:
        CheckpointError: there is none of that name; or several, and none is the default.
    """
    names = draft_names(model)
    if name is not None and name not in names:
        known = f"it has {', '.join(names)}" if names else "it has no trained draft"
        raise CheckpointError(f"{model} has no draft {name!r}: {known}")
    if name is not None or not names:
        return name
    if DEFAULT in names:
        return DEFAULT
    if len(names) > 1:
        raise CheckpointError(
            f"{model} has the drafts {', '.join(names)}, and none is called {DEFAULT!r}: say which "
            "one (--draft NAME, draft=...)"
        )
    return names[0]


def read_draft(
    model: str | os.PathLike[str], name: str, config: ModelConfig, *, weights: bool = True
) -> Draft:
    """Reads one draft.

    Args:
        model: the native checkpoint folder.
        name: the draft's name.
        config: the target's; arrays are cast to its dtype.
        weights: False reads the settings alone.

    Raises:
        CheckpointError: it is missing, damaged, of another version, or does not fit the target.
    """
    folder = Path(model) / "drafts" / name
    fields = read_json_object(folder / "config.json")
    if (fields.get("format"), fields.get("version")) != (FORMAT, VERSION):
        raise CheckpointError(
            f"{folder} is no draft of format version {VERSION}: train it again, or update s3d_jax"
        )
    try:
        draft = DraftConfig.from_dict(fields["draft"])
        draft.validate_for(config)
        index = index_from_json(fields["arrays"])
    except (ConfigError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'} is damaged: {error}") from error
    count = sum(math.prod(record.shape) for record in index.values())
    params = None
    if weights:
        dtype = jnp.dtype(config.dtype)
        arrays = {
            path: cast(read_array(folder / "weights", path, record, advice=_AGAIN), dtype, path)
            for path, record in index.items()
        }
        params = DraftParams(**unflatten({path: jnp.asarray(x) for path, x in arrays.items()}))
    return Draft(name, draft, params, fields.get("training") or {}, count)


def merged_bytes(params: Params, draft: DraftParams) -> int:
    """Bytes of the copies of layers that `merge` would make."""
    return sum(x.nbytes for name in draft.deltas for x in jax.tree.leaves(params[name]))


def merge(params: Params, draft: DraftParams) -> DraftParams:
    """A draft whose deltas are added to copies of the layers that have them.

    Its passes do without the two small products beside each linear layer, which cost a small model
    more than the layer itself; in return the kept layers are in memory twice.

    Args:
        params: the target's parameters. Where they are int8, so are the copies.
        draft: with deltas.

    Returns:
        The draft with `layers`, and without deltas.

    Raises:
        CheckpointError: infinities or NaN in the deltas of an int8 model.
    """
    layers: dict[str, Any] = {}
    for name, deltas in draft.deltas.items():
        layer = {part: dict(linears) for part, linears in params[name].items()}
        for part, factors in deltas.items():
            for linear, delta in factors.items():
                arrays = layer[part][linear]
                whole = int8.dequantize_tree(arrays, jnp.float32)
                whole["weight"] += (delta["down"].astype(jnp.float32) @ delta["up"]).T
                if "scale" in arrays:
                    try:
                        quantized = int8.quantize_tree(jax.device_get(whole))
                    except ValueError as error:
                        raise CheckpointError(
                            f"the draft cannot be used, train it again: {name}/{part}/{linear} "
                            f"with its delta: {error}"
                        ) from error
                    layer[part][linear] = jax.device_put(quantized)
                else:
                    whole["weight"] = whole["weight"].astype(arrays["weight"].dtype)
                    layer[part][linear] = whole
        layers[name] = layer
    return draft.replace(deltas={}, layers=layers)


def _tree(params: DraftParams) -> dict[str, Any]:
    parts = {
        "mask_embeddings": params.mask_embeddings,
        "deltas": params.deltas,
        "bridges": params.bridges,
    }
    return {name: part for name, part in parts.items() if not isinstance(part, Mapping) or part}


def _is_name(path: Path) -> bool:
    return re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", path.name) is not None and (
        ".partial-" not in path.name and ".old-" not in path.name
    )


def check_name(name: str) -> None:
    """Raises CheckpointError unless a draft may be called so."""
    if not _is_name(Path(name)) or Path(name).name != name:
        raise CheckpointError(
            f"{name!r} cannot be the name of a draft: use letters, digits, '.', '-' and '_'"
        )
