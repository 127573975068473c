"""int4 weights: int8 weights of which each group of inputs has only 16 values.

A matrix is rotated and becomes int8, as in `int8`. Each group of 32 numbers of a row is a factor
from -15 to 15 times numbers from -8 to 7, so that their product is between -120 and 120. Stored are
the numbers, int4 [out, in], the factors, int8 [out, groups], and a scale for each output,
float32 [out]: 4.25 bits for each weight. docs/log has the measurements for the choices made here.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from s3d_jax.weights.base import INIT_DEVIATION, Arrays, Init, widened_late
from s3d_jax.weights.int8 import AT_ONCE, Int8, finite_rows, multiply
from s3d_jax.weights.rotation import block_of, rotate

_GROUP = 32
_LEAST, _MOST = -8, 7  # of a number
_LARGEST_FACTOR = 15
_FULL = 7.5  # the largest of a group is at first made this, which rounds to 8
_TRIED = range(-3, 3)  # what is added to the factor that makes it so; smaller ones cut the largest


class Int4:
    """The format "int4" of the layers' matrices: see `WeightFormat`."""

    exact_sums = True
    trainable = False
    takes_deltas = False
    _int8 = Int8(rotated=True)

    def parts(self, name: str) -> tuple[str, ...]:
        return name, "factors", "scale"

    def declare(
        self, module: nn.Module, name: str, shape: tuple[int, int], dtype: str, init: Init
    ) -> Arrays:
        def random(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
            return jax.random.randint(key, shape, _LEAST, _MOST + 1, jnp.int8).astype(jnp.int4)

        outputs, inputs = shape
        name, factors_name, scale_name = self.parts(name)
        factor = 12  # about the middle of what trained matrices have
        numbers = np.arange(_LEAST, _MOST + 1)
        deviation = factor * numbers.std() * block_of(inputs) ** 0.5
        scale = nn.initializers.constant(INIT_DEVIATION / deviation)
        factors = nn.initializers.constant(factor)
        return (
            module.param(name, random, shape),
            module.param(factors_name, factors, (outputs, inputs // group_of(inputs)), jnp.int8),
            module.param(scale_name, scale, (outputs,), jnp.float32),
        )

    def multiply(self, x: jax.Array, arrays: Arrays, out_dtype: Any) -> jax.Array:
        x, arrays = widened_late(x, arrays)
        return multiply(x, *self.as_int8(arrays), out_dtype, True)

    def look_up(self, arrays: Arrays, rows: jax.Array, dtype: Any) -> jax.Array:
        return self.widen(self.take_rows(arrays, rows), dtype)

    def take_rows(self, arrays: Arrays, rows: jax.Array) -> Arrays:
        return tuple(array[rows] for array in arrays)

    def store(self, matrix: np.ndarray) -> tuple[np.ndarray, ...]:
        return quantize(matrix)

    def widen(self, arrays: Arrays, dtype: Any) -> jax.Array:
        return self._int8.widen(self.as_int8(arrays), dtype)

    def bound_by_memory(self, dtype: str, backend: str) -> bool:
        return backend != "cpu"

    def as_int8(self, arrays: Arrays) -> Arrays:
        """The same matrix in the format "int8", exactly; numpy arrays give numpy arrays."""
        numbers, factors, scale = arrays
        groups = numbers.astype(np.int8).reshape(*factors.shape, -1) * factors[..., None]
        return groups.reshape(numbers.shape), scale


def group_of(inputs: int) -> int:
    """Inputs in a group: 32, or the largest power of two that divides their number."""
    return min(inputs & -inputs, _GROUP)


def quantize(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A matrix in int4. Of each group's factors the one with the least error is taken.

    Args:
        matrix: [out, in], of a float type; in is even.

    Returns:
        (int4 [out, in], int8 [out, groups], float32 [out]), as the module says. Rows whose step
        would be below float32's normal numbers (1e-38) become 0.

    Raises:
        ValueError: it holds infinities or NaN, or in is odd.
    """
    outputs, inputs = matrix.shape
    if inputs % 2:
        raise ValueError(f"a matrix has {inputs} inputs, and int4 needs an even number")
    group = group_of(inputs)
    numbers = np.empty(matrix.shape, jnp.int4)
    factors = np.empty((outputs, inputs // group), np.int8)
    scale = np.empty(outputs, np.float32)
    rows = max(1, AT_ONCE // inputs)
    for start in range(0, outputs, rows):
        here = slice(start, start + rows)
        part = rotate(finite_rows(matrix[here], "int4") / np.float32(block_of(inputs)))
        groups = part.reshape(len(part), -1, group)
        largest = np.max(np.abs(groups), axis=(1, 2))
        step = largest / np.float32(_FULL * _LARGEST_FACTOR)
        step = np.where(step < np.finfo(np.float32).tiny, np.float32(1), step)
        found, factors[here] = _best_factors(groups / step[:, None, None])
        numbers[here] = found.reshape(part.shape).astype(jnp.int4)
        scale[here] = step
    return numbers, factors, scale


def _best_factors(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers [R, G, group] and factors [R, G] whose products come near float32 [R, G, group]."""
    at = np.argmax(np.abs(groups), axis=-1)[..., None]
    extreme = np.take_along_axis(groups, at, axis=-1)
    sign = np.where(extreme > 0, np.float32(-1), np.float32(1))  # the extreme becomes negative: -8
    full = np.rint(np.abs(extreme) / np.float32(_FULL))
    best = np.zeros_like(groups)
    factors, least = np.ones_like(extreme), np.full_like(extreme, np.inf)
    for change in _TRIED:
        factor = sign * np.clip(full + np.float32(change), 1, _LARGEST_FACTOR)
        numbers = np.clip(np.rint(groups / factor), _LEAST, _MOST)
        error = np.sum(np.square(numbers * factor - groups), axis=-1, keepdims=True)
        better = error < least
        best = np.where(better, numbers, best)
        factors, least = np.where(better, factor, factors), np.where(better, error, least)
    return best, factors[..., 0]
