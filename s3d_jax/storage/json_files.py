"""JSON objects in files, with errors that name the file."""

import json
from pathlib import Path
from typing import Any

from s3d_jax.errors import CheckpointError

AGAIN = "convert the model again, or restore the folder from a copy"
_MAX_BYTES = 100_000_000  # the limit of the safetensors library for its headers


def read_json_object(
    path: Path,
    error: type[CheckpointError] = CheckpointError,
    *,
    advice: str = AGAIN,
    if_missing: str = "",
) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Args:
        path: the file.
        error: the class to raise.
        advice: what the user can do about a damaged file.
        if_missing: the message for a missing file; the default calls the folder incomplete.

    Raises:
        CheckpointError: the file is missing, holds no JSON object, names a field twice, or is too
            large. It is an `error`.
    """
    try:
        if not path.is_file():  # a pipe or a device could be read forever
            raise error(
                if_missing or f"{path.parent} is incomplete, it has no {path.name}: {advice}"
            )
        if (size := path.stat().st_size) > _MAX_BYTES:
            raise error(f"{path} has {size:,} bytes, and is damaged: {advice}")
        fields = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_fields)
    except OSError as failure:
        raise error(f"cannot read {path}: {failure.strerror}") from failure
    except (ValueError, RecursionError) as failure:  # bad UTF-8 and bad JSON are ValueErrors
        raise error(f"{path} is not valid JSON ({failure}): {advice}") from failure
    if not isinstance(fields, dict):
        raise error(f"{path} must hold a JSON object: {advice}")
    return fields


def unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook` that raises ValueError where an object names a field twice."""
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"{name!r:.200} occurs twice")
        fields[name] = value
    return fields


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
