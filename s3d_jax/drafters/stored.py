"""Trained drafts in a checkpoint: one target can carry several, each under its own name.

    drafts/<name>/config.json    {"format": "s3d_jax draft", "version": 4, "kind": "s3d",
                                 "draft": {...}, "training": {...}, "arrays": {...}}
    drafts/<name>/weights/       one orbax checkpoint: mask_embeddings, deltas, bridges, chain,
                                 vocabulary; of the kinds "eagle" and "medusa" weights, vocabulary

"kind" names the drafter that uses the draft. "arrays" holds shape and CRC-32 of each array.
"""

import dataclasses
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from s3d_jax.errors import CheckpointError, ConfigError
from s3d_jax.jax_settings import under_usual_jax_settings
from s3d_jax.machine import default_device
from s3d_jax.mesh import mesh_of
from s3d_jax.nn.draft import DraftParams, OwnVocabulary
from s3d_jax.nn.features import FeatureDraft, in_memory
from s3d_jax.nn.sharding import put
from s3d_jax.settings.drafting import DraftConfig, FeatureConfig, default_name
from s3d_jax.settings.model import ModelConfig
from s3d_jax.storage.arrays import ArrayWriter, cast, index_from_json, index_to_json, read_array
from s3d_jax.storage.json_files import read_json_object, write_json
from s3d_jax.storage.native import read_header
from s3d_jax.storage.staging import staged_folder
from s3d_jax.storage.trees import flatten, unflatten
from s3d_jax.storage.tuning import preferred_draft
from s3d_jax.weights.base import num_bytes
from s3d_jax.weights.formats import takes_deltas
from s3d_jax.weights.trees import Params, store_tree, widen_tree

FORMAT, VERSION = "s3d_jax draft", 4
_READABLE_VERSIONS = (1, 2, 3, 4)
S3D = "s3d"  # a draft of version 1 names no kind, and is of this one
KINDS: dict[str, tuple[type[DraftConfig | FeatureConfig], type[DraftParams | FeatureDraft]]] = {
    S3D: (DraftConfig, DraftParams),
    "eagle": (FeatureConfig, FeatureDraft),
    "medusa": (FeatureConfig, FeatureDraft),
}
DEFAULT_NAME = "default"  # the draft that is used unless another is requested
_AGAIN = "train it again, or restore it from a copy"


@dataclasses.dataclass(frozen=True)
class StoredDraft:
    """A trained draft of a checkpoint.

    Attributes:
        name: its name in the checkpoint.
        kind: the drafter that uses it.
        config: skip, γ, block attention, mode; of the other kinds γ.
        params: its arrays, in the target's dtype; None if only the settings were read.
        training: how it was trained, and what it reached (free form, JSON).
        num_params: parameters in addition to the target's.
        shapes: of its arrays, by path.
    """

    name: str
    kind: str
    config: Any
    params: Any
    training: dict[str, Any]
    num_params: int
    shapes: Mapping[str, tuple[int, ...]]


def save_draft(
    model: str | os.PathLike[str],
    name: str,
    config: DraftConfig | FeatureConfig,
    params: DraftParams | FeatureDraft,
    training: Mapping[str, Any],
    *,
    kind: str = S3D,
    overwrite: bool = False,
) -> Path:
    """Adds a draft to a checkpoint; it appears whole or not at all.

    Args:
        model: the native checkpoint folder.
        name: letters, digits, ".", "-" and "_".
        config, params: of the kind; arrays of any float dtype are stored in the target's.
        training: how it was trained (JSON).
        kind: the drafter that uses it.
        overwrite: replace a draft of that name.

    Returns:
        The draft's folder.

    Raises:
        CheckpointError: the checkpoint is missing, the name is not allowed or is taken, or the
            deltas are merged into layers.
    """
    check_name(name, kind)
    header = read_header(model)
    config.validate_for(header.config)
    folder = header.path / "drafts" / name
    with staged_folder(folder, overwrite=overwrite) as partial:
        write_draft(partial, header.config, config, params, training, kind)
    return folder


@under_usual_jax_settings
def write_draft(
    folder: Path,
    model: ModelConfig,
    config: DraftConfig | FeatureConfig,
    params: DraftParams | FeatureDraft,
    training: Mapping[str, Any],
    kind: str = S3D,
) -> None:
    """Writes the files of a draft into a folder that is being staged.

    Args:
        folder: drafts/<name> of a checkpoint that is being written.
        model: the target's settings.
        config, params, training, kind: as in `save_draft`.

    Raises:
        CheckpointError: the deltas are merged into layers, which cannot be stored.
    """
    if isinstance(params, DraftParams) and params.layers:
        raise CheckpointError(
            "the draft's deltas are merged into its layers, as load does for small models, and "
            "cannot be stored: save the draft that read_draft returns"
        )
    check_vocabulary(params, model.vocab_size, folder)
    dtype = jnp.dtype(model.dtype)
    writer = ArrayWriter(folder / "weights")
    for path, x in flatten(draft_tree(params)).items():
        writer.add({path: _as_stored(np.asarray(x), dtype, path)})
    writer.finish()
    fields = {
        "format": FORMAT,
        "version": VERSION,
        "kind": kind,
        "draft": config.to_dict(),
        "training": dict(training),
        "arrays": index_to_json(writer.index),
    }
    write_json(folder / "config.json", fields)


def draft_names(model: str | os.PathLike[str]) -> tuple[str, ...]:
    """The names of a checkpoint's drafts, sorted."""
    folder = Path(model) / "drafts"
    return tuple(sorted(p.parent.name for p in folder.glob("*/config.json") if _is_name(p.parent)))


def choose_draft(
    model: str | os.PathLike[str],
    name: str | None,
    kind: str = S3D,
    *,
    config: ModelConfig | None = None,
) -> str | None:
    """The draft of a kind to use.

    Args:
        model: the native checkpoint folder.
        name: None is the one that `s3d tune --drafts` preferred; without one the default, or the
            only one.
        kind: the drafter that uses it.
        config: the target as it computes here; None asks for no preference. What is preferred is
            of the kind S3D.

    Returns:
        Its name, or None if the checkpoint has no draft of the kind.

    Raises:
        CheckpointError: no draft has that name, or it is of another kind; or there are several, and
            none is the default.
    """
    names = draft_names(model)
    if name is not None and name not in names:
        known = f"it has {', '.join(names)}" if names else "it has no trained draft"
        raise CheckpointError(f"{model} has no draft {name!r}: {known}")
    kinds = {n: _kind_or_none(model, n) for n in names}
    if name is not None:
        if (found := kinds[name]) != kind and found in KINDS:
            raise CheckpointError(
                f"the draft {name!r} of {model} is of the kind {found!r}, not {kind!r}"
            )
        return name
    # What cannot be read, or is of an unknown kind, counts as S3D's: reading it says what is wrong.
    names = tuple(n for n in names if (kinds[n] if kinds[n] in KINDS else S3D) == kind)
    if config is not None and kind == S3D:
        preferred = preferred_draft(model, config)
        if preferred in names:
            return preferred
    if (default := default_name(kind)) in names:
        return default
    if len(names) > 1:
        raise CheckpointError(
            f"{model} has the drafts {', '.join(names)}, and none is called {default!r}: "
            "choose one (--draft NAME, draft=...)"
        )
    return names[0] if names else None


@under_usual_jax_settings
def read_draft(
    model: str | os.PathLike[str],
    name: str,
    config: ModelConfig,
    *,
    weights: bool = True,
    mesh: Mesh | None = None,
) -> StoredDraft:
    """Reads one draft.

    Args:
        model: the native checkpoint folder.
        name: the draft's name.
        config: the target's; arrays are cast to its dtype.
        mesh: that the target lies on, with the `shards` of its config; None is the default device.
        weights: False reads the settings alone.

    Raises:
        CheckpointError: it is missing, damaged, of another version, of an unknown kind, or does not
            fit the target.
        DeviceError: there is no device to put the arrays on.
    """
    folder = Path(model) / "drafts" / name
    fields = _read_config(folder)
    if (kind := fields["kind"]) not in KINDS:
        raise CheckpointError(
            f"the draft {name!r} of {model} is of the kind {kind!r:.80}, and this s3d_jax knows "
            f"{', '.join(KINDS)}: update s3d_jax, choose another draft, or use none "
            "(use_draft=False)"
        )
    try:
        settings, arrays_of = KINDS[kind]
        draft = settings.from_dict(fields["draft"])
        draft.validate_for(config)
        index = index_from_json(fields["arrays"])
    except (ConfigError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'} is damaged: {error}") from error
    shapes = {path: record.shape for path, record in index.items()}
    count = sum(math.prod(shape) for path, shape in shapes.items() if path != "vocabulary")
    params = None
    if weights:
        default_device()  # as in storage.native.load
        dtype = jnp.dtype(config.dtype)
        arrays = {
            path: _as_stored(
                read_array(folder / "weights", path, record, advice=_AGAIN), dtype, path
            )
            for path, record in index.items()
        }
        placed = {path: put(mesh, config, path, x) for path, x in arrays.items()}
        params = arrays_of(**unflatten(placed))
        check_vocabulary(params, config.vocab_size, folder)
    return StoredDraft(name, kind, draft, params, fields.get("training") or {}, count, shapes)


class StoredFeatures(Mapping[str, tuple[FeatureConfig, FeatureDraft]]):
    """The drafts of a checkpoint that read hidden states, by kind; each is read when it is needed.

    Args:
        model: the native checkpoint folder.
        config, params: the target, as it is in memory.
        chosen: of each kind the name; of those that are missing the default, or the only one.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        config: ModelConfig,
        params: Params,
        chosen: Mapping[str, str] | None = None,
    ) -> None:
        self._model, self._config, self._params = model, config, params
        self._chosen = dict(chosen or {})
        self._read: dict[str, tuple[FeatureConfig, FeatureDraft]] = {}

    def __getitem__(self, kind: str) -> tuple[FeatureConfig, FeatureDraft]:
        if kind not in self._read:
            if kind not in self:
                raise KeyError(kind)
            name = choose_draft(self._model, self._chosen.get(kind), kind)
            assert name is not None  # it is in
            draft = read_draft(self._model, name, self._config)
            self._read[kind] = draft.config, in_memory(self._config, self._params, draft.params)
        return self._read[kind]

    def __iter__(self) -> Iterator[str]:
        found = {_kind_or_none(self._model, name) for name in draft_names(self._model)}
        return (kind for kind in KINDS if kind != S3D and kind in found)

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, kind: object) -> bool:
        return kind in list(iter(self))


def check_vocabulary(
    params: OwnVocabulary, vocab_size: int, folder: Path, advice: str = _AGAIN
) -> None:
    """Raises CheckpointError unless the draft's tokens are some of the target's, ascending."""
    if params.vocabulary is None:
        return
    ids = np.asarray(params.vocabulary)
    ascending = ids.ndim == 1 and ids.dtype.kind == "i" and ids.size and (np.diff(ids) > 0).all()
    if not ascending or ids[0] < 0 or ids[-1] >= vocab_size:
        raise CheckpointError(
            f"the draft in {folder} is damaged: its vocabulary must be ascending ids of the "
            f"model's {vocab_size} tokens: {advice}"
        )


def _as_stored(array: np.ndarray, dtype: jnp.dtype, path: str) -> np.ndarray:
    """Token ids stay as they are."""
    return array if path == "vocabulary" else cast(array, dtype, path)


def draft_kind(model: str | os.PathLike[str], name: str) -> str:
    """The kind of a draft, which need not be one that this version knows.

    Raises:
        CheckpointError: the draft is missing, damaged, or of another version.
    """
    return str(_read_config(Path(model) / "drafts" / name)["kind"])


def _kind_or_none(model: str | os.PathLike[str], name: str) -> str | None:
    try:
        return draft_kind(model, name)
    except CheckpointError:
        return None


def _read_config(folder: Path) -> dict[str, Any]:
    """A draft's config.json, with a kind."""
    fields = read_json_object(folder / "config.json", advice=_AGAIN)
    if fields.get("format") != FORMAT or fields.get("version") not in _READABLE_VERSIONS:
        raise CheckpointError(
            f"{folder} is no draft of format version {VERSION}: train it again, or update s3d_jax"
        )
    return {"kind": S3D} | fields


# Deltas are merged into layer copies up to this size, in bytes; above it the extra products are
# negligible.
MOST_MERGED = 64 * 2**20


def merged_bytes(params: Params, draft: DraftParams) -> int:
    """Bytes of the layer copies that `merge_deltas` makes; of arrays or their shapes."""
    leaves = [x for name in draft.deltas for x in jax.tree.leaves(params[name])]
    return num_bytes(leaves)


def is_merged(
    config: ModelConfig, params: Params, settings: DraftConfig, draft: DraftParams
) -> bool:
    """Whether loading a model merges the draft's deltas.

    Not where several hosts hold the layers: deltas are merged on the host, which has no whole one.
    Nor in the mode "merged", whose pass needs the layers with deltas and without.
    """
    here = jax.process_count() == 1 and takes_deltas(config) and settings.mode == "two-pass"
    return here and merged_bytes(params, draft) <= MOST_MERGED


@under_usual_jax_settings
def merge_deltas(config: ModelConfig, params: Params, draft: DraftParams) -> DraftParams:
    """Adds a draft's deltas to copies of the layers that have them.

    The draft passes then need no low-rank products, which cost a small model more than the layer
    itself. In return the kept layers are in memory twice.

    Args:
        config, params: the target. The copies have its weight format.
        draft: has deltas.

    Returns:
        The draft with `layers`, and without deltas.

    Raises:
        CheckpointError: the weight format cannot represent a layer with its delta.
    """
    layers: dict[str, Any] = {}
    for name, deltas in draft.deltas.items():
        layer = {part: dict(linears) for part, linears in params[name].items()}
        for part, factors in deltas.items():
            for linear, delta in factors.items():
                module = f"{name}/{part}/{linear}"
                try:
                    layer[part][linear] = _add_delta(config, module, layer[part][linear], delta)
                except ValueError as error:
                    raise CheckpointError(
                        f"the draft cannot be used, train it again: {module} with its delta: "
                        f"{error}"
                    ) from error
        layers[name] = layer
    return draft.replace(deltas={}, layers=layers)


def _add_delta(
    config: ModelConfig, module: str, arrays: Params, delta: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """A linear layer's arrays with a low-rank delta added to its matrix, in the same format.

    Raises:
        ValueError: the format cannot represent a number of the sum.
    """
    whole = widen_tree(config, arrays, jnp.float32, module)
    whole["weight"] += (delta["down"].astype(jnp.float32) @ delta["up"]).T
    stored = store_tree(config, jax.device_get(whole), module)
    on_mesh = mesh_of(arrays) is not None
    return {
        name: jax.device_put(
            np.asarray(x, arrays[name].dtype), arrays[name].sharding if on_mesh else None
        )
        for name, x in stored.items()
    }


def draft_tree(params: DraftParams | FeatureDraft) -> dict[str, Any]:
    """A draft's arrays as a nested dict, without empty parts."""
    names = ("mask_embeddings", "deltas", "bridges", "chain", "weights", "vocabulary")
    parts = {name: getattr(params, name) for name in names if hasattr(params, name)}
    return {
        name: part
        for name, part in parts.items()
        if part is not None and (not isinstance(part, Mapping) or part)
    }


def _is_name(path: Path) -> bool:
    return re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", path.name) is not None and (
        ".partial-" not in path.name and ".old-" not in path.name
    )


def check_name(name: str, kind: str = S3D) -> None:
    """Raises CheckpointError unless a draft of the kind can have this name."""
    for other in KINDS:
        if kind != other and name == default_name(other):
            raise CheckpointError(
                f"the name {name!r} is for drafts of the kind {other!r}, and this one is of "
                f"the kind {kind!r}: choose another"
            )
    if not _is_name(Path(name)) or Path(name).name != name:
        raise CheckpointError(
            f"{name!r} cannot be the name of a draft: use letters, digits, '.', '-' and '_'"
        )
