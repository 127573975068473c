"""The arrays of a draft: mask embeddings, low-rank deltas, bridges over skipped layers."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from s3d_jax.jax_settings import under_usual_jax_settings
from s3d_jax.settings.model import ModelConfig
from s3d_jax.weights.formats import weight_format
from s3d_jax.weights.trees import Params, float_dtype, widen_tree


class DraftParams(flax.struct.PyTreeNode):
    """The arrays that a draft pass has in addition to the target's weights.

    Attributes:
        mask_embeddings: [M, D], inputs of the mask tokens; the i-th of a block is row min(i, M-1).
        deltas: low-rank additions to linear layers of kept layers, under the paths of the
            parameter tree: layers_i/attention/qkv/{down [in, r], up [r, out]} and so on. May be
            empty.
        bridges: low-rank stand-ins for gaps of skipped layers, by the name of the module after the
            gap (layers_j or final_norm): {down [D, r], up [r, D]}. May be empty.
        layers: kept layers whose weights include the deltas (`merge_deltas`). They replace the
            target's layers of the same names. May be empty. Never stored.
    """

    mask_embeddings: jax.Array
    deltas: Mapping[str, Any] = flax.struct.field(default_factory=dict)
    bridges: Mapping[str, Any] = flax.struct.field(default_factory=dict)
    layers: Mapping[str, Any] = flax.struct.field(default_factory=dict)

    def masks(self, count: int) -> jax.Array:
        """The first `count` mask embeddings, [count, D]."""
        rows = np.minimum(np.arange(count), self.mask_embeddings.shape[0] - 1)
        return self.mask_embeddings[rows]


@under_usual_jax_settings
def untrained_draft(config: ModelConfig, params: Params) -> DraftParams:
    """The draft before any training: one mask embedding, the mean of the token embeddings."""
    mean = mean_embedding(config, params).astype(float_dtype(params))
    return DraftParams(mask_embeddings=mean[None])


@under_usual_jax_settings
def mean_embedding(config: ModelConfig, params: Params, power: int = 1) -> jax.Array:
    """The mean over all tokens of their embeddings, or of a power of each number: float32 [D]."""
    return _mean_embedding(config, params["embed"], float_dtype(params), power)


@functools.partial(jax.jit, static_argnames=("config", "dtype", "power"))
def _mean_embedding(config: ModelConfig, embed: Params, dtype: jnp.dtype, power: int) -> jax.Array:
    # In one program: the table is never in memory as float32.
    table = widen_tree(weight_format(config), embed, dtype)["embedding"]
    return jnp.mean(table.astype(jnp.float32) ** power, axis=0)
