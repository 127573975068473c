"""The shape of a mesh of devices, as `mesh=` and `--mesh` give it."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from s3d_jax.errors import ConfigError
from s3d_jax.settings.model import ModelConfig
from s3d_jax.settings.options import option
from s3d_jax.settings.records import Record, check

_EXAMPLES = '"model=4" or "data=2,model=2"'


@dataclasses.dataclass(frozen=True)
class MeshShape(Record):
    """Devices along each axis of a mesh.

    Attributes:
        data: over which the rows of a batch are divided.
        model: over which matrices and heads are divided.
    """

    data: int = option(1, least=1)
    model: int = option(1, least=1)

    @classmethod
    def of(cls, value: Any) -> Self:
        """The shape that a string such as "data=2,model=2", or a mapping of axes to sizes, names.

        Raises:
            ConfigError: an axis is unknown, named twice, or its size is no integer above 0.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            pairs = [part.partition("=")[::2] for part in value.split(",")]
            sizes = [size.strip() for _, size in pairs]
            check(
                all(size.isdecimal() and size.isascii() and len(size) < 10 for size in sizes),
                f"a mesh is written as {_EXAMPLES}, got {value!r:.80}",
            )
            names = [name.strip() for name, _ in pairs]
            check(len(set(names)) == len(names), f"the mesh {value!r:.80} names an axis twice")
            value = dict(zip(names, map(int, sizes), strict=True))
        if not isinstance(value, Mapping):
            raise ConfigError(
                f"mesh must be a text such as {_EXAMPLES}, a mapping of axes to numbers, or a "
                f"jax.sharding.Mesh, got {value!r:.80}"
            )
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [str(name) for name in value if name not in known]
        check(
            not unknown,
            f"a mesh has the axes data (rows of a batch) and model (parts of matrices), and "
            f"{', '.join(unknown)!r:.80} is none: write {_EXAMPLES}",
        )
        return cls(**value)

    def __str__(self) -> str:
        return f"data={self.data},model={self.model}"

    @property
    def size(self) -> int:
        """The number of devices."""
        return self.data * self.model

    def check_divides(self, config: ModelConfig) -> None:
        """Raises ConfigError unless the widths of a model can be divided so."""
        width = config.intermediate_size
        fitting = [n for n in range(1, self.model) if width % n == 0]
        check(
            width % self.model == 0,
            f"the mesh {self} has {self.model} devices along model, which do not divide the "
            f"model's feed-forward width of {width}: model={max(fitting, default=1)} does",
        )

    def replicated(self, config: ModelConfig) -> list[str]:
        """What of a model this mesh does not divide and therefore keeps several times, in words."""
        found, config = [], config.replace(shards=self.model)
        heads, cached = config.num_kv_heads, config.cached_heads
        if config.attention_shards < self.model:
            found.append(
                f"attention and cache, whole on each device ({self.model} devices do not divide "
                f"{config.num_heads} query heads)"
            )
        elif cached > heads:
            found.append(
                f"key heads, {cached // heads} times ({self.model} devices do not divide {heads}: "
                f"{cached // self.model} on each)"
            )
        if config.vocab_size % self.model:
            found.append(
                f"embeddings and head, whole on each device ({self.model} devices do not divide a "
                f"vocabulary of {config.vocab_size})"
            )
        return found
