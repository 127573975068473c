"""JAX's global settings as this package needs them, whatever the process has set.

The arithmetic here is written in 32 bits, with implicit broadcasting, and its programs move arrays
to and from the device. A process that uses JAX for something else may forbid or change all of that
(`JAX_ENABLE_X64`, `jax_numpy_rank_promotion`, ...); other packages that are used here, such as
optax, cannot be written for every choice. So each entry point runs under `usual_jax_settings`.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])


@contextlib.contextmanager
def usual_jax_settings() -> Iterator[None]:
    """JAX's own defaults for what changes or forbids arithmetic, random numbers and transfers.

    Settings that only observe (`jax_debug_nans`, `jax_check_tracer_leaks`, ...) stay as they are.
    """
    import jax

    with contextlib.ExitStack() as stack:
        if hasattr(jax, "enable_x64"):
            stack.enter_context(jax.enable_x64(False))
        else:  # before jax 0.8
            from jax.experimental import disable_x64  # type: ignore[attr-defined]

            stack.enter_context(disable_x64())
        stack.enter_context(jax.numpy_dtype_promotion("standard"))
        stack.enter_context(jax.numpy_rank_promotion("allow"))
        stack.enter_context(jax.transfer_guard("allow"))
        stack.enter_context(jax.default_matmul_precision(None))
        stack.enter_context(jax.threefry_partitionable(True))  # another one draws other numbers
        # Programs are compiled ahead of their calls, which has no other way.
        stack.enter_context(jax.disable_jit(False))
        yield


def under_usual_jax_settings(function: _Function) -> _Function:
    """Decorator: runs a function, or each step of a generator, under `usual_jax_settings`.

    Between two steps of a generator the caller has its own settings.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with usual_jax_settings():
            return function(*args, **kwargs)

    @functools.wraps(function)
    def steps(*args: Any, **kwargs: Any) -> Iterator[Any]:
        with contextlib.closing(function(*args, **kwargs)) as generator:
            while True:
                with usual_jax_settings():
                    try:
                        item = next(generator)
                    except StopIteration:
                        return
                yield item

    return steps if inspect.isgeneratorfunction(function) else call  # type: ignore[return-value]
