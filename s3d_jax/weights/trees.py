"""Parameter trees: float trees are stored in weight formats, stored trees are widened again."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from s3d_jax.settings.model import ModelConfig
from s3d_jax.weights.base import Arrays
from s3d_jax.weights.blocks import Blocks
from s3d_jax.weights.formats import FORMATS, weight_format
from s3d_jax.weights.int4 import Int4

Params = Mapping[str, Any]

MATRICES = ("weight", "embedding")  # the names of matrices in the tree; everything else is a vector


def store_tree(config: ModelConfig, tree: Params, module: str = "") -> dict[str, Any]:
    """A float tree with its matrices in the model's formats.

    Vectors (norms, biases) stay as they are.

    Args:
        config: of the model; names the formats.
        tree: a parameter tree or a part of it, numpy arrays.
        module: the path of that part, such as "layers_0"; "" is the whole.

    Raises:
        ValueError: a format cannot represent a number of a matrix.
    """
    out: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            out[name] = store_tree(config, value, _inside(module, name))
        elif name in MATRICES:
            weights = weight_format(config, module)
            out.update(zip(weights.parts(name), weights.store(value), strict=True))
        else:
            out[name] = value
    return out


def widen_tree(config: ModelConfig, tree: Params, dtype: Any, module: str = "") -> dict[str, Any]:
    """The float tree of a stored one.

    Args:
        config: of the stored model; names the formats.
        tree: a parameter tree or a part of it, numpy or jax arrays.
        dtype: of the matrices; vectors keep theirs.
        module: as in `store_tree`.
    """
    return _rewritten(
        config,
        tree,
        module,
        lambda module, name, arrays: {name: weight_format(config, module).widen(arrays, dtype)},
    )


def held_tree(
    config: ModelConfig, held: ModelConfig, tree: Params, module: str = ""
) -> dict[str, Any]:
    """A stored tree in the formats that it is held in.

    Args:
        config, tree, module: as in `widen_tree`; numpy arrays.
        held: from `formats.in_memory`.

    Returns:
        The tree; floats that were widened are float32.
    """

    def rewritten(module: str, name: str, arrays: Any) -> dict[str, Any]:
        weights, wanted = (weight_format(x, module) for x in (config, held))
        if isinstance(weights, Int4) and wanted is FORMATS["int8"]:
            arrays = weights.as_int8(arrays)
        elif isinstance(weights, Blocks) and wanted is FORMATS[None]:
            arrays = (weights.widen(arrays, jnp.dtype("float32")),)
        elif isinstance(weights, Blocks) and isinstance(wanted, Blocks) and weights != wanted:
            arrays = wanted.hold(*weights.groups(arrays))
        return dict(zip(wanted.parts(name), arrays, strict=True))

    return _rewritten(config, tree, module, rewritten)


def _rewritten(
    config: ModelConfig,
    tree: Params,
    module: str,
    rewrite: Callable[[str, str, Arrays], dict[str, Any]],
) -> dict[str, Any]:
    """A stored tree with other arrays for each matrix: `rewrite(module, name, arrays)`."""
    parts = weight_format(config, module).parts
    known = {name: parts(name) for name in MATRICES if name in tree}
    of_matrices = {part for names in known.values() for part in names}
    out: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            out[name] = _rewritten(config, value, _inside(module, name), rewrite)
        elif name in known:
            out.update(rewrite(module, name, tuple(tree[part] for part in known[name])))
        elif name not in of_matrices:
            out[name] = value
    return out


def _inside(module: str, name: str) -> str:
    return f"{module}/{name}" if module else name


def float_dtype(params: Params) -> jnp.dtype:
    """The type of the arrays that are of no weight format, such as norms."""
    return params["final_norm"]["scale"].dtype
