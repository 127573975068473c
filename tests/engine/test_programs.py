"""A compiled program is kept under everything that it depends on, while there is room."""

import weakref

import jax
import jax.numpy as jnp
import numpy as np

from s3d_jax.engine import programs as module
from s3d_jax.engine.programs import Programs, signature
from s3d_jax.machine import MemoryMaps


def test_the_key_holds_structure_shapes_dtypes_and_shardings():
    x = jnp.zeros((2, 3))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    spec = jax.sharding.PartitionSpec("data")
    sharded = jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
    trees = [x, {"a": x}, x.T, x.astype(jnp.int32), sharded]
    assert len({signature(tree) for tree in trees}) == len(trees)
    assert signature(x) == signature(jnp.ones((2, 3)))


def test_equal_calls_share_a_program():
    doubled = jax.jit(lambda x, times: x * times, static_argnames="times")
    programs, x = Programs(), jnp.ones(3)
    first, seconds = programs.get(doubled, {"times": 2}, {"x": x}, {})
    again, nothing = programs.get(doubled, {"times": 2}, {"x": x + 1}, {})
    assert again is first and seconds > 0 and nothing == 0
    assert again(x=x).tolist() == [2, 2, 2]
    for times, y in ((3, x), (2, jnp.ones(4))):
        other, _ = programs.get(doubled, {"times": times}, {"x": y}, {})
        assert other is not first and other(x=y).tolist() == [times] * len(y)
    # A known signature is trusted and not computed again.
    known, _ = programs.get(doubled, {"times": 2}, {"x": x}, {"x": signature(x)})
    assert known is first
    assert [static for _, static in programs] == [{"times": 2}, {"times": 3}, {"times": 2}]
    programs.clear()
    assert len(programs) == 0


def test_the_program_that_was_called_longest_ago_goes_first(monkeypatch):
    monkeypatch.setattr(module, "_stores", weakref.WeakSet())  # without those of other tests
    monkeypatch.setattr(module, "_most", 3)
    doubled = jax.jit(lambda x, times: x * times, static_argnames="times")
    ours, others, x = Programs(), Programs(), jnp.ones(3)
    first, _ = ours.get(doubled, {"times": 0}, {"x": x})
    freed = weakref.ref(others.get(doubled, {"times": 1}, {"x": x})[0])
    ours.get(doubled, {"times": 2}, {"x": x})
    assert first(x=x).tolist() == [0, 0, 0]
    others.get(doubled, {"times": 3}, {"x": x})
    assert [static["times"] for _, static in ours] == [0, 2]
    assert [static["times"] for _, static in others] == [3] and freed() is None


def test_what_jax_remembers_of_freed_programs_goes_too(monkeypatch):
    monkeypatch.setattr(module, "_stores", weakref.WeakSet())
    monkeypatch.setattr(module, "_most", 2)
    monkeypatch.setattr(module, "_freed", 0)
    traced, programs, x = [], Programs(), jnp.ones(3)

    @jax.jit
    def inner(x):
        traced.append(x.shape)
        return x + 1

    outer = jax.jit(lambda x, times: inner(x) * times, static_argnames="times")
    for times in range(5):
        programs.get(outer, {"times": times}, {"x": x})
    # The first trace serves four programs; two of them were freed when the last one was made.
    assert len(traced) == 2
    assert programs.get(outer, {"times": 4}, {"x": x})[0](x=x).tolist() == [8, 8, 8]


def test_fewer_programs_are_kept_where_memory_maps_run_out(monkeypatch):
    monkeypatch.setattr(module, "_stores", weakref.WeakSet())
    doubled = jax.jit(lambda x, times: x * times, static_argnames="times")
    programs, x, used = Programs(), jnp.ones(3), 0

    def maps():  # each program takes 20
        return MemoryMaps(used + 20 * len(programs), 100)

    monkeypatch.setattr(module, "memory_maps", maps)
    for times in range(5):
        programs.get(doubled, {"times": times}, {"x": x})
    assert [static["times"] for _, static in programs] == [3, 4]
    used = 90  # by others
    programs.get(doubled, {"times": 5}, {"x": x})
    assert [static["times"] for _, static in programs] == [5]
