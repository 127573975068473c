"""Which layers to skip: one set for each number of them.

"symmetric": the middle ones, as S3D does (arXiv 2405.20314). Costs nothing.
"band": the contiguous band with the most correct draft tokens. Judges about L²/2 sets.
"greedy": skips one more layer at a time, the one that leaves the most tokens correct. As many.
"dp": dynamic programming over (layer, layers skipped so far), as in CLaSp (Chen et al., arXiv
    2505.24196). A state is reached by skipping a layer or by running it; the one that is more
    similar to the target's own state after that layer is kept. One pass, as large as L drafts.

L is the number of layers. All but the first search use the draft, trained or not. They judge whole
draft passes at places of known texts (`Judge.score`).
"""

import functools
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from s3d_jax.errors import InputError
from s3d_jax.nn.attention import layout_after_anchors
from s3d_jax.nn.draft import DraftParams
from s3d_jax.nn.streams import text_cache
from s3d_jax.nn.transformer import bound
from s3d_jax.settings.drafting import DraftConfig, symmetric_skip
from s3d_jax.settings.model import ModelConfig
from s3d_jax.tune.acceptance import (
    MOST_BYTES,
    Judge,
    Skip,
    context_bytes,
    keeping_all,
    num_fitting,
)
from s3d_jax.weights.trees import Params

Search = Literal["symmetric", "band", "greedy", "dp"]
SEARCHES: tuple[Search, ...] = get_args(Search)

_STRIDE = 4  # judges every fourth place of a text
_DP_TEXTS, _DP_BLOCKS = 8, 8  # the sample on which "dp" compares states
_NOWHERE = -2.0  # less than any cosine


def search(kind: Search, judge: Judge, progress: Callable[[], None] = lambda: None) -> list[Skip]:
    """The best set of each size, from one skipped layer to all but one.

    Args:
        kind: the search.
        judge: counts the correct draft tokens of a set.
        progress: called for each set that was judged, `num_judged` times.

    Raises:
        InputError: "dp" would hold more than MOST_BYTES of keys and values.
    """
    layers = judge.lm.config.num_layers
    sizes = range(1, layers)

    def score(skip: Skip) -> float:
        progress()
        return judge.score(skip, _STRIDE)

    match kind:
        case "symmetric":
            return [symmetric_skip(layers, size) for size in sizes]
        case "band":
            return [max(_bands(layers, size), key=score) for size in sizes]
        case "greedy":
            best, skip = [], (False,) * layers
            for _ in sizes:
                larger = [(*skip[:i], True, *skip[i + 1 :]) for i in range(layers) if not skip[i]]
                skip = max(larger, key=score)
                best.append(skip)
            return best
        case "dp":
            return _by_states(judge)


def num_judged(kind: Search, layers: int) -> int:
    """How many sets `search` judges one by one."""
    return layers * (layers + 1) // 2 - 1 if kind in ("band", "greedy") else 0


def _bands(layers: int, size: int) -> list[Skip]:
    starts = range(layers - size + 1)
    return [tuple(first <= i < first + size for i in range(layers)) for first in starts]


def _by_states(judge: Judge) -> list[Skip]:
    lm, texts, layers = judge.lm, judge.texts, judge.lm.config.num_layers
    slots = texts.tokens.shape[1] + _DP_BLOCKS * judge.gamma
    count = min(_DP_TEXTS, num_fitting(lm, slots, 1 + layers))  # every state has a copy
    if count == 0:
        size = (1 + layers) * context_bytes(lm, slots) / 2**30
        raise InputError(
            f"the search dp would hold {size:.1f} GiB of keys and values, and at most "
            f"{MOST_BYTES / 2**30:.0f} are allowed: take another search (--search greedy), or "
            "shorter texts (--max-new-tokens)"
        )
    # Evenly from all texts and from all of their places.
    rows = np.unique(np.linspace(0, len(texts.lengths), count, endpoint=False).astype(int))
    tokens = texts.tokens[rows]
    first, last = (np.array(n)[rows] - 1 for n in (texts.prompt_lengths, texts.lengths))
    anchors = np.linspace(first, last, _DP_BLOCKS, endpoint=False, axis=1).astype(np.int32)
    chosen = _skipped_states(
        lm.config,
        keeping_all(lm.draft_config, judge.gamma),
        lm.params,
        lm.draft_params,
        tokens,
        anchors,
    )
    skipped = np.asarray(chosen)  # bool [L, J]
    best = []
    for size in range(1, layers):
        skip, left = [False] * layers, size
        for i in reversed(range(layers)):
            skip[i] = bool(skipped[i, left])
            left -= skip[i]
        best.append(tuple(skip))
    return best


@functools.partial(jax.jit, static_argnames=("config", "draft_config"))
def _skipped_states(
    config: ModelConfig,
    draft_config: DraftConfig,
    params: Params,
    draft: DraftParams,
    tokens: jax.Array,
    anchors: jax.Array,
) -> jax.Array:
    """Whether the best state after layer i with j layers skipped skips layer i: bool [L, L].

    The states of all j are rows of one batch. tokens: int [R, T]; anchors: int [R, A].
    """
    (rows, length), gamma = tokens.shape, draft_config.gamma
    states = config.num_layers  # one for each number of skipped layers
    cache = text_cache(config, params, tokens, length + anchors.shape[1] * gamma)
    model = bound(config, params)
    x, shared = model.begin(tokens, cache, visible=length)
    targets = []
    places = jnp.minimum(anchors[:, :, None] + jnp.arange(gamma), length - 1).reshape(rows, -1, 1)
    for i in range(config.num_layers):
        x, cache = model.layer(i, x, cache, shared)
        targets.append(jnp.take_along_axis(x, places, axis=1))

    def tiled(x: jax.Array) -> jax.Array:
        return jnp.tile(x, (states, *[1] * (x.ndim - 1)))

    model = bound(config, params, draft)
    bidirectional = draft_config.block_attention == "bidirectional"
    cache = jax.tree.map(tiled, cache)
    x, shared = model.begin(
        tiled(jnp.take_along_axis(tokens, anchors, axis=1)),
        cache,
        draft=draft,
        num_masks=gamma - 1,
        layout=layout_after_anchors(tiled(anchors), gamma, length, bidirectional),
    )
    likeness = jnp.where(jnp.arange(states) == 0, 1.0, _NOWHERE)  # none is skipped yet
    over_gap = jnp.zeros(states, bool)
    choices = []
    for i, target in enumerate(targets):
        by_state = (states, *target.shape)
        wide = jnp.repeat(over_gap, rows)[:, None, None]
        kept, cache = model.layer(i, model.cross(i, x, wide, shared), cache, shared)
        kept, over = kept.reshape(by_state), jnp.roll(x.reshape(by_state), 1, axis=0)
        exists = likeness > _NOWHERE
        from_kept = jnp.where(exists, _cosine(kept, target), _NOWHERE)
        fewer = jnp.roll(exists, 1).at[0].set(False)  # the state with one layer less skipped
        from_over = jnp.where(fewer, _cosine(over, target), _NOWHERE)
        over_gap = from_over > from_kept
        likeness = jnp.maximum(from_over, from_kept)
        choices.append(over_gap)
        x = jnp.where(over_gap[:, None, None, None], over, kept).reshape(x.shape)
    return jnp.stack(choices)


def _cosine(states: jax.Array, target: jax.Array) -> jax.Array:
    """Mean over all tokens, [J]; states: [J, R, T, D], target: [R, T, D]."""
    a, b = states.astype(jnp.float32), target.astype(jnp.float32)
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return jnp.mean(jnp.sum(a * b, axis=-1) / jnp.maximum(norms, 1e-30), axis=(1, 2))
