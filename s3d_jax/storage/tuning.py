"""The settings that `s3d tune` chose, in a checkpoint's tuning.json.

    {"format": "s3d_jax tuning", "version": 1, "entries": [{"key": ..., "tuning": ...,
      "measured": ...}], "preferred": [{"key": ..., "measured": ...}]}

An entry belongs to a device, a dtype, a kind of cache and a draft, and so does the draft that is
preferred to others (`s3d tune --drafts`). Neither applies any longer once the draft is trained
again.
"""

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from s3d_jax.errors import CheckpointError, ConfigError
from s3d_jax.machine import machine_name
from s3d_jax.settings.drafting import DraftConfig, Tuning
from s3d_jax.settings.model import ModelConfig
from s3d_jax.storage.json_files import read_json_object
from s3d_jax.storage.staging import write_atomically

FORMAT, VERSION = "s3d_jax tuning", 1
FILE = "tuning.json"
_AGAIN = "delete it, and run s3d tune again"
_DEVICE = frozenset({"device", "dtype", "kv_cache"})
_WORDS = ("device", "dtype", "draft")  # of the key of a preferred draft


def read_tuning(
    model: str | os.PathLike[str], config: ModelConfig, draft: str | None
) -> Tuning | None:
    """The settings that were chosen for this device.

    Args:
        model: the native checkpoint folder.
        config: the model, with the dtype it computes in.
        draft: the name of the trained draft in use; None is the untrained draft.

    Returns:
        None if none were chosen, or if the draft was trained again since.

    Raises:
        CheckpointError: the file is damaged, or of another version.
    """
    key = _key(Path(model), config, draft)
    entry = next((e for e in read_entries(model) if e["key"] == key), None)
    if entry is None:
        return None
    try:
        tuning = Tuning.from_dict(entry["tuning"])
        DraftConfig(tuning.skip).validate_for(config)
    except (ConfigError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(Path(model) / FILE, error) from error
    return tuning


def read_entries(model: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All entries of a checkpoint, for all devices; empty if it was never tuned.

    Raises:
        CheckpointError: the file is damaged, or of another version.
    """
    return _read(Path(model))["entries"]


def read_preferred(model: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The drafts that are preferred, with their measurements, for all devices.

    Those that were removed or trained again since are left out.

    Raises:
        CheckpointError: as `read_entries`.
    """
    found = _read(Path(model))["preferred"]
    return [e for e in found if e["key"]["draft_crc32"] == _draft_crc32(model, e["key"]["draft"])]


def preferred_draft(model: str | os.PathLike[str], config: ModelConfig) -> str | None:
    """The draft that was the fastest of several on this device.

    Args:
        model, config: as in `read_tuning`.

    Returns:
        None if they were not compared, or if it was removed or trained again since.

    Raises:
        CheckpointError: as `read_entries`.
    """
    for found in read_preferred(model):
        name: str = found["key"]["draft"]
        if found["key"] == _key(Path(model), config, name):
            return name
    return None


def _read(model: Path) -> dict[str, list[dict[str, Any]]]:
    """The two lists of the file."""
    path = model / FILE
    if not path.exists():
        return {"entries": [], "preferred": []}
    fields = read_json_object(path, advice=_AGAIN)
    try:
        found, entries = (fields["format"], fields["version"]), fields["entries"]
        preferred = fields.get("preferred", [])
        whole = all(isinstance(e["key"], dict) and isinstance(e["tuning"], dict) for e in entries)
        keys = [e["key"] for e in preferred]
        whole = whole and all(isinstance(key[name], str) for key in keys for name in _WORDS)
        whole = whole and all(isinstance(key["draft_crc32"], int) for key in keys)
    except (KeyError, TypeError) as error:
        raise _damaged(path, error) from error
    if found != (FORMAT, VERSION) or not whole:
        raise _damaged(path, f"no {FORMAT} of version {VERSION}")
    return {"entries": entries, "preferred": preferred}


def save_tuning(
    model: str | os.PathLike[str],
    config: ModelConfig,
    draft: str | None,
    tuning: Tuning,
    measured: Mapping[str, Any],
) -> Path:
    """Stores the settings chosen for this device, and removes an earlier choice.

    The file is replaced in one step.

    Args:
        model, config, draft: as in `read_tuning`.
        tuning: the settings.
        measured: the measurements they were chosen by (JSON).

    Returns:
        The file.

    Raises:
        CheckpointError: the existing file is damaged, or the file cannot be written.
    """
    lists, key = _read(Path(model)), _key(Path(model), config, draft)
    entry = {"key": key, "tuning": tuning.to_dict(), "measured": dict(measured)}
    # Without draft_crc32: entries for an earlier training of the draft are removed, too.
    others = _others(lists["entries"], key, _DEVICE | {"draft"})
    return _write(Path(model), {**lists, "entries": [*others, entry]})


def save_preferred(
    model: str | os.PathLike[str], config: ModelConfig, draft: str, measured: Mapping[str, Any]
) -> Path:
    """Stores which draft loading uses on this device, in place of an earlier choice.

    Args:
        model, config: as in `read_tuning`.
        draft: its name.
        measured: the measurements it was chosen by (JSON).

    Returns:
        The file.

    Raises:
        CheckpointError: as `save_tuning`.
    """
    lists, key = _read(Path(model)), _key(Path(model), config, draft)
    others = _others(lists["preferred"], key, _DEVICE)
    choice = {"key": key, "measured": dict(measured)}
    return _write(Path(model), {**lists, "preferred": [*others, choice]})


def _others(
    entries: list[dict[str, Any]], key: Mapping[str, Any], same: frozenset[str]
) -> list[dict[str, Any]]:
    return [e for e in entries if any(e["key"].get(name) != key.get(name) for name in same)]


def _write(model: Path, lists: Mapping[str, Any]) -> Path:
    path = model / FILE
    fields = {"format": FORMAT, "version": VERSION, **lists}
    try:
        write_atomically(path, json.dumps(fields, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from error
    return path


def check_writable(model: str | os.PathLike[str]) -> None:
    """Checks before minutes of measurements that `save_tuning` will be able to write.

    Raises:
        CheckpointError: the checkpoint's folder is not writable.
    """
    if not os.access(model, os.W_OK | os.X_OK):
        raise CheckpointError(
            f"cannot write into {model}, where the settings are stored: copy the folder to a place "
            "of yours and use that (--model DIR), or only print the settings (--no-save)"
        )


def _key(model: Path, config: ModelConfig, draft: str | None) -> dict[str, Any]:
    key: dict[str, Any] = {
        "device": machine_name(),
        "dtype": config.dtype,
        "draft": draft,
        "draft_crc32": None if draft is None else _draft_crc32(model, draft),
    }
    if config.kv_cache is not None:
        key["kv_cache"] = config.kv_cache
    return key


def _draft_crc32(model: str | os.PathLike[str], draft: str) -> int | None:
    """Changes with the draft's arrays, whose checksums its config.json holds; None without it."""
    path = Path(model) / "drafts" / draft / "config.json"
    return zlib.crc32(path.read_bytes()) if path.exists() else None


def _damaged(path: Path, reason: object) -> CheckpointError:
    return CheckpointError(f"{path} is damaged ({reason}): {_AGAIN}")
