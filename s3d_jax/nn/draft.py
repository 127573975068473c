"""The arrays of a draft, and what it does with them besides the layers' own work.

Mask embeddings, low-rank deltas, bridges over skipped layers, a vocabulary of its own, and a chain
from each draft token to the next.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from s3d_jax.jax_settings import under_usual_jax_settings
from s3d_jax.mesh import DATA, constrained
from s3d_jax.nn.attention import Layout
from s3d_jax.nn.cache import KVCache
from s3d_jax.nn.largest import largest_few
from s3d_jax.nn.layers import rms_norm
from s3d_jax.nn.rounded import widened
from s3d_jax.nn.sharding import gathered
from s3d_jax.settings.model import ModelConfig
from s3d_jax.weights.base import Arrays
from s3d_jax.weights.formats import EMBED, HEAD, head_format, weight_format
from s3d_jax.weights.trees import Params, float_dtype

CANDIDATES = 16  # of each row, which the token before can move
_PART = 256  # rows of the table at once


class OwnVocabulary:
    """What drafts share that propose some of the target's tokens alone.

    Attributes:
        vocabulary: int32 [V'], the tokens that can be drafted, ascending. None is all.
        head: the rows of the target's head that belong to `vocabulary` (`with_head`), as the weight
            format stores them. May be empty. Never stored.
    """

    vocabulary: jax.Array | None
    head: Arrays
    if TYPE_CHECKING:

        def replace(self, **fields: Any) -> Self: ...

    def ids(self, indices: jax.Array) -> jax.Array:
        """The token ids of indices into the draft's vocabulary, int32 of the same shape."""
        indices = indices.astype(jnp.int32)
        return indices if self.vocabulary is None else self.vocabulary[indices]

    def indices(self, ids: jax.Array, vocab_size: int) -> jax.Array:
        """The indices of token ids in the draft's vocabulary, int32; -1 for what it lacks.

        Args:
            ids: int [...].
            vocab_size: V, of the target.
        """
        if self.vocabulary is None:
            return ids.astype(jnp.int32)
        count = jnp.arange(self.vocabulary.shape[0], dtype=jnp.int32)
        return jnp.full(vocab_size, -1, jnp.int32).at[self.vocabulary].set(count)[ids]


Draft = TypeVar("Draft", bound=OwnVocabulary)


class DraftParams(flax.struct.PyTreeNode, OwnVocabulary):
    """The arrays that a draft pass has in addition to the target's weights.

    Attributes:
        mask_embeddings: [M, D], inputs of the mask tokens; the i-th of a block is row min(i, M-1).
        deltas: low-rank additions to linear layers of kept layers, under the paths of the
            parameter tree: layers_i/attention/qkv/{down [in, r], up [r, out]} and so on. May be
            empty.
        bridges: low-rank stand-ins for gaps of skipped layers, by the name of the module after the
            gap (`bridge_name`): {down [D, r], up [r, D]}; down is [D+F, r] in all of them if they
            also read what the cache holds of the token before x_n (`recall`). May be empty.
        chain: corrects a row by the token that is drafted before it (`chained`): {down [2·D, r],
            up [r, D]}. May be empty.
        vocabulary, head: see `OwnVocabulary`.
        layers: kept layers whose weights include the deltas (`merge_deltas`). They replace the
            target's layers of the same names. May be empty. Never stored.
    """

    mask_embeddings: jax.Array
    deltas: Mapping[str, Any] = flax.struct.field(default_factory=dict)
    bridges: Mapping[str, Any] = flax.struct.field(default_factory=dict)
    chain: Mapping[str, Any] = flax.struct.field(default_factory=dict)
    vocabulary: jax.Array | None = None
    layers: Mapping[str, Any] = flax.struct.field(default_factory=dict)
    head: Arrays = ()

    def masks(self, count: int) -> jax.Array:
        """The first `count` mask embeddings, [count, D]."""
        rows = np.minimum(np.arange(count), self.mask_embeddings.shape[0] - 1)
        return self.mask_embeddings[rows]


def head_matrix(config: ModelConfig, params: Params) -> Arrays:
    """The matrix of the target's head [V, D], as the weight format stores it."""
    parts = head_format(config).parts
    module, name = (EMBED, "embedding") if config.tie_embeddings else (HEAD, "weight")
    return _matrix(config, params, module, parts(name))


def _matrix(config: ModelConfig, params: Params, module: str, parts: Sequence[str]) -> Arrays:
    return tuple(gathered(config, f"{module}/{part}", params[module][part]) for part in parts)


@under_usual_jax_settings
def with_head(config: ModelConfig, params: Params, draft: Draft) -> Draft:
    """The draft with its rows of the head, if it has a vocabulary of its own.

    Reading them from the whole matrix in every draft pass would cost more than they save.
    """
    if draft.vocabulary is None or draft.head:
        return draft
    rows = head_format(config).take_rows(head_matrix(config, params), draft.vocabulary)
    return draft.replace(head=rows)


def bridge_name(layer: int, num_layers: int) -> str:
    """The name in `DraftParams.bridges` of the bridge to a layer; layer L is the head."""
    return f"layers_{layer}" if layer < num_layers else "final_norm"


def recalled_layers(config: ModelConfig, bridges: Mapping[str, Any]) -> int:
    """The number of layers whose values the bridges recall, all the same; 0 if they do not."""
    known = (factors["down"].shape[0] - config.hidden_size for factors in bridges.values())
    return max(known, default=0) // (config.num_kv_heads * config.head_dim)


def recall(
    cache: KVCache, layouts: Sequence[Layout], count: int, width: int, eps: float, copies: int = 1
) -> jax.Array:
    """What the target's last layers hold of the token before each block.

    The values in the cache are products of the target's residual stream before each layer, so those
    of the last layers tell a draft what the target knew when it chose x_n, as the features of EAGLE
    (arXiv 2401.15077) do. Nothing has to be kept for it.

    Args:
        cache: holds the token before.
        layouts: of each layer.
        count: N, the last layers that are read.
        width: tokens in a block.
        eps: of the norms.
        copies: of each key head in the cache (`ModelConfig.cached_heads`).

    Returns:
        float32 [B, A, N·K·H], each layer normed on its own, the last layer first; 0 where no token
        is before a block.
    """
    parts = []
    for values, layout in list(zip(cache.values, layouts, strict=True))[: -count - 1 : -1]:
        positions = layout.positions
        before = positions.reshape(len(positions), -1, width)[:, :, 0] - 1
        slots = before % values.shape[2] if layout.ring else jnp.maximum(before, 0)
        at = functools.partial(jnp.take_along_axis, indices=slots[:, None, :, None], axis=2)
        found = widened(jax.tree.map(at, values)).swapaxes(1, 2)
        found = constrained(found, DATA)[:, :, ::copies]
        found = found.reshape(*before.shape, -1).astype(jnp.float32)
        parts.append(jnp.where(before[:, :, None] >= 0, rms_norm(found, eps), 0.0))
    return jnp.concatenate(parts, axis=-1)


class Chain(NamedTuple):
    """What the chain of a draft pass knows before any token is drafted (`begin_chain`).

    Attributes:
        best: int32 [B, T, C], indices of each row's C = `CANDIDATES` largest logits.
        weights: float32 [B, T, C, D], their rows of the head.
        features: float32 [B, T, r], what the row itself adds to the chain's features.
    """

    best: jax.Array
    weights: jax.Array
    features: jax.Array

    def rows(self, which: slice) -> "Chain":
        """Those of some of the T rows."""
        return Chain(*(x[:, which] for x in self))


def begin_chain(
    config: ModelConfig, params: Params, draft: DraftParams, hidden: jax.Array, logits: jax.Array
) -> Chain:
    """What does not depend on the drafted tokens, for all rows at once.

    Args:
        config, params: the target.
        draft: has a chain, and its head if it has a vocabulary (`with_head`).
        hidden: [B, T, D], of which the logits were made.
        logits: float32 [B, T, V'].
    """
    head = head_matrix(config, params) if draft.vocabulary is None else draft.head
    best = largest_few(logits, min(CANDIDATES, logits.shape[-1]))
    weights = head_format(config).look_up(head, best, config.dtype).astype(jnp.float32)
    normed = rms_norm(hidden.astype(jnp.float32), config.norm_eps)
    down = draft.chain["down"][: hidden.shape[-1]].astype(jnp.float32)
    return Chain(best, weights, _product(normed, down))


def chained(
    config: ModelConfig,
    params: Params,
    draft: DraftParams,
    chain: Chain,
    logits: jax.Array,
    before: jax.Array,
) -> jax.Array:
    """Draft logits, corrected by the token that is drafted before each.

    The rows of a draft pass do not know each other's tokens: a mask row predicts what is likely at
    its position whatever the token before it is. A low-rank function of the row and that token
    moves the row's best candidates, as the Markov head of DSpark (arXiv 2607.05147), which knows
    the token alone.

    Args:
        config, params, draft: as in `begin_chain`.
        chain: of these T rows.
        logits: float32 [B, T, V'].
        before: int [B, T], ids of the tokens before.

    Returns:
        float32 [B, T, V']; it differs at `chain.best`.
    """
    weights = weight_format(config, EMBED)
    table = _matrix(config, params, EMBED, weights.parts("embedding"))
    embedded = weights.look_up(table, before, config.dtype).astype(jnp.float32)
    normed = rms_norm(embedded, config.norm_eps)
    down = draft.chain["down"][embedded.shape[-1] :].astype(jnp.float32)
    features = jax.nn.silu(chain.features + _product(normed, down))
    moved = _product(features, draft.chain["up"].astype(jnp.float32))
    gain = jnp.sum(chain.weights * moved[:, :, None], axis=-1)
    at = (*jnp.indices(chain.best.shape, sparse=True)[:2], chain.best)
    return logits.at[at].add(gain)


def _product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    return jnp.matmul(x, matrix, precision=jax.lax.Precision.HIGHEST)


@under_usual_jax_settings
def untrained_draft(config: ModelConfig, params: Params) -> DraftParams:
    """The draft before any training: one mask embedding, the mean of the token embeddings."""
    mean = mean_embedding(config, params).astype(float_dtype(params))
    return DraftParams(mask_embeddings=mean[None])


@under_usual_jax_settings
def mean_embedding(config: ModelConfig, params: Params, power: int = 1) -> jax.Array:
    """The mean over all tokens of their embeddings, or of a power of each number: float32 [D]."""
    return _mean_embedding(config, params[EMBED], float_dtype(params), power)


@functools.partial(jax.jit, static_argnames=("config", "dtype", "power"))
def _mean_embedding(config: ModelConfig, embed: Params, dtype: jnp.dtype, power: int) -> jax.Array:
    # Part by part: the table is never in memory as float32.
    weights, size = weight_format(config, EMBED), config.vocab_size
    table, part = tuple(embed[name] for name in weights.parts("embedding")), min(_PART, size)

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        first = i * part
        at = jnp.minimum(first, size - part) + jnp.arange(part)  # the last parts overlap
        rows = weights.look_up(table, at, dtype).astype(jnp.float32) ** power
        return total + jnp.sum(rows, axis=0, where=(at >= first)[:, None])

    zero = jnp.zeros(config.hidden_size, jnp.float32)
    return jax.lax.fori_loop(0, -(-size // part), add, zero) / size
