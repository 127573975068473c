"""Dynamic draft length: how many draft tokens are worth verifying, and whether to draft at all.

Both are decided by each row for itself, from what its passes cost (`PassCosts`), and never from the
draft tokens that were drawn: from the draft's distributions and from what was accepted before. So a
row's output does not depend on its neighbours, and under sampling it stays that of the target.
"""

import flax.struct
import jax
import jax.numpy as jnp

from s3d_jax.config import PassCosts

_CAPACITY = 8.0  # steps of plain decoding that a row may lose before it drafts no more
_FIRST_PAUSE, _LONGEST_PAUSE = 8, 128  # iterations; powers of two, so that pauses end together
_CALIBRATION = 0.7  # chance of acceptance ≈ confidence ** 0.7; docs/performance.md


class Budget(flax.struct.PyTreeNode):
    """What each row has left to spend on drafts, in the manner of a token bucket.

    An iteration with a draft pass that commits t tokens and costs c steps of plain decoding, which
    gives a token per step, has gained t - c steps. The gains fill the budget up to `_CAPACITY`, the
    losses empty it. A row whose budget is empty decodes plainly, and drafts only now and then to
    see whether the text has changed, at intervals that double. So against plain decoding it loses
    no more than the capacity and those attempts, and it never loses more of what it has gained.

    Attributes:
        steps: float32 [B], 0 … _CAPACITY.
        iterations: int32 [B], played so far.
        pause: int32 [B], iterations between two attempts.
    """

    steps: jax.Array
    iterations: jax.Array
    pause: jax.Array

    @property
    def drafts(self) -> jax.Array:
        """Rows that draft in the next iteration, bool [B].

        An attempt comes where `iterations` is a multiple of the pause, that is in all rows of a
        batch at once: a draft pass is paid for all of them.
        """
        return (self.steps > 0) | (self.iterations % self.pause == 0)


def full_budget(batch: int) -> Budget:
    """That of `batch` rows that have not decoded yet."""
    return Budget(
        steps=jnp.full((batch,), _CAPACITY, jnp.float32),
        iterations=jnp.zeros((batch,), jnp.int32),
        pause=jnp.full((batch,), _FIRST_PAUSE, jnp.int32),
    )


def settle(costs: PassCosts, budget: Budget, width: jax.Array, accepted: jax.Array) -> Budget:
    """The budget behind an iteration.

    Args:
        costs: of the passes.
        budget: before it.
        width: int32 [B], draft tokens that were verified; 0 where a row did not draft.
        accepted: int32 [B], of these.
    """
    cost = costs.draft + jnp.asarray(costs.verify, jnp.float32)[width]
    gained = jnp.where(width > 0, accepted + 1 - cost, 0.0)
    steps = jnp.clip(budget.steps + gained, 0.0, _CAPACITY)
    longer = jnp.where((width > 0) & (steps == 0), 2 * budget.pause, budget.pause)
    return Budget(
        steps=steps,
        iterations=budget.iterations + 1,
        pause=jnp.where(steps == _CAPACITY, _FIRST_PAUSE, jnp.minimum(longer, _LONGEST_PAUSE)),
    )


def widths(costs: PassCosts) -> tuple[int, ...]:
    """The numbers of draft tokens that a program can verify: γ, and half of it where that saves."""
    gamma = len(costs.verify) - 1
    half = gamma // 2
    return (half, gamma) if half and costs.verify[half] < costs.verify[gamma] else (gamma,)


def best_width(costs: PassCosts, confidence: jax.Array) -> jax.Array:
    """Which of `widths` promises most tokens per cost, int32 [B].

    Args:
        costs: of the passes.
        confidence: float32 [B, γ], the draft's own probability of its likeliest token.
    """
    chance = jnp.cumprod(confidence**_CALIBRATION, axis=1)
    choices = widths(costs)
    rates = [(1 + jnp.sum(chance[:, :w], axis=1)) / costs.iteration(w) for w in choices]
    return jnp.asarray(choices, jnp.int32)[jnp.argmax(jnp.stack(rates, axis=1), axis=1)]
