"""How a model lies on a mesh: which array is divided along which axis.

Tensor parallelism as in Megatron-LM (Shoeybi et al., arXiv 1909.08053): projections into heads and
into the MLP are divided by output, those back by input, so a layer needs two all-reduces. Tables
are divided by vocabulary, the cache by key head. XLA inserts the communication.

Fused matrices hold several parts below each other (q, k, v; gate, up). On a mesh their rows are
arranged so that each device's share is a share of every part:

    one device     q0 q1 q2 q3  k0 k1  v0 v1
    two devices    q0 q1 k0 v0  q2 q3 k1 v1

Key heads that the mesh does not divide are repeated, the least number of times, so that each device
has those that its query heads read. `ModelConfig.shards` says how the arrays in memory are
arranged. Files, and the arrays that are trained, always hold them as for one device.

In training, matrices are also divided along `data`, as in FSDP (Zhao et al., arXiv 2304.11277): the
frozen ones, the trained ones, and what the optimizer keeps of each. `gathered` asks for a whole one
where it is multiplied.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from s3d_jax.errors import ConfigError, DeviceError
from s3d_jax.machine import default_device
from s3d_jax.mesh import AXES, DATA, MODEL, constrained, dividing
from s3d_jax.settings.mesh import MeshShape
from s3d_jax.settings.model import ModelConfig
from s3d_jax.weights.base import num_bytes

# The first pattern that matches an array's path decides. Paths of drafts are those of the target's
# parameters under "deltas" or "layers"; a delta is {down [in, r], up [r, out]}. An axis that the
# mesh does not divide is not divided.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(embed|lm_head)/(embedding|weight|scale|offset)", (MODEL,)),
    (r"head/\d+", (MODEL,)),  # a draft's rows of the head
    (r"(qkv|gate_up)/(weight|scale|offset|factors|bias)", (MODEL,)),
    (r"(attention/out|mlp/down)/(weight|scale|offset|factors)", (None, MODEL)),  # by group, if any
    (r"(qkv|gate_up)/up", (None, MODEL)),
    (r"(attention/out|mlp/down)/down", (MODEL,)),
    (r".*", ()),  # norms, biases of what is divided by input, masks, bridges, chains
)


def rule_of(path: str) -> tuple[str | None, ...]:
    """The axes of the mesh along which the array at a path is divided; see `RULES`."""
    return next(axes for pattern, axes in RULES if re.search(rf"(^|/){pattern}$", path))


def sharding_of(
    mesh: Mesh | AbstractMesh,
    config: ModelConfig,
    path: str,
    shape: tuple[int, ...],
    *,
    over_data: bool = False,
) -> NamedSharding:
    """Where the array at a path of the parameter tree, or of a draft's, lies.

    Args:
        mesh: the devices, or their numbers alone.
        config: the model; attention is divided by whole heads only.
        path, shape: of the array. The state of an optimizer has the paths of what it is for.
        over_data: matrices are divided along `data` too, as in training: by the largest of the axes
            that `model` leaves and that `data` divides.
    """
    divided = "attention/" not in path or config.attention_shards == mesh.shape[MODEL]
    axes = rule_of(path) if divided else ()
    spec = dividing(shape, axes, mesh.shape.__getitem__)
    if over_data and len(shape) > 1:
        taken = (*spec, *[None] * (len(shape) - len(spec)))
        free = [i for i, n in enumerate(shape) if taken[i] is None and n % mesh.shape[DATA] == 0]
        if free:
            most = max(free, key=shape.__getitem__)
            axes = tuple(DATA if i == most else axis for i, axis in enumerate(taken))
            spec = dividing(shape, axes, mesh.shape.__getitem__)
    return NamedSharding(mesh, spec)


def shardings_of(mesh: Mesh, config: ModelConfig, tree: Any, *, over_data: bool = False) -> Any:
    """`sharding_of` each array, or shape, of a PyTree of any kind."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, x: sharding_of(mesh, config, _name(keys), x.shape, over_data=over_data), tree
    )


def _name(keys: tuple[Any, ...]) -> str:
    """The path of a leaf of a PyTree: "draft/deltas/layers_0/mlp/down/up"."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", "")))) for k in keys)


def gathered(config: ModelConfig, path: str, array: jax.Array) -> jax.Array:
    """An array of a model that lies divided along `data`, whole, in a program for its mesh."""
    return _laid_out(config, path, array) if config.over_data else array


def with_whole(
    config: ModelConfig,
    module: str,
    names: Sequence[str],
    multiply: Callable[[jax.Array, tuple[jax.Array, ...]], jax.Array],
    x: jax.Array,
    arrays: tuple[jax.Array, ...],
) -> jax.Array:
    """What a product, or a look-up, gives of x and a matrix that may lie divided along `data`.

    The matrix is gathered when x is there, and forgotten after: the backward pass gathers it again.
    Otherwise XLA would gather all matrices first, and keep them.

    Args:
        config: the model.
        module, names: where the arrays of the matrix are in the parameter tree.
        multiply: of x and whole arrays.
        x: any array.
        arrays: of the matrix.
    """
    if not config.over_data:
        return multiply(x, arrays)

    def late(x: jax.Array, arrays: tuple[jax.Array, ...]) -> jax.Array:
        x, arrays = jax.lax.optimization_barrier((x, arrays))
        paths = [f"{module}/{name}" for name in names]
        whole = [gathered(config, p, a) for p, a in zip(paths, arrays, strict=True)]
        return multiply(x, tuple(whole))

    return jax.checkpoint(late)(x, arrays)


def in_memory(config: ModelConfig, tree: Any, *, over_data: bool) -> Any:
    """Trained arrays as the model needs them, in a program for its mesh.

    Args:
        config: the model, with `shards`.
        tree: as in files, on any PyTree of the model's paths.
        over_data: see `sharding_of`.
    """
    return jax.tree_util.tree_map_with_path(
        lambda keys, x: _laid_out(
            config, _name(keys), arranged(config, _name(keys), x), over_data=over_data
        ),
        tree,
    )


def _laid_out(
    config: ModelConfig, path: str, array: jax.Array, *, over_data: bool = False
) -> jax.Array:
    mesh = jax.sharding.get_abstract_mesh()
    if tuple(mesh.axis_names) != AXES:
        return array
    sharding = sharding_of(mesh, config, path, array.shape, over_data=over_data)
    return jax.lax.with_sharding_constraint(array, sharding.spec)


def build_mesh(mesh: Any) -> Mesh:
    """The mesh of devices that `mesh=` or `--mesh` asks for.

    Args:
        mesh: "data=2,model=2", {"model": 4}, a MeshShape, or a jax Mesh of these axes, of which one
            may be missing.

    Raises:
        ConfigError: it is none of these.
        DeviceError: there are not as many devices; or several hosts, and it leaves devices unused.
    """
    if isinstance(mesh, Mesh):
        unknown = [name for name in mesh.axis_names if name not in AXES]
        if unknown:
            raise ConfigError(
                f"the mesh has the axis {unknown[0]!r}: name the axes 'data' (rows of a batch) and "
                "'model' (parts of matrices)"
            )
        order = [mesh.axis_names.index(name) for name in AXES if name in mesh.axis_names]
        sizes = [mesh.shape.get(name, 1) for name in AXES]
        ordered = mesh.devices.transpose(order).reshape(sizes)
        _check_hosts(MeshShape(*sizes))
        return Mesh(ordered, AXES, axis_types=(AxisType.Auto, AxisType.Auto))
    shape = MeshShape.of(mesh)
    default_device()
    have = jax.device_count()
    if shape.size > have:
        raise DeviceError(
            f"the mesh {shape} needs {shape.size} devices, and jax has {have}: take a smaller one "
            "(on a CPU, XLA_FLAGS=--xla_force_host_platform_device_count=8 makes 8 of it)"
        )
    _check_hosts(shape)
    auto = (AxisType.Auto, AxisType.Auto)  # newer versions of jax make other ones by default
    devices = jax.devices()[: shape.size]
    return jax.make_mesh((shape.data, shape.model), AXES, axis_types=auto, devices=devices)


def _check_hosts(shape: MeshShape) -> None:
    have = jax.device_count()
    if jax.process_count() > 1 and shape.size != have:
        raise DeviceError(
            f"the mesh {shape} has {shape.size} devices, and the {jax.process_count()} hosts have "
            f"{have}: each must be in the mesh"
        )


def without_devices(shape: MeshShape) -> AbstractMesh:
    """A mesh that only says how things would be divided."""
    return AbstractMesh((shape.data, shape.model), AXES)


def shape_of(mesh: Mesh) -> MeshShape:
    """The shape of a mesh."""
    return MeshShape(mesh.shape[DATA], mesh.shape[MODEL])


def arranged(config: ModelConfig, path: str, array: Any) -> Any:
    """An array of a checkpoint, of numpy or jax, as it is in memory.

    Args:
        config: the model, with `shards`.
        path: of the array.
        array: as in files.
    """
    if (found := _order(config, path)) is None:
        return array
    axis, order = found
    return array.take(order, axis=axis, mode="clip")  # there is nothing to clip; jax would look


def as_in_files(config: ModelConfig, path: str, array: Any) -> Any:
    """The reverse of `arranged`."""
    if (found := _order(config, path)) is None:
        return array
    axis, order = found
    return array.take(np.unique(order, return_index=True)[1], axis=axis, mode="clip")


def _order(config: ModelConfig, path: str) -> tuple[int, np.ndarray] | None:
    """The axis of an array that is arranged, and for each place on it the one in files."""
    *_, owner, name = ("", *path.split("/"))
    axis = -1 if name == "up" else 0  # of a delta, or of a matrix [out, in] and its vectors
    if owner == "gate_up" and name != "down" and (shards := config.shards) > 1:
        rows = np.arange(2 * config.intermediate_size)
        return axis, rows.reshape(2, shards, -1).swapaxes(0, 1).ravel()
    n, k, size = config.num_heads, config.num_kv_heads, config.head_dim
    keys = np.repeat(np.arange(k), config.cached_heads // k)
    if (shards := config.attention_shards) == 1:
        return None
    if owner == "qkv" and name != "down":
        parts = (np.arange(n), n + keys, n + k + keys)
        heads = np.concatenate([part.reshape(shards, -1) for part in parts], axis=1).ravel()
    elif owner == "k_norm" and config.qk_norm_joint:
        heads = keys
    else:
        return None
    return axis, (heads[:, None] * size + np.arange(size)).ravel()


def split(y: jax.Array, sizes: tuple[int, ...], shards: int) -> list[jax.Array]:
    """The parts of what a fused matrix gives.

    Args:
        y: [B, T, all sizes together], arranged for `shards`.
        sizes: of the parts.
        shards: `ModelConfig.shards`, or `attention_shards`.

    Returns:
        [B, T, size] for each part.
    """
    ends = np.cumsum(sizes)[:-1]
    if shards == 1:
        return jax.numpy.split(y, ends, axis=-1)
    each = constrained(y.reshape(*y.shape[:2], shards, -1), DATA, None, MODEL)
    parts = jax.numpy.split(each, ends // shards, axis=-1)
    return [part.reshape(*y.shape[:2], -1) for part in parts]


def put(
    mesh: Mesh | None,
    config: ModelConfig,
    path: str,
    array: np.ndarray,
    *,
    over_data: bool = False,
) -> jax.Array:
    """Puts an array where it belongs: each device gets its own share alone.

    Args:
        mesh: None is the default device.
        config: the model, with `shards`.
        path, array: as in files.
        over_data: see `sharding_of`.
    """
    if mesh is None:
        return jax.device_put(array)
    array = arranged(config, path, array)
    sharding = sharding_of(mesh, config, path, array.shape, over_data=over_data)
    return put_shares(array, sharding)


def put_shares(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Gives each device its share of an array that every host has as a whole."""
    return jax.make_array_from_callback(array.shape, sharding, lambda share: array[share])


def place_draft(mesh: Mesh | None, config: ModelConfig, draft: Any) -> Any:
    """A draft (`DraftParams`) whose arrays lie where those of the model do."""
    if mesh is None:
        return draft

    return jax.tree.map(_from_every_host, draft, shardings_of(mesh, config, draft))


def on_host(tree: Any) -> Any:
    """The arrays of a PyTree as numpy arrays; of several hosts, each gets the whole ones."""

    def fetch(x: Any) -> np.ndarray:
        if getattr(x, "is_fully_addressable", True) or x.is_fully_replicated:
            return np.asarray(x)
        return np.asarray(jax.device_put(x, NamedSharding(x.sharding.mesh, PartitionSpec())))

    return jax.tree.map(fetch, tree)


def share_bytes(
    mesh: Mesh | AbstractMesh,
    config: ModelConfig,
    arrays: Mapping[str, Any],
    *,
    over_data: bool = False,
) -> int:
    """Bytes that each device needs for arrays, or their shapes, in memory, by path."""

    def share(path: str, x: Any) -> jax.ShapeDtypeStruct:
        sharding = sharding_of(mesh, config, path, x.shape, over_data=over_data)
        return jax.ShapeDtypeStruct(sharding.shard_shape(x.shape), x.dtype)

    return num_bytes({path: share(path, x) for path, x in arrays.items()})


def bytes_here(arrays: Any) -> int:
    """Bytes that arrays take on each of the devices that they lie on."""

    def share(x: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype)

    return num_bytes(jax.tree.map(share, arrays))


def cache_share(mesh: Mesh | AbstractMesh, config: ModelConfig, rows: int, nbytes: int) -> int:
    """What one device holds of a cache of so many rows and bytes."""
    shape = (rows, config.cached_heads, 1, 1)
    share = state_sharding(mesh, shape).shard_shape(shape)
    return nbytes * math.prod(share) // math.prod(shape)


def taken_here(mesh: Mesh, nbytes: int) -> int:
    """Bytes of the memory that `check_memory` looks at, where each device takes `nbytes`.

    The devices that XLA makes of a CPU share the memory of the host.
    """
    on_host = mesh.devices.flat[0].platform == "cpu"
    return nbytes * len(mesh.local_devices) if on_host else nbytes


def state_sharding(mesh: Mesh | AbstractMesh, shape: tuple[int, ...]) -> NamedSharding:
    """Where an array of a decoding state lies; see `state_constrained`."""
    return NamedSharding(mesh, dividing(shape, _state_axes(shape), mesh.shape.__getitem__))


def state_constrained(state: Any) -> Any:
    """A decoding state, or a part of it, laid out over the mesh of the program.

    Keys and values [B, K, S, H] are divided by row and by key head. All else is small, and whole on
    each device: each host can read it.
    """
    return jax.tree.map(lambda x: constrained(x, *_state_axes(x.shape)), state)


def place_state(mesh: Mesh | None, state: Any) -> Any:
    """Puts a decoding state, or a part of it, where its programs leave it."""
    if mesh is None:
        return state
    shardings = jax.tree.map(lambda x: state_sharding(mesh, x.shape), state)
    if jax.process_count() == 1:
        return jax.device_put(state, shardings)  # all at once, which is faster
    return jax.tree.map(_from_every_host, state, shardings)


def _from_every_host(x: Any, sharding: NamedSharding) -> jax.Array:
    """Moves an array that lies on the mesh already, or that every host has as a whole."""
    if sharding.is_fully_addressable or not getattr(x, "is_fully_addressable", True):
        return jax.device_put(x, sharding)
    if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = _from_every_host(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    return put_shares(np.asarray(x), sharding)


def _state_axes(shape: tuple[int, ...]) -> tuple[str | None, ...]:
    return (DATA, MODEL, None, None) if len(shape) == 4 else (None,) * len(shape)
