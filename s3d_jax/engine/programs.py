"""The compiled programs of a model."""

import time
import types
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import jax


class Programs:
    """Compiles each program once, and keeps it.

    A program is kept under its function, its static arguments, and the shapes, dtypes and shardings
    of its arrays.
    """

    def __init__(self) -> None:
        self._programs: dict[tuple[Any, ...], Any] = {}

    def __len__(self) -> int:
        return len(self._programs)

    def __iter__(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        """(function, static arguments) of each program, in the order of their compilation."""
        return ((key[0], dict(key[1])) for key in self._programs)

    def clear(self) -> None:
        """Forgets all programs."""
        self._programs.clear()

    def get(
        self,
        function: Any,
        static: Mapping[str, Any],
        arrays: Mapping[str, Any],
        known: Mapping[str, Hashable] = types.MappingProxyType({}),
    ) -> tuple[Any, float]:
        """The program to be called with `arrays` as keywords, and the seconds to compile it.

        Args:
            function: a jitted function.
            static: its static arguments.
            arrays: its other arguments, PyTrees of arrays.
            known: signatures (`signature`) of arguments that the caller has computed already.
        """
        described = ((k, known[k] if k in known else signature(x)) for k, x in arrays.items())
        key = (function, tuple(static.items()), tuple(described))
        start = time.perf_counter()
        if (program := self._programs.get(key)) is not None:
            return program, 0.0
        self._programs[key] = program = function.lower(**static, **arrays).compile()
        return program, time.perf_counter() - start


def signature(tree: Any) -> Hashable:
    """What a compiled program depends on in an argument: structure, shapes, dtypes, shardings."""
    leaves, structure = jax.tree.flatten(tree)
    described = ((x.shape, x.dtype, getattr(x, "sharding", None)) for x in leaves)
    return structure, tuple(described)
