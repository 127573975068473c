"""One row of a running state: taken out, and put in, so that a finished row makes room."""

from typing import Any

import jax

from s3d_jax.decoding.state import DecodeState
from s3d_jax.jax_settings import under_usual_jax_settings
from s3d_jax.nn.sharding import state_constrained


@under_usual_jax_settings
def take_row(state: DecodeState, row: jax.Array) -> DecodeState:
    """A state of one row, with a copy of what `state` holds of it.

    Args:
        state: of B rows, without a drafter's own state.
        row: int scalar.
    """
    own = state.replace(stop_ids=None)
    own = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1), own)
    return state_constrained(own.replace(stop_ids=state.stop_ids))


@under_usual_jax_settings
def put_row(state: DecodeState, row: jax.Array, new: DecodeState) -> DecodeState:
    """The state in which `row` is the row of `new`; the other rows are as they were.

    Args:
        state: of B rows, more than one; donated by `put_row_jit`.
        row: int scalar.
        new: of one row, with equal sizes (S, and the largest block) and equal `stop_ids`.
    """

    def put(old: jax.Array, one: jax.Array) -> jax.Array:
        if old.shape == one.shape:
            return old  # the rows share it
        return jax.lax.dynamic_update_slice_in_dim(old, one, row, 0)

    return state_constrained(jax.tree.map(put, state, new))


take_row_jit: Any = jax.jit(take_row)
put_row_jit: Any = jax.jit(put_row, donate_argnames="state")
