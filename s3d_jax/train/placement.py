"""Where a run's arrays lie on a mesh: trained ones, what the optimizer keeps, and batches.

All of them are as in files and of the shapes of one device, so a state of any mesh continues on any
other. Only a step arranges trained matrices for its mesh (`nn.sharding.in_memory`).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from s3d_jax.errors import ConfigError
from s3d_jax.nn.sharding import build_mesh, put_shares, shape_of, shardings_of
from s3d_jax.settings.mesh import MeshShape
from s3d_jax.settings.model import ModelConfig
from s3d_jax.settings.training import LoopConfig


class Placement(NamedTuple):
    """The devices of a run.

    Attributes:
        mesh: from `mesh_for`.
        config: the model, with the `shards` of the mesh, and `over_data`.
    """

    mesh: Mesh
    config: ModelConfig

    def of(self, tree: Any) -> Any:
        """Where the arrays of a state, or of a part of it, lie; of arrays or their shapes."""
        return shardings_of(self.mesh, self.config, tree, over_data=True)

    @property
    def whole(self) -> NamedSharding:
        """Of what each device has as a whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    def batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Token ids are small: each device has all of them, and computes its rows."""
        return {name: put_shares(np.asarray(x), self.whole) for name, x in batch.items()}


def mesh_for(mesh: Any, model: ModelConfig, loop: LoopConfig) -> Mesh | None:
    """The mesh that a run is to use; None is one device.

    Args:
        mesh: see `build_mesh`.
        model: what is trained, or whose draft is.
        loop: its rows are divided over `data`.

    Raises:
        ConfigError: it is no mesh, or does not divide the model or a part of a batch.
        DeviceError: there are fewer devices.
    """
    if mesh is None:
        return None
    built = build_mesh(mesh)
    shape = shape_of(built)
    shape.check_divides(model)
    _check_rows(shape, loop)
    return built


def _check_rows(shape: MeshShape, loop: LoopConfig) -> None:
    rows = loop.batch_size // loop.accumulate
    if rows % shape.data:
        each = loop.accumulate * shape.data
        parts = f" in {loop.accumulate} parts" if loop.accumulate > 1 else ""
        fitting = -(-loop.batch_size // each) * each
        raise ConfigError(
            f"the mesh {shape} divides the rows of a step over {shape.data} devices, and "
            f"batch_size (--batch-size) {loop.batch_size}{parts} gives {rows} rows at once: take "
            f"a multiple of {each}, such as {fitting}"
        )
