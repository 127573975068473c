"""A draft that can be handed on: a folder without the model that it drafts for.

    config.json        {"format": "s3d_jax portable draft", "version": 3, "kind": "s3d",
                        "draft": {...}, "target": {...}, "training": {...}, "arrays": {...}}
    draft.safetensors  the arrays, as in a checkpoint (`drafters.stored`)

"target" has the settings and a checksum of the model that the draft was trained for. A draft fits
every model of these settings, whatever its dtype and weight format; one with other weights (a
quantised model and its original, say) is served too, and accepts a little less.
"""

import dataclasses
import math
import os
import warnings
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from s3d_jax.drafters.stored import (
    KINDS,
    StoredDraft,
    check_name,
    check_vocabulary,
    choose_draft,
    draft_names,
    draft_tree,
    read_draft,
    save_draft,
)
from s3d_jax.errors import CheckpointError, ConfigError
from s3d_jax.nn.draft import DraftParams
from s3d_jax.nn.features import FeatureDraft
from s3d_jax.settings.drafting import default_name
from s3d_jax.settings.model import ModelConfig
from s3d_jax.settings.records import check
from s3d_jax.storage.arrays import ArrayRecord, crc32, index_from_json, index_to_json
from s3d_jax.storage.json_files import read_json_object, write_json
from s3d_jax.storage.native import read_header, weights_checksum
from s3d_jax.storage.staging import staged_folder
from s3d_jax.storage.trees import bullets, flatten, unflatten

FORMAT, VERSION = "s3d_jax portable draft", 3
_READABLE_VERSIONS = (1, 2, 3)
FILES = ("config.json", "draft.safetensors")
# Settings in which a model may differ from the one that a draft was trained for.
_FREE = ("dtype", "quantization", "blocks", "exact_sums", "max_position_embeddings")
_AGAIN = "get a good copy of the draft's folder"


def export_draft(
    model: str | os.PathLike[str],
    name: str,
    out: str | os.PathLike[str],
    *,
    gamma: int | None = None,
) -> StoredDraft:
    """Writes a draft of a checkpoint into a folder of its own, whole or not at all.

    Args:
        model: the native checkpoint folder.
        name: the draft's name in it.
        out: the folder to write; it must not exist.
        gamma: draft tokens that it proposes per iteration (γ) unless others are asked for, at most
            as many as in the checkpoint; None is just as many.

    Returns:
        What was written.

    Raises:
        CheckpointError: there is no such draft, it is damaged, or `out` cannot be written.
        ConfigError: `gamma` is below 1, or above what the draft proposes.
    """
    from safetensors.numpy import save

    header = read_header(model)
    if name not in draft_names(model):
        choose_draft(model, name)  # says which drafts there are
    draft = read_draft(model, name, header.config)
    assert draft.params is not None  # read_draft read the weights
    if gamma is not None:
        check(
            gamma <= draft.config.gamma,
            f"gamma (--gamma) is {gamma!r}, and the draft {name!r} proposes {draft.config.gamma} "
            f"tokens: choose 1 to {draft.config.gamma}",
        )
        draft = dataclasses.replace(draft, config=draft.config.replace(gamma=gamma))
    arrays = {path: np.asarray(x) for path, x in flatten(draft_tree(draft.params)).items()}
    trained_for = draft.training.get("target_crc32", weights_checksum(header.path))
    target = {
        "name": header.source.get("name"),
        "weights_crc32": trained_for,
        "settings": header.config.to_dict(),
    }
    fields = {
        "format": FORMAT,
        "version": VERSION,
        "kind": draft.kind,
        "draft": draft.config.to_dict(),
        "target": target,
        "training": draft.training,
        "arrays": index_to_json({p: ArrayRecord(x.shape, crc32(x)) for p, x in arrays.items()}),
    }
    with staged_folder(out, needs=sum(x.nbytes for x in arrays.values())) as partial:
        write_json(partial / "config.json", fields)
        # Not by save_file, whose file only its owner can read.
        (partial / "draft.safetensors").write_bytes(save(arrays))
    return draft


def add_draft(
    folder: str | os.PathLike[str],
    model: str | os.PathLike[str],
    name: str | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Adds a draft that was handed on to a checkpoint, whole or not at all.

    Warns if the draft was trained for other weights of the same settings.

    Args:
        folder: as `export_draft` writes it.
        model: the native checkpoint folder.
        name: the draft's name there; None is "default", or of other kinds than S3D the kind.
        overwrite: replace a draft of that name.

    Returns:
        The draft's folder in the checkpoint.

    Raises:
        CheckpointError: the folder is no draft, is damaged, or is of a kind that this version does
            not know; the model is of another architecture; or the name is taken.
    """
    folder, header = Path(folder), read_header(model)
    fields = _read_fields(folder)
    name = default_name(fields["kind"]) if name is None else name
    check_name(name, fields["kind"])
    try:
        kind = fields["kind"]
        config = KINDS[kind][0].from_dict(fields["draft"])
        index = index_from_json(fields["arrays"])
        trained_for = fields["target"]["weights_crc32"]
        target = ModelConfig.from_dict(fields["target"]["settings"])
    except (ConfigError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'} is damaged: {_AGAIN}") from error
    if differences := _differences(target, header.config):
        raise CheckpointError(
            f"the draft in {folder} is for another architecture than {model}: get a draft for this "
            f"model, or train one (s3d train)\n{bullets(differences)}"
        )
    params = _read_params(folder, index, kind)
    check_vocabulary(params, header.config.vocab_size, folder, _AGAIN)
    if trained_for != weights_checksum(header.path):
        warnings.warn(
            f"the draft in {folder} was trained for other weights "
            f"({fields['target'].get('name') or 'of an unnamed model'}) of the same architecture: "
            "the text stays that of the model, but less may be accepted (s3d bench shows it)",
            stacklevel=2,
        )
    training = {**(fields.get("training") or {}), "target_crc32": trained_for}
    return save_draft(model, name, config, params, training, kind=kind, overwrite=overwrite)


def _differences(theirs: ModelConfig, ours: ModelConfig) -> list[str]:
    """The settings that a draft depends on and that two models do not share."""
    return [
        f"{field.name}: the draft's model has {getattr(theirs, field.name)!r:.80}, this one "
        f"{getattr(ours, field.name)!r:.80}"
        for field in dataclasses.fields(ModelConfig)
        if field.name not in _FREE
        and not _alike(getattr(theirs, field.name), getattr(ours, field.name))
    ]


def _alike(a: Any, b: Any) -> bool:
    """Whether two settings are equal, up to float32: some file formats store 1e-5 so."""
    if dataclasses.is_dataclass(a) and dataclasses.is_dataclass(b):
        return _alike(list(vars(a).items()), list(vars(b).items()))
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_alike, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-6)
    return bool(a == b)


def _read_fields(folder: Path) -> dict[str, Any]:
    missing = f"{folder} holds no draft (s3d draft export writes config.json and draft.safetensors)"
    fields = read_json_object(folder / "config.json", advice=_AGAIN, if_missing=missing)
    if fields.get("format") != FORMAT:
        raise CheckpointError(missing)
    if fields.get("version") not in _READABLE_VERSIONS or fields.get("kind") not in KINDS:
        raise CheckpointError(
            f"the draft in {folder} is of version {fields.get('version')!r:.20} and kind "
            f"{fields.get('kind')!r:.80}, which this s3d_jax does not know: update s3d_jax"
        )
    return fields


def _read_params(
    folder: Path, index: dict[str, ArrayRecord], kind: str
) -> DraftParams | FeatureDraft:
    """The arrays of a draft of that kind.

    Raises:
        CheckpointError: they are missing or damaged.
    """
    from safetensors.numpy import load_file

    path = folder / "draft.safetensors"
    try:
        arrays = load_file(path)
    except Exception as error:  # safetensors has an exception of its own, which is no OSError
        raise CheckpointError(f"cannot read {path}: {_AGAIN} ({error})") from error
    found = {name: ArrayRecord(x.shape, crc32(x)) for name, x in arrays.items()}
    if found != index:
        names = sorted(found.keys() | index.keys())
        wrong = [name for name in names if found.get(name) != index.get(name)]
        raise CheckpointError(f"{path} is damaged ({', '.join(wrong)}): {_AGAIN}")
    try:
        return KINDS[kind][1](**unflatten({name: jnp.asarray(x) for name, x in arrays.items()}))
    except TypeError as error:
        raise CheckpointError(f"{path} is no draft ({error}): {_AGAIN}") from error
