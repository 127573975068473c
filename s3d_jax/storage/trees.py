"""Parameter trees as flat dicts: each array by its path, such as "layers_0/mlp/down/weight"."""

from collections.abc import Mapping
from typing import Any


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of a nested dict by their path."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}/{key}" if prefix else str(key)
        leaves.update(flatten(value, path) if isinstance(value, Mapping) else {path: value})
    return leaves


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict with the given leaves."""
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


def top_level_key(path: str) -> str:
    """The group of the parameter tree that holds an array: "layers_0", "embed"."""
    return path.partition("/")[0]


def shape_problems(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """One line per missing, unknown or mis-shaped array; empty if all are as expected."""
    problems = [f"{path}: missing" for path in expected if path not in found]
    problems += [f"{path}: unknown" for path in found if path not in expected]
    problems += [
        f"{path}: shape {tuple(found[path])}, expected {tuple(shape)}"
        for path, shape in expected.items()
        if path in found and tuple(found[path]) != tuple(shape)
    ]
    return problems


def bullets(lines: list[str], limit: int = 40) -> str:
    """The lines as a list in an error message; more than `limit` lines are cut, and counted."""
    more = [f"... and {len(lines) - limit} more"] if len(lines) > limit else []
    return "\n".join(f"  {line}" for line in (*lines[:limit], *more))
