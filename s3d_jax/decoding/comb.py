"""A comb: leaves beside the draft tokens, verified in the same pass.

A leaf is another candidate for the place of a draft token. The block of a verify pass is x_n, the γ
draft tokens, then the leaves, each of which sees what the draft token of its place sees. Where the
target refuses a draft token and a leaf of that place is its own choice, the leaf is committed
instead, with the target's token after it: one token more. So an iteration commits one leaf at most.

SpecInfer (Miao et al., arXiv 2305.09781) and Medusa (Cai et al., arXiv 2401.10774) verify whole
trees. A comb is the tree whose branches are one token long.
"""

import jax
import jax.numpy as jnp
import numpy as np

from s3d_jax.decoding.sampling import accept


def leaf_depths(leaves: tuple[int, ...]) -> tuple[int, ...]:
    """The place of each leaf, from 1, of the number at each place: (2, 1) -> (1, 1, 2)."""
    return tuple(i for i, count in enumerate(leaves, start=1) for _ in range(count))


def row_depths(gamma: int, depths: tuple[int, ...]) -> np.ndarray:
    """The place of each row of the block, x_n's being 0: int [γ+1+k]."""
    return np.concatenate([np.arange(gamma + 1), np.array(depths, int)])


def accept_comb(
    proposed_tokens: jax.Array,
    target: jax.Array,
    depths: tuple[int, ...],
    proposing_rows: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The longest branch of the comb that the target chose itself.

    Args:
        proposed_tokens: int [B, γ+k], the draft tokens, then the leaves.
        target: int [B, γ+1+k], the target's choice after each row of the block.
        depths: of the leaves.
        proposing_rows: bool [B], rows that use the proposal; the others take one target token. None
            is all.

    Returns:
        (accepted, bonus, path): as of `accept`, a leaf counting as an accepted token; and int32
        [B, γ+1], the row of the block that holds each committed token, x_n first; anything after
        the accepted ones.
    """
    gamma = proposed_tokens.shape[1] - len(depths)
    tokens, leaves = proposed_tokens[:, :gamma], proposed_tokens[:, gamma:]
    accepted, bonus = accept(tokens, target[:, : gamma + 1], proposing_rows)
    hits = (leaves == bonus[:, None]) & (np.array(depths) == accepted[:, None] + 1)
    if proposing_rows is not None:
        hits &= proposing_rows[:, None]
    found = jnp.any(hits, axis=1)
    leaf = gamma + 1 + jnp.argmax(hits, axis=1).astype(jnp.int32)
    accepted += found
    column = jnp.arange(gamma + 1, dtype=jnp.int32)
    at_leaf = found[:, None] & (column == accepted[:, None])
    path = jnp.where(at_leaf, leaf[:, None], column)
    last = jnp.take_along_axis(path, accepted[:, None], axis=1)
    bonus = jnp.take_along_axis(target, last, axis=1)[:, 0]
    return accepted, bonus, path
