"""The compiled programs of a model, of which a process keeps a bounded number."""

import itertools
import threading
import time
import types
import weakref
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import jax

from s3d_jax.errors import ConfigError
from s3d_jax.machine import memory_maps, return_free_memory
from s3d_jax.mesh import mesh_of, on_mesh
from s3d_jax.settings.records import is_integer

# On a CPU, programs take memory maps: about 50 per layer for a decoding loop, thousands in all. A
# process that is refused another map is aborted, so only half of them may be in use.
_MAPS_IN_USE = 0.5

_most = 64
_freed = 0  # programs since jax's own caches were cleared
_stores: "weakref.WeakSet[Programs]" = weakref.WeakSet()
_lock = threading.RLock()  # held while stores change; making room is part of a change
_calls = itertools.count()


def keep_programs(most: int) -> None:
    """Sets how many compiled programs this process keeps, those of all models together.

    Beyond this number the program that was called longest ago is freed; it is compiled again where
    it is needed again. Fewer are kept where they would take more than half of the memory maps that
    Linux allows a process.

    Args:
        most: at least 1; 64 by default.

    Raises:
        ConfigError: it is no integer of at least 1.
    """
    global _most
    if not is_integer(most) or most < 1:
        raise ConfigError(f"the number of programs to keep must be an integer >= 1, got {most!r}")
    _most = int(most)
    _make_room()


class Program:
    """A compiled program, to be called with arrays as keywords.

    Attributes:
        last_call: a number that grows with each call of any program.
    """

    def __init__(self, function: Any, static: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
        """Compiles a jitted function for its static arguments and the shapes of its arrays."""
        with on_mesh(mesh_of(arrays)):
            self._compiled = function.lower(**static, **arrays).compile()
        function.clear_cache()  # jax would keep it as long as the function exists
        self.last_call = next(_calls)

    @property
    def scratch_bytes(self) -> int:
        """Temporary memory of a call; 0 if the device does not say."""
        memory = self._compiled.memory_analysis()
        return 0 if memory is None else int(memory.temp_size_in_bytes)

    def __call__(self, **arrays: Any) -> Any:
        self.last_call = next(_calls)
        return self._compiled(**arrays)


class Programs:
    """Compiles each program when it is first needed, and keeps it while there is room.

    A program is kept under its function, its static arguments, and the shapes, dtypes and shardings
    of its arrays. Room is shared by all stores of the process (`keep_programs`). A copy of a store,
    or one that was pickled, is empty: programs belong to their process.
    """

    def __init__(self) -> None:
        self._programs: dict[tuple[Any, ...], Program] = {}
        with _lock:
            _stores.add(self)

    def __len__(self) -> int:
        return len(self._programs)

    def __iter__(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        """(function, static arguments) of each program, in the order of their compilation."""
        return ((key[0], dict(key[1])) for key in self._programs)

    def __reduce__(self) -> tuple[Any, ...]:
        return Programs, ()

    def clear(self) -> None:
        """Forgets all programs."""
        with _lock:
            self._programs.clear()
        return_free_memory()

    def get(
        self,
        function: Any,
        static: Mapping[str, Any],
        arrays: Mapping[str, Any],
        known: Mapping[str, Hashable] = types.MappingProxyType({}),
    ) -> tuple[Program, float]:
        """The program to be called with `arrays` as keywords, and the seconds to compile it.

        Who keeps it longer than for a call should keep a weak reference, so that it can be freed.

        Args:
            function: a jitted function.
            static: its static arguments.
            arrays: its other arguments, PyTrees of arrays.
            known: signatures (`signature`) of arguments that the caller has computed already.
        """
        described = ((k, known[k] if k in known else signature(x)) for k, x in arrays.items())
        key = (function, tuple(static.items()), tuple(described))
        if (program := self._programs.get(key)) is not None:
            return program, 0.0
        start = time.perf_counter()
        program = Program(function, static, arrays)
        seconds = time.perf_counter() - start
        with _lock:
            self._programs[key] = program
            _make_room()
        return program, seconds


def _make_room() -> None:
    """Frees the programs that were called longest ago, but not the newest, while there are many.

    Where as many programs were freed as are kept, jax's own caches are cleared too. They hold
    megabytes of what was traced for each program, and jitted functions of others are compiled again
    afterwards, so this must be seldom.
    """
    global _freed
    with _lock:
        kept = [(p.last_call, key, s) for s in _stores for key, p in s._programs.items()]
        kept.sort(key=lambda item: item[0])
        before = _freed
        for i, (_, key, store) in enumerate(kept[:-1]):
            if len(kept) - i <= _most and not _crowded():
                break
            del store._programs[key]
            _freed += 1
        if _freed == before:
            return
        if _freed >= _most:
            jax.clear_caches()
            _freed = 0
        return_free_memory()


def _crowded() -> bool:
    maps = memory_maps()
    return maps is not None and maps.used > _MAPS_IN_USE * maps.most


def signature(tree: Any) -> Hashable:
    """What a compiled program depends on in an argument: structure, shapes, dtypes, shardings."""
    leaves, structure = jax.tree.flatten(tree)
    described = ((x.shape, x.dtype, getattr(x, "sharding", None)) for x in leaves)
    return structure, tuple(described)
