"""Which layers to skip: one set for each number of them.

"symmetric": the middle ones, as S3D does (arXiv 2405.20314). Costs nothing.
"band": the contiguous band that gets most tokens right. About L²/2 sets are judged.
"greedy": from none on, always the layer without which the draft still gets most right. As many.
"dp": dynamic programming over (layer, layers skipped so far), as in CLaSp (Chen et al., arXiv
    2505.24196): of the two ways to come there, by skipping this layer or by running it, the state
    that is more like the target's own behind that layer goes on. One pass, as large as L drafts.

L is the number of layers. All but the first know the draft, trained or not. What is judged is
always a whole draft pass at places of known texts (`Judge.score`).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from s3d_jax.errors import InputError
from s3d_jax.nn.transformer import Block, DraftParams, Params
from s3d_jax.settings.drafting import DraftConfig, symmetric_skip
from s3d_jax.settings.model import ModelConfig
from s3d_jax.train.objective import draft_stream, target_stream
from s3d_jax.tune.acceptance import (
    MOST_BYTES,
    Interceptor,
    Judge,
    Skip,
    bridged,
    context_bytes,
    keeping_all,
    layer_of,
    num_fitting,
)

Search = Literal["symmetric", "band", "greedy", "dp"]
SEARCHES: tuple[Search, ...] = get_args(Search)

_STRIDE = 4  # of the places of a text, every fourth is judged
_DP_TEXTS, _DP_BLOCKS = 8, 8  # what the states of "dp" are compared on
_NOWHERE = -2.0  # less than any cosine


def search(kind: Search, judge: Judge, progress: Callable[[], None] = lambda: None) -> list[Skip]:
    """The best set of each size, from one skipped layer to all but one.

    Args:
        kind: how to look for them.
        judge: who knows what a draft gets right.
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
    first, behind = (np.array(n)[rows] - 1 for n in (texts.prompt_lengths, texts.lengths))
    anchors = np.linspace(first, behind, _DP_BLOCKS, endpoint=False, axis=1).astype(np.int32)
    chosen = _skipped_states(
        *(lm.config, keeping_all(lm.draft_config, judge.gamma)),
        *(lm.params, lm.draft_params, tokens, anchors),
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
    """Whether the best state behind layer i with j layers skipped skips layer i: bool [L, L].

    The states of all j are rows of one batch. tokens: int [R, T]; anchors: int [R, A].
    """
    rows, length = tokens.shape
    layers, gamma = config.num_layers, draft_config.gamma
    targets: list[jax.Array] = []
    with nn.intercept_methods(_recording(targets)):
        block = anchors.shape[1] * gamma
        _, cache = target_stream(config, params, tokens, length + block, compute_logits=False)
    places = jnp.minimum(anchors[:, :, None] + jnp.arange(gamma), length - 1).reshape(rows, -1, 1)
    targets = [jnp.take_along_axis(x, places, axis=1) for x in targets]

    def tiled(x: jax.Array) -> jax.Array:
        return jnp.tile(x, (layers, *[1] * (x.ndim - 1)))

    choices: list[jax.Array] = []
    with nn.intercept_methods(_choosing(choices, targets, draft.bridges, config.norm_eps)):
        copies = jax.tree.map(tiled, cache)
        draft_stream(config, params, draft_config, draft, tiled(tokens), tiled(anchors), copies)
    return jnp.stack(choices)


def _recording(states: list[jax.Array]) -> Interceptor:
    """Keeps what comes out of each layer."""

    def intercept(next_fun: Interceptor, args: Any, kwargs: Any, context: Any) -> Any:
        out = next_fun(*args, **kwargs)
        if isinstance(context.module, Block) and layer_of(context) is not None:
            states.append(out[0])
        return out

    return intercept


def _choosing(
    choices: list[jax.Array],
    targets: list[jax.Array],
    bridges: Mapping[str, Any],
    eps: float,
) -> Interceptor:
    """Turns a pass through all layers into the search: see `_skipped_states`.

    Args:
        choices: gets bool [J] of each layer.
        targets: what the states should be, [R, T, D] behind each layer.
        bridges, eps: as in `bridged`.
    """
    likeness = gap = jnp.zeros(0)

    def intercept(next_fun: Interceptor, args: Any, kwargs: Any, context: Any) -> Any:
        nonlocal likeness, gap
        i = layer_of(context)
        if i is None or not isinstance(context.module, Block):
            return next_fun(*args, **kwargs)
        x, *rest = args
        rows = targets[i].shape[0]
        states = x.shape[0] // rows
        if i == 0:  # nothing is skipped yet, so only that state exists
            likeness = jnp.where(jnp.arange(states) == 0, 1.0, _NOWHERE)
            gap = jnp.zeros(states, bool)
        wide = jnp.repeat(gap, rows)[:, None, None]
        kept, keys, values = next_fun(
            bridged(x, wide, bridges, context.module.name, eps), *rest, **kwargs
        )
        by_state = (states, *targets[i].shape)
        kept, over = kept.reshape(by_state), jnp.roll(x.reshape(by_state), 1, axis=0)
        exists = likeness > _NOWHERE
        from_kept = jnp.where(exists, _cosine(kept, targets[i]), _NOWHERE)
        fewer = jnp.roll(exists, 1).at[0].set(False)  # the state with one layer less skipped
        from_over = jnp.where(fewer, _cosine(over, targets[i]), _NOWHERE)
        gap = from_over > from_kept
        likeness = jnp.maximum(from_over, from_kept)
        choices.append(gap)
        x = jnp.where(gap[:, None, None, None], over, kept).reshape(x.shape)
        return x, keys, values

    return intercept


def _cosine(states: jax.Array, target: jax.Array) -> jax.Array:
    """Mean over all tokens, [J]; states: [J, R, T, D], target: [R, T, D]."""
    a, b = states.astype(jnp.float32), target.astype(jnp.float32)
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return jnp.mean(jnp.sum(a * b, axis=-1) / jnp.maximum(norms, 1e-30), axis=(1, 2))
