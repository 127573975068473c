"""The settings that `s3d tune` chose, in a checkpoint's tuning.json.

    {"format": "s3d_jax tuning", "version": 1, "entries": [{"key": ..., "tuning": ...,
      "measured": ...}]}

An entry belongs to a device, a dtype, a kind of cache and a draft. It no longer applies once the
draft is trained again.
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
    path = Path(model) / FILE
    if not path.exists():
        return []
    fields = read_json_object(path, advice=_AGAIN)
    try:
        found, entries = (fields["format"], fields["version"]), fields["entries"]
        whole = all(isinstance(e["key"], dict) and isinstance(e["tuning"], dict) for e in entries)
    except (KeyError, TypeError) as error:
        raise _damaged(path, error) from error
    if found != (FORMAT, VERSION) or not whole:
        raise _damaged(path, f"no {FORMAT} of version {VERSION}")
    return entries


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
    path = Path(model) / FILE
    key = _key(Path(model), config, draft)
    entry = {"key": key, "tuning": tuning.to_dict(), "measured": dict(measured)}
    # Without draft_crc32: entries for an earlier training of the draft are removed, too.
    same = {"device", "dtype", "kv_cache", "draft"}
    others = [
        e for e in read_entries(model) if any(e["key"].get(name) != key.get(name) for name in same)
    ]
    fields = {"format": FORMAT, "version": VERSION, "entries": [*others, entry]}
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
        "draft_crc32": None,
    }
    if config.kv_cache is not None:
        key["kv_cache"] = config.kv_cache
    if draft is not None:
        # config.json holds the checksums of the draft's arrays, so it changes with them.
        key["draft_crc32"] = zlib.crc32((model / "drafts" / draft / "config.json").read_bytes())
    return key


def _damaged(path: Path, reason: object) -> CheckpointError:
    return CheckpointError(f"{path} is damaged ({reason}): {_AGAIN}")
