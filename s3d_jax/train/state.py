"""The state of a training run: everything that a step changes."""

from typing import Any

import flax.struct
import jax


class TrainState(flax.struct.PyTreeNode):
    """Everything that a step changes.

    Attributes:
        step: int32 [], updates so far.
        tree: the trained arrays.
        average: their running average; () without one.
        optimizer: the state of optax.
        running: float32 [5], what divergence is recognized by: the running loss; the mean distance
            of single losses from it; the lowest running loss, and that distance at the time; and
            the first running loss.
    """

    step: jax.Array
    tree: Any
    average: Any
    optimizer: Any
    running: jax.Array

    @property
    def result(self) -> Any:
        """The tree that is validated and kept."""
        return self.tree if self.average == () else self.average
