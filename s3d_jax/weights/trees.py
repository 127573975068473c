"""Parameter trees: float trees are stored in a weight format, stored trees are widened again."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from s3d_jax.weights.base import WeightFormat

Params = Mapping[str, Any]

MATRICES = ("weight", "embedding")  # the names of matrices in the tree; everything else is a vector


def store_tree(weights: WeightFormat, tree: Params) -> dict[str, Any]:
    """A float tree with its matrices in a format; vectors (norms, biases) stay as they are.

    Args:
        weights: the format.
        tree: a parameter tree or a part of it, numpy arrays.

    Raises:
        ValueError: the format cannot represent a number of a matrix.
    """
    out: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            out[name] = store_tree(weights, value)
        elif name in MATRICES:
            out.update(zip(weights.parts(name), weights.store(value), strict=True))
        else:
            out[name] = value
    return out


def widen_tree(weights: WeightFormat, tree: Params, dtype: Any) -> dict[str, Any]:
    """The float tree of a stored one.

    Args:
        weights: the format of the tree.
        tree: a parameter tree or a part of it, numpy or jax arrays.
        dtype: of the matrices; vectors keep theirs.
    """
    parts = {part for name in MATRICES if name in tree for part in weights.parts(name)}
    out: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            out[name] = widen_tree(weights, value, dtype)
        elif name in MATRICES:
            out[name] = weights.widen(tuple(tree[part] for part in weights.parts(name)), dtype)
        elif name not in parts:
            out[name] = value
    return out


def float_dtype(params: Params) -> jnp.dtype:
    """The type of the arrays that are of no weight format, such as norms."""
    return params["final_norm"]["scale"].dtype
