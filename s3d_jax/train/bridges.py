"""Drafts that begin by least squares: bridges as the best linear stand-in for their gap.

A least-squares fit over a few hundred rows takes a minute, and gives a draft that training by
gradients would need many hundred steps for.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from s3d_jax.keys import make_key
from s3d_jax.machine import check_memory
from s3d_jax.mesh import mesh_of, on_mesh
from s3d_jax.nn.draft import DraftParams, bridge_name, untrained_draft
from s3d_jax.nn.features import eagle_targets
from s3d_jax.nn.sharding import in_memory, on_host, place_draft
from s3d_jax.nn.streams import gap_streams
from s3d_jax.settings.drafting import DraftConfig
from s3d_jax.settings.model import ModelConfig
from s3d_jax.settings.training import AdapterConfig
from s3d_jax.train.objective import block_targets, random_anchors
from s3d_jax.weights.trees import Params

_ANCHORS = 64  # of a row
_MASK_WEIGHT = 0.3  # of a block's next position, against the one before
_RIDGE = 1e-3  # of the mean square of the inputs


def gaps(skip: tuple[bool, ...]) -> list[int]:
    """The layers after gaps of skipped layers; L is the head."""
    ends = [*skip, False]
    return [i for i in range(1, len(ends)) if ends[i - 1] and not ends[i]]


def fitted_draft(
    config: ModelConfig,
    params: Params,
    draft_config: DraftConfig,
    adapter: AdapterConfig,
    batches: Callable[[int], Mapping[str, np.ndarray]],
    count: int,
    *,
    start: DraftParams | None = None,
    seed: int = 0,
    progress: bool = False,
) -> DraftParams:
    """A draft with bridges that are fitted to data, one gap after the other.

    Args:
        config, params, draft_config: the target and the draft.
        adapter: bridge_rank and recall.
        batches: number -> {"tokens": int32 [B, T], "learn": bool [B, T]}.
        count: how many batches are used.
        start: a draft without bridges that gets them, with arrays as in files; None is the
            untrained one.
        seed: of the anchors.
        progress: show a bar.

    Raises:
        DeviceError: the matrices of the regression do not fit into memory.
    """
    from tqdm import tqdm

    inputs = config.hidden_size + adapter.recall * config.num_kv_heads * config.head_dim
    _check_memory(inputs, "recall fewer layers (--recall), or leave out --fit-rows")
    mesh = mesh_of(params)
    draft = start or untrained_draft(config, params)
    for after in gaps(draft_config.skip):
        squares, products = np.zeros(()), np.zeros(())
        placed = place_draft(mesh, config, in_memory(config, draft, over_data=False))
        for i in tqdm(range(count), "fitting", unit=" batches", disable=not progress):
            key = jax.random.fold_in(make_key(seed), i)
            static = config, draft_config, after, adapter.recall
            with on_mesh(mesh):
                sums = on_host(_sums(*static, params, placed, batches(i), key))
            squares = squares + sums[0].astype(np.float64)
            products = products + sums[1].astype(np.float64)
        factors = linear_factors(squares, products, adapter.bridge_rank)
        name = bridge_name(after, config.num_layers)
        draft = draft.replace(bridges={**draft.bridges, name: factors})
    return draft if mesh is None else on_host(draft)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _sums(
    config: ModelConfig,
    draft_config: DraftConfig,
    after: int,
    recalls: int,
    params: Params,
    draft: DraftParams,
    batch: Mapping[str, jax.Array],
    key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Of one batch: Σ w·xᵀx [K, K] and Σ w·xᵀy [K, D] of a bridge's inputs x and wanted outputs y.

    The draft's bridges before the gap are in place, the one over it is not.
    """
    tokens, learn = batch["tokens"], batch["learn"]
    count = min(_ANCHORS, tokens.shape[1] - 1)
    anchors = random_anchors(key, learn, count)
    _, _, weights = block_targets(tokens, learn, anchors, draft_config.gamma, _MASK_WEIGHT)
    x, y = gap_streams(config, params, draft_config, draft, tokens, anchors, after, recalls)
    root = jnp.sqrt(weights)[..., None]
    x, y = ((a.astype(jnp.float32) * root).reshape(-1, a.shape[-1]) for a in (x, y))
    return _exact(x.T, x), _exact(x.T, y)


def _check_memory(inputs: int, advice: str) -> None:
    check_memory(
        5 * 8 * inputs**2,  # the sum, a batch's part, and what the solver takes, in float64
        f"a fit with {inputs:,} inputs needs",
        advice,
    )


def fitted_fuse(
    config: ModelConfig,
    params: Params,
    batches: Callable[[int], Mapping[str, np.ndarray]],
    count: int,
    *,
    progress: bool = False,
) -> np.ndarray:
    """The matrix that joins hidden state and token for EAGLE's layer: float32 [D, 2·D].

    By least squares it gives the layer, which begins as a copy of the target's last one, what that
    one is given.

    Args:
        config, params: the target.
        batches, count, progress: as in `fitted_draft`.

    Raises:
        DeviceError: the matrices of the regression do not fit into memory.
    """
    from tqdm import tqdm

    _check_memory(2 * config.hidden_size, "leave out --fit-rows")
    squares, products = np.zeros(()), np.zeros(())
    for i in tqdm(range(count), "fitting", unit=" batches", disable=not progress):
        sums = jax.device_get(_sums_of_fuse(config, params, batches(i)))
        squares = squares + sums[0].astype(np.float64)
        products = products + sums[1].astype(np.float64)
    return _solution(squares, products).T.astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def _sums_of_fuse(
    config: ModelConfig, params: Params, batch: Mapping[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Of one batch: Σ xᵀx [2·D, 2·D] and Σ xᵀy [2·D, D] over the tokens that are learnt."""
    learnt = batch["learn"][..., None]
    pairs = eagle_targets(config, params, batch["tokens"])
    x, y = (jnp.where(learnt, a.astype(jnp.float32), 0).reshape(-1, a.shape[-1]) for a in pairs)
    return _exact(x.T, x), _exact(x.T, y)


def _solution(squares: np.ndarray, products: np.ndarray) -> np.ndarray:
    """Of the ridge regression, float64 [K, D]."""
    ridge = max(_RIDGE * np.trace(squares) / len(squares), 1e-30)
    return np.linalg.solve(squares + ridge * np.eye(len(squares)), products)


_exact = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def linear_factors(squares: np.ndarray, products: np.ndarray, rank: int) -> dict[str, jax.Array]:
    """A bridge that computes the best linear function of its inputs, as far as its rank allows.

    Ridge regression of reduced rank (Izenman 1975): of the fitted outputs the directions of most
    variance are kept. The bridge's activation is silu, and silu(z) - silu(-z) = z. So two of its
    features make one linear one.

    Args:
        squares: Σ xᵀx, float64 [K, K].
        products: Σ xᵀy, float64 [K, D].
        rank: of the bridge.

    Returns:
        {"down": [K, r], "up": [r, D]}, float32, of r ≤ rank features: an even number, 2·D at most.
    """
    solution = _solution(squares, products)
    variances, directions = np.linalg.eigh(solution.T @ squares @ solution)
    kept = directions[:, ::-1][:, : rank // 2]
    # Features of about one in size, which training changes at the pace of other drafts.
    count = max(np.trace(squares) / len(squares), 1e-30)
    sizes = np.sqrt(np.maximum(variances[::-1][: rank // 2], 0) / count) + 1e-6
    down, up = solution @ kept / sizes, (kept * sizes).T
    down, up = np.concatenate([down, -down], axis=1), np.concatenate([up, -up])
    return {"down": jnp.asarray(down, jnp.float32), "up": jnp.asarray(up, jnp.float32)}
