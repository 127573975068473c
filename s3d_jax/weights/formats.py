"""Weight formats by name.

To add a format, write it in a file of this folder, add it to `FORMATS`, and describe it in
`settings.model.QUANTIZATIONS`. If some backend holds it otherwise, `in_memory` says so, and
`trees.held_tree` converts it.
"""

import functools

from s3d_jax.errors import ConfigError
from s3d_jax.settings.model import ModelConfig
from s3d_jax.weights.base import WeightFormat
from s3d_jax.weights.blocks import Blocks
from s3d_jax.weights.dense import Dense
from s3d_jax.weights.int4 import Int4
from s3d_jax.weights.int8 import Int8

EMBED, HEAD = "embed", "lm_head"  # the modules whose matrices have a row for each token

FORMATS: dict[str | None, WeightFormat] = {
    None: Dense(),
    "int8": Int8(rotated=True),
    "int8-plain": Int8(rotated=False),
    "int4": Int4(),
    "blocks": Blocks(),  # each matrix has its own kind
}
_EXACT_DENSE = Dense(exact=True)
# The formats of the embeddings and the head, where they are not that of the layers. In 4 bits these
# two cost as much quality as all layers together (docs/log).
_TABLES: dict[str | None, WeightFormat] = {"int4": FORMATS["int8"]}


def weight_format(config: ModelConfig, module: str) -> WeightFormat:
    """The format of a module's matrix.

    Args:
        config: of the model.
        module: its path in the parameter tree, such as "embed" or "layers_0/mlp/down".
    """
    if config.blocks is not None:
        return _kinds(config.blocks).get(module, FORMATS[None])
    if config.quantization is None and _rounds_the_cache_alone(config):
        return _EXACT_DENSE
    layers = FORMATS[config.quantization]
    return _TABLES.get(config.quantization, layers) if module in (EMBED, HEAD) else layers


@functools.lru_cache(8)
def _kinds(blocks: tuple[str, ...]) -> dict[str, Blocks]:
    """The kind of each module's matrix that `ModelConfig.blocks` names."""
    try:
        return {
            module: Blocks.parse(kind) for module, _, kind in (x.partition(" ") for x in blocks)
        }
    except ValueError as error:
        raise ConfigError(f"the model's blocks: {error}") from error


def head_format(config: ModelConfig) -> WeightFormat:
    """The format of the matrix that makes the logits; the table's, if it is tied."""
    return weight_format(config, EMBED if config.tie_embeddings else HEAD)


def in_memory(config: ModelConfig, backend: str, mesh: bool = False) -> ModelConfig:
    """The model as a backend holds it; the numbers are the same.

    CPUs hold int4 as int8, and blocks as floats: XLA would widen all weights at once in temporary
    memory, for each pass or before a decoding loop. Meshes hold four bits in eight: compiled
    programs refuse committed arrays of int4 (jax 0.10, "input layouts that disagree").

    Args:
        config: as stored.
        backend: "cpu", "gpu" or "tpu".
        mesh: whether the weights are divided over several devices.
    """
    if config.quantization == "int4" and (mesh or backend == "cpu"):
        return config.replace(quantization="int8")
    if config.blocks is not None and backend == "cpu":
        return config.unquantized()
    if config.blocks is not None and mesh:
        kinds = _kinds(config.blocks).items()
        return config.replace(blocks=tuple(f"{module} {kind.in_bytes()}" for module, kind in kinds))
    return config


def trainable(config: ModelConfig) -> bool:
    """Whether the model's matrices have gradients."""
    return FORMATS[config.quantization].trainable


def takes_deltas(config: ModelConfig) -> bool:
    """Whether small changes of the layers' matrices are not lost when they are stored."""
    return FORMATS[config.quantization].takes_deltas


def exact_sums(config: ModelConfig) -> bool:
    """Whether the model's norms and attention sum independently of the order (`exact`).

    By default where activations are rounded: by the weight format, or for the cache.
    """
    if config.exact_sums is not None:
        return config.exact_sums
    return FORMATS[config.quantization].exact_sums or _rounds_the_cache_alone(config)


def _rounds_the_cache_alone(config: ModelConfig) -> bool:
    """Whether last bits of float32 products decide how keys and values are rounded.

    In 16 bits they are rounded before, to the same numbers but for near ties.
    """
    return config.kv_cache is not None and config.precision == "float32"


def bound_by_memory(config: ModelConfig, backend: str) -> bool:
    """Whether the backend multiplies a few rows in the time that it takes to read the weights."""
    return FORMATS[config.quantization].bound_by_memory(config.dtype, backend)
