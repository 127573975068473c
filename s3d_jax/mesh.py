"""The mesh of devices on which a program runs, as the code inside of the program sees it.

A mesh has two axes. Rows of a batch lie along `DATA`, parts of matrices and heads along `MODEL`.
XLA's partitioner (GSPMD) makes one program per device from the program for one, and inserts all
communication. `constrained` tells it where arrays are to lie; it changes no value.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from s3d_jax.errors import S3DError

if TYPE_CHECKING:
    from jax.sharding import Mesh

DATA, MODEL = AXES = ("data", "model")
_Result = TypeVar("_Result")


@contextlib.contextmanager
def on_mesh(mesh: "Mesh | None") -> Iterator[None]:
    """Programs that are traced in this block are for the mesh; None changes nothing."""
    if mesh is None:
        yield
        return
    with jax.set_mesh(mesh):
        yield


def mesh_of(tree: Any) -> "Mesh | None":
    """The mesh that the arrays of a PyTree lie on; None if they lie on one device."""
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.axis_names == AXES:
            return sharding.mesh  # type: ignore[return-value]  # arrays have a concrete one
    return None


def axis_size(axis: str) -> int:
    """Devices along an axis of the mesh of the program that is traced; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[axis] if tuple(mesh.axis_names) == AXES else 1


def constrained(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x`, laid out over the mesh of the program that is traced; as it is without a mesh.

    Args:
        x: any array.
        axes: for each axis of x the axis of the mesh, or None; those left out at the end are None.
            An axis of x that the mesh does not divide is on all devices as a whole.
    """
    if tuple(jax.sharding.get_abstract_mesh().axis_names) != AXES:
        return x
    return jax.lax.with_sharding_constraint(x, dividing(x.shape, axes, axis_size))


def dividing(shape: tuple[int, ...], axes: tuple[str | None, ...], size: Any) -> PartitionSpec:
    """The axes as a PartitionSpec, without those that do not divide the shape.

    In the form that compiled programs report, so that equal layouts compare as equal: without axes
    of one device, and without None at the end.

    Args:
        shape: of the array.
        axes: see `constrained`.
        size: the number of devices along an axis of the mesh.
    """
    kept = [
        a if a is not None and size(a) > 1 and n % size(a) == 0 else None
        for n, a in zip(shape, axes, strict=False)
    ]
    while kept and kept[-1] is None:
        kept.pop()
    return PartitionSpec(*kept)


def is_first_host() -> bool:
    """Whether this process is the one that prints and writes; true without several hosts."""
    return jax.process_index() == 0


def by_first_host(function: Callable[[], _Result]) -> _Result | None:
    """Calls it on the first host alone, while the others wait; each host must call this.

    Returns:
        What it returns, on the first host; None on the others.

    Raises:
        S3DError, OSError: what it raises, on the first host; the others raise an S3DError then.
    """
    if jax.process_count() == 1:
        return function()
    result, failure = None, None
    if is_first_host():
        try:
            result = function()
        except (S3DError, OSError) as error:  # else the others would wait for nobody
            failure = error
    said = told_by_first_host(failure and str(failure))
    if failure is not None:
        raise failure
    if said is not None:
        raise S3DError(f"the first host stopped: {said}")
    return result


def told_by_first_host(value: Any) -> Any:
    """The value that the first host has, which is JSON; each host must call this."""
    if jax.process_count() == 1:
        return value
    from jax.experimental.multihost_utils import broadcast_one_to_all

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(broadcast_one_to_all(np.int32(len(text))))
    sent = text if is_first_host() else np.zeros(size, np.uint8)
    return json.loads(np.asarray(broadcast_one_to_all(sent), np.uint8).tobytes())
