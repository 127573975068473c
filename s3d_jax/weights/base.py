"""The protocol of weight formats: how the matrices of a model are stored and multiplied."""

import math
from collections.abc import Callable
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

INIT_DEVIATION = 0.02  # of random weights
Arrays = tuple[jax.Array, ...]
Init = Callable[..., jax.Array]  # (key, shape, dtype) -> array


def num_bytes(tree: Any) -> int:
    """Bytes of arrays, or of their shapes, on a device: two int4 numbers share a byte there.

    Their own `nbytes` counts a byte for each.
    """
    leaves = jax.tree.leaves(tree)
    bits = sum(
        math.prod(x.shape) * (4 if x.dtype == jnp.int4 else 8 * x.dtype.itemsize) for x in leaves
    )
    return bits // 8


def widened_late(x: jax.Array, arrays: Arrays) -> tuple[jax.Array, Arrays]:
    """A product's operands, such that XLA widens the arrays when x is there, and not before.

    Otherwise it widens all weights once, in front of a decoding loop, and keeps them.
    """
    return jax.lax.optimization_barrier((x, arrays))


class WeightFormat(Protocol):
    """How a matrix [out, in] is stored, as one array or several, and what can be done with it.

    The arrays always come in the order of `parts`. Their types are the format's own business, and
    their shapes but for this: the first axis is the outputs, and the last one of several the inputs
    (`nn.sharding` divides both). One scale per output, scales per group of inputs, two values in a
    byte.

    Attributes:
        exact_sums: models in this format need sums that do not depend on the order (`exact`),
            unless their settings say otherwise.
        trainable: the matrices have gradients.
        takes_deltas: a small change of a matrix is not lost when the sum is stored.
    """

    exact_sums: bool
    trainable: bool
    takes_deltas: bool

    def parts(self, name: str) -> tuple[str, ...]:
        """Names of the arrays of the matrix `name` in the parameter tree; `name` is the first."""

    def declare(
        self, module: nn.Module, name: str, shape: tuple[int, int], dtype: str, init: Init
    ) -> Arrays:
        """The arrays of a matrix as parameters of a linen module.

        Args:
            module: gets the parameters `parts(name)`.
            name: "weight", or "embedding" for the table of token embeddings.
            shape: [out, in].
            dtype: the model's.
            init: draws a random float matrix. A format may draw its own, of INIT_DEVIATION.
        """

    def multiply(self, x: jax.Array, arrays: Arrays, out_dtype: Any) -> jax.Array:
        """`x @ matrix.T`, accumulated in float32 or wider: [..., in] -> [..., out]."""

    def look_up(self, arrays: Arrays, rows: jax.Array, dtype: Any) -> jax.Array:
        """Some rows of the matrix: int [...] -> [..., in] of the model's dtype."""

    def take_rows(self, arrays: Arrays, rows: jax.Array) -> Arrays:
        """The arrays of a matrix that has these rows alone; rows: int [R]."""

    def store(self, matrix: np.ndarray) -> tuple[np.ndarray, ...]:
        """Float [out, in] of any type -> the arrays.

        Raises:
            ValueError: the format cannot represent a number of the matrix.
        """

    def widen(self, arrays: Arrays, dtype: Any) -> jax.Array:
        """The arrays -> float [out, in]; numpy arrays give a numpy array."""

    def bound_by_memory(self, dtype: str, backend: str) -> bool:
        """Whether the backend multiplies a few rows in the time that it takes to read a weight."""
