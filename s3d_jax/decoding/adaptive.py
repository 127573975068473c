"""Adaptive drafting: a row drafts γ tokens or none, whichever pays on its text.

Each row decides for itself, by what an iteration with a draft costs and how much was accepted in
earlier iterations. Its output does not depend on that. docs/log/ says why a row drafts either γ
tokens or none.
"""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

_CAPACITY = 12.0  # steps of plain decoding that a row may lose before it drafts no more
_FIRST_PAUSE, _LONGEST_PAUSE = 8, 128  # iterations; powers of two, so that pauses end together
BY_BUDGET, NEVER, ALWAYS = range(3)  # whether rows draft (or copy)


class Budget(flax.struct.PyTreeNode):
    """What each row may still spend on drafts: a token bucket.

    Plain decoding gives one token per step. An iteration with a draft pass that commits t tokens
    and costs c steps gains t - c steps. Gains fill the budget up to `_CAPACITY`, losses empty it. A
    row with an empty budget decodes plainly, and drafts only now and then to see whether the text
    has changed, at intervals that double. So compared with plain decoding a row loses at most the
    capacity and these attempts.

    Attributes:
        steps: float32 [B], 0 … _CAPACITY.
        iterations: int32 [B], so far.
        pause: int32 [B], iterations between two attempts.
        cost: float32 [B], of an iteration with a draft, in steps of plain decoding.
        mode: int32 [B], BY_BUDGET, or NEVER or ALWAYS while costs are measured.
    """

    steps: jax.Array
    iterations: jax.Array
    pause: jax.Array
    cost: jax.Array
    mode: jax.Array

    @property
    def attempting_rows(self) -> jax.Array:
        """Rows with an empty budget that draft in the next iteration all the same, bool [B]."""
        due = (self.steps <= 0) & (self.iterations % self.pause == 0)
        return due & (self.mode == BY_BUDGET)

    @property
    def drafting_rows(self) -> jax.Array:
        """Rows that draft in the next iteration, bool [B].

        Attempts come where `iterations` is a multiple of the pause, so in all rows of a batch at
        once: a draft pass costs the same for one row and for all.
        """
        by_budget = (self.steps > 0) | (self.iterations % self.pause == 0)
        return (by_budget | (self.mode == ALWAYS)) & (self.mode != NEVER)


def new_budget(
    batch: int, cost: float, *, steps: Sequence[float] | None = None, pause: int = _FIRST_PAUSE
) -> Budget:
    """The budget of `batch` rows before decoding.

    Args:
        batch: B.
        cost: of an iteration with a draft, in steps of plain decoding.
        steps: that each row may lose at first, [B]; None is all that a budget can hold. A row with
            none drafts for the first time after a pause.
        pause: the first, a power of two.
    """
    # Made by numpy, which compiles nothing for another number of rows.
    held = np.full(batch, _CAPACITY, np.float32)
    if steps is not None:
        held = np.minimum(np.asarray(steps, np.float32), held)
    arrays = (
        held,
        (held == 0).astype(np.int32),
        np.full(batch, pause, np.int32),
        np.full(batch, cost, np.float32),
        np.full(batch, BY_BUDGET, np.int32),
    )
    return Budget(*jax.device_put(arrays))


def settle(budget: Budget, drafted: jax.Array, accepted: jax.Array, done: jax.Array) -> Budget:
    """The budget after an iteration.

    Args:
        budget: before it.
        drafted: bool [B], rows that drafted in it.
        accepted: int32 [B], their accepted draft tokens.
        done: bool [B], rows that only waited for the others; their budget stays as it is, since a
            row that waits at its turning point (LongRoPE) continues later.
    """
    counts = drafted & (budget.mode == BY_BUDGET)  # measuring costs is not the row's choice
    gained = jnp.where(counts, accepted + 1 - budget.cost, 0.0)
    steps = jnp.clip(budget.steps + gained, 0.0, _CAPACITY)
    longer = jnp.where(counts & (steps == 0), 2 * budget.pause, budget.pause)
    longest = jnp.maximum(budget.pause, _LONGEST_PAUSE)
    pause = jnp.where(steps == _CAPACITY, _FIRST_PAUSE, jnp.minimum(longer, longest))
    settled = budget.replace(steps=steps, iterations=budget.iterations + 1, pause=pause)
    return jax.tree.map(lambda old, new: jnp.where(done, old, new), budget, settled)
