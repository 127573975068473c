"""Groups of numbers with a scale of their own, as the blocks of a GGUF file hold them.

A group of a row is scale · number, or scale · number + offset, with integers of 4 or 8 bits. What
llama.cpp's dequantisers compute from a file is computed here from the same integers and scales, so
that no weight is rounded a second time. Activations are floats.
"""

import dataclasses
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from s3d_jax.errors import ConfigError
from s3d_jax.weights import dense
from s3d_jax.weights.base import INIT_DEVIATION, Arrays, Init, widened_late

_MIDDLE = 8  # 4-bit numbers with an offset are 0 to 15; what is stored is this less


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The format of one matrix in a model of the format "blocks": see `WeightFormat`.

    Attributes:
        bits: of a number, 4 or 8.
        group: inputs in a group.
        scale: the type of scales and offsets, "float16" or "float32".
        offset: whether groups have offsets. Numbers of 4 bits then count from 0, else from -8.
    """

    bits: int = 4
    group: int = 32
    scale: str = "float16"
    offset: bool = False

    exact_sums = False
    trainable = False
    takes_deltas = False

    def __str__(self) -> str:
        """The kind as a config names it: "4x32:float16+offset"."""
        return f"{self.bits}x{self.group}:{self.scale}" + "+offset" * self.offset

    @classmethod
    def parse(cls, text: str) -> Self:
        """The kind that `str` names.

        Raises:
            ValueError: there is none.
        """
        sizes, _, rest = text.partition(":")
        scale, plus, offset = rest.partition("+")
        bits, _, group = sizes.partition("x")
        known = bits in ("4", "8") and group.isdecimal() and int(group) > 0
        if not known or scale not in ("float16", "float32") or plus + offset not in ("", "+offset"):
            raise ValueError(f"no kind of blocks: {text!r:.80}")
        return cls(int(bits), int(group), scale, bool(offset))

    def joined(self, other: Self) -> Self:
        """The least kind that holds matrices of both."""
        return dataclasses.replace(
            self,
            bits=max(self.bits, other.bits),
            group=min(self.group, other.group),
            scale=max(self.scale, other.scale),
            offset=self.offset or other.offset,
        )

    def in_bytes(self) -> Self:
        """The kind that holds the same groups in numbers of 8 bits."""
        return dataclasses.replace(self, bits=8)

    def parts(self, name: str) -> tuple[str, ...]:
        return (name, "scale", "offset") if self.offset else (name, "scale")

    def declare(
        self, module: nn.Module, name: str, shape: tuple[int, int], dtype: str, init: Init
    ) -> Arrays:
        least, most = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

        def random(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
            return jax.random.randint(key, shape, least, most + 1, jnp.int8).astype(self._integer)

        outputs, inputs = shape
        if inputs % self.group:
            where = "/".join(module.path)
            raise ConfigError(f"blocks {self} of {where} do not divide its {inputs} inputs")
        step = INIT_DEVIATION / np.arange(least, most + 1).std()
        first = -step * _MIDDLE if self.bits == 4 else 0.0
        groups = (outputs, inputs // self.group)
        constants = {"scale": step, "offset": first}
        return (
            module.param(name, random, shape),
            *(
                module.param(
                    part, nn.initializers.constant(constants[part]), groups, jnp.dtype(self.scale)
                )
                for part in self.parts(name)[1:]
            ),
        )

    def multiply(self, x: jax.Array, arrays: Arrays, out_dtype: Any) -> jax.Array:
        x, arrays = widened_late(x, arrays)
        return dense.multiply(x, self.widen(arrays, x.dtype), out_dtype)

    def look_up(self, arrays: Arrays, rows: jax.Array, dtype: Any) -> jax.Array:
        return self.widen(self.take_rows(arrays, rows), dtype)

    def take_rows(self, arrays: Arrays, rows: jax.Array) -> Arrays:
        return tuple(array[rows] for array in arrays)

    def store(self, matrix: np.ndarray) -> tuple[np.ndarray, ...]:
        """Rounds to the nearest of the numbers between a group's least and its largest.

        For matrices that are no file's. Those of a file go through `hold`.
        """
        if matrix.shape[1] % self.group:
            raise ValueError(f"groups of {self.group} do not divide {matrix.shape[1]} inputs")
        groups = matrix.astype(np.float32).reshape(len(matrix), -1, self.group)
        if not np.isfinite(groups).all():
            raise ValueError("a matrix holds infinities or NaN, which blocks cannot represent")
        most = 2 ** (self.bits - 1) - 1
        least, offset = -most, np.zeros(groups.shape[:-1], np.float32) if self.offset else None
        if self.offset and self.bits == 4:
            least, most, offset = 0, 2**self.bits - 1, groups.min(axis=-1)
            groups = groups - offset[..., None]
        scale = (np.abs(groups).max(axis=-1) / most).astype(self.scale)
        steps = np.where(scale == 0, 1, scale).astype(np.float32)[..., None]
        numbers = np.clip(np.rint(groups / steps), least, most)
        return self.hold(numbers.astype(np.int8).reshape(matrix.shape), scale, offset)

    def hold(
        self, numbers: np.ndarray, scale: np.ndarray, offset: np.ndarray | None
    ) -> tuple[np.ndarray, ...]:
        """The arrays of a matrix that is in groups already, of this kind or a smaller one.

        Args:
            numbers: int8 [out, in].
            scale: float [out, groups].
            offset: the same, or None for zeros.
        """
        if self.bits == 4 and self.offset:
            if offset is None:  # numbers from -8: they become numbers from 0, exactly
                offset = scale.astype(np.float32) * -_MIDDLE
            else:
                numbers = numbers - np.int8(_MIDDLE)
        wanted = numbers.shape[1] // self.group // scale.shape[1]
        arrays = [scale, np.zeros_like(scale) if offset is None else offset]
        with np.errstate(over="ignore"):
            held = [np.repeat(x, wanted, axis=1).astype(self.scale) for x in arrays]
        if not all(np.isfinite(x).all() for x in held):
            raise ValueError(f"a scale or an offset of its blocks overflows {self.scale}")
        return numbers.astype(self._integer), *held[: 1 + self.offset]

    def groups(self, arrays: Arrays) -> tuple[Any, Any, Any]:
        """What `hold` takes, of arrays that it gave; numpy."""
        numbers, scale, *offset = arrays
        first = _MIDDLE if self.bits == 4 and self.offset else 0
        return numbers.astype(np.int8) + np.int8(first), scale, offset[0] if offset else None

    def widen(self, arrays: Arrays, dtype: Any) -> jax.Array:
        numbers, scale, *offset = arrays
        groups = numbers.astype(np.float32).reshape(*scale.shape, self.group)
        if self.bits == 4 and self.offset:
            groups = groups + np.float32(_MIDDLE)
        groups = groups * scale[..., None].astype(np.float32)
        if offset:
            groups = groups + offset[0][..., None].astype(np.float32)
        return groups.reshape(numbers.shape).astype(dtype)

    def bound_by_memory(self, dtype: str, backend: str) -> bool:
        return backend != "cpu"

    @property
    def _integer(self) -> Any:
        return jnp.int4 if self.bits == 4 else jnp.int8
