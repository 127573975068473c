"""Whether to draft at all: γ draft tokens or none, as it pays on the text at hand.

Each row decides for itself, from what its passes cost (`PassCosts`) and from what was accepted
before, never from the draft that is to be judged. So a row's output does not depend on its
neighbours, and under sampling it stays that of the target. docs/log says why there are
no lengths between.
"""

import flax.struct
import jax
import jax.numpy as jnp

_CAPACITY = 12.0  # steps of plain decoding that a row may lose before it drafts no more
_FIRST_PAUSE, _LONGEST_PAUSE = 8, 128  # iterations; powers of two, so that pauses end together


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


def settle(
    cost: float, budget: Budget, drafted: jax.Array, accepted: jax.Array, done: jax.Array
) -> Budget:
    """The budget behind an iteration.

    Args:
        cost: of an iteration with a draft, in steps of plain decoding.
        budget: before it.
        drafted: bool [B], rows that drafted in it.
        accepted: int32 [B], their draft tokens that stood.
        done: bool [B], rows that only waited for the others; theirs stays as it is, since one that
            waits at its turning point (LongRoPE) goes on later.
    """
    gained = jnp.where(drafted, accepted + 1 - cost, 0.0)
    steps = jnp.clip(budget.steps + gained, 0.0, _CAPACITY)
    longer = jnp.where(drafted & (steps == 0), 2 * budget.pause, budget.pause)
    settled = Budget(
        steps=steps,
        iterations=budget.iterations + 1,
        pause=jnp.where(steps == _CAPACITY, _FIRST_PAUSE, jnp.minimum(longer, _LONGEST_PAUSE)),
    )
    return jax.tree.map(lambda old, new: jnp.where(done, old, new), budget, settled)
