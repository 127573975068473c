"""Which way to multiply a few rows with a weight is fastest here: why linear.py is as it is.

    python benchmarks/linear_layout.py [--dtype float32|bfloat16|int8] [--repeats N]

Prints microseconds per product (the minimum of the repeats, the ways in turns). The weights of one
line together exceed the caches, as in decoding. Ways, with a weight W and rows x:

    x@[in,out]      W stored [in, out], right operand of a matrix product
    x@[out,in].T    W stored [out, in], right operand
    [out,in]@x.T    W stored [out, in], left operand, which XLA exchanges with the right one
    ... kept        the same with a barrier, which prevents that
"""

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from s3d_jax.keys import make_key
from s3d_jax.settings.arguments import prepare_streams

SHAPES = ((704, 128), (4096, 768), (768, 2048), (32000, 768))  # [out, in]
ROWS = (1, 2, 4, 5, 8, 16, 64)
MINIMUM_BYTES = 6e7


def product(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    kind = jnp.int32 if a.dtype == jnp.int8 else jnp.float32
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=kind)


WAYS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "x@[in,out]": lambda x, w: product(x, w, (1, 0)),
    "x@[out,in].T": lambda x, w: product(x, w, (1, 1)),
    "[out,in]@x.T": lambda x, w: product(w, x, (1, 1)).T,
    "... kept": lambda x, w: jax.lax.optimization_barrier(product(w, x, (1, 1))).T,
}


def main() -> int:
    prepare_streams()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "int8"), default="float32")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    print("| [out, in] | rows | " + " | ".join(WAYS) + " |")
    print("|---|---|" + "---|" * len(WAYS))
    for shape in SHAPES:
        size = shape[0] * shape[1] * jnp.dtype(arguments.dtype).itemsize
        count = max(2, min(64, round(MINIMUM_BYTES / size)))
        keys = jax.random.split(make_key(0), count)
        weights = [random(key, shape, arguments.dtype) for key in keys]
        for rows in ROWS:
            times = measure(weights, rows, arguments.repeats)
            cells = (f"{times[way]:.0f}" for way in WAYS)
            print(f"| {list(shape)} | {rows} | " + " | ".join(cells) + " |", flush=True)
    return 0


def random(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    if jnp.dtype(dtype) == jnp.int8:
        return jax.random.randint(key, shape, -127, 128, jnp.int8)
    return jax.random.normal(key, shape, dtype)


def measure(weights: list[jax.Array], rows: int, repeats: int) -> dict[str, float]:
    """Microseconds per product of each way."""
    x = random(make_key(1), (rows, weights[0].shape[1]), weights[0].dtype)
    transposed = [jnp.asarray(w.T.copy()) for w in weights]
    runs = {}
    for way, function in WAYS.items():

        def chain(x: jax.Array, ws: list[jax.Array], function: Callable = function) -> jax.Array:
            for w in ws:  # each product waits for the one before, as layers do
                x = x + jnp.tanh(jnp.max(function(x, w), axis=1, keepdims=True)).astype(x.dtype)
            return x

        used = transposed if way == "x@[in,out]" else weights
        runs[way] = (jax.jit(chain), used)
        runs[way][0](x, used).block_until_ready()
    best = dict.fromkeys(WAYS, float("inf"))
    for _ in range(repeats):
        for way, (jitted, used) in runs.items():
            start = time.perf_counter()
            jitted(x, used).block_until_ready()
            best[way] = min(best[way], time.perf_counter() - start)
    return {way: 1e6 * seconds / len(weights) for way, seconds in best.items()}


if __name__ == "__main__":
    sys.exit(main())
