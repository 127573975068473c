"""Compares the options of a call with those of an earlier one that it is to resume."""

from collections.abc import Mapping
from typing import Any

from s3d_jax.storage.trees import flatten


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, list[Any]]:
    """[old, new] of each option that differs, by its path, "loop/batch_size"; None is absent."""
    before, after = flatten(old), flatten(new)
    keys = {**before, **after}
    return {k: [before.get(k), after.get(k)] for k in keys if before.get(k) != after.get(k)}


def in_words(changes: Mapping[str, list[Any]]) -> str:
    """The differences as text for a message."""
    return "; ".join(f"{k} was {a!r:.80}, is now {b!r:.80}" for k, (a, b) in changes.items())
