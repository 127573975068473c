"""Keys of random numbers, which are the same whatever jax is set to.

jax's own `split`, `bits` and what is drawn from them depend on `jax_default_prng_impl` and
`jax_threefry_partitionable`, and some of jax's generators give a row other numbers in another
batch. `fold_in` of threefry keys depends on nothing but its arguments, so it is the only source of
what decoding draws. All numbers are those of jax's present defaults.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

_IMPL = "threefry2x32"


def make_key(seed: int | jax.Array) -> jax.Array:
    """The typed PRNG key of a seed from 0 to 2³²-1."""
    # Not by `jax.random.key`, which adds `jax_random_seed_offset`.
    data = jnp.stack([jnp.zeros((), jnp.uint32), jnp.asarray(seed, jnp.uint32)])
    return jax.random.wrap_key_data(data, impl=_IMPL)


def numbered_keys(key: jax.Array, numbers: jax.Array) -> jax.Array:
    """A key for each number, [n]; those of 0 … n-1 are what `jax.random.split(key, n)` gives."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)


def split_key(key: jax.Array, count: int) -> jax.Array:
    """`count` keys, [count]."""
    return numbered_keys(key, jnp.arange(count, dtype=jnp.uint32))


def seeded_keys(seeds: np.ndarray, numbers: np.ndarray) -> jax.Array:
    """For each i key `numbers[i]` of seed `seeds[i]`: typed PRNG keys [B].

    Args:
        seeds, numbers: uint32 [B].
    """
    count = len(seeds)
    padded = np.zeros((2, 1 << (count - 1).bit_length()), np.uint32)  # few sizes, few programs
    padded[:, :count] = seeds, numbers
    rows = jax.device_put(np.asarray(_key_data(*padded))[:count])
    return jax.random.wrap_key_data(rows, impl=_IMPL)


@jax.jit
def _key_data(seeds: jax.Array, numbers: jax.Array) -> jax.Array:
    def of_row(seed: jax.Array, number: jax.Array) -> jax.Array:
        return jax.random.key_data(jax.random.fold_in(make_key(seed), number))

    return jax.vmap(of_row)(seeds, numbers)


def uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Even in [0, 1), float32: a multiple of 2⁻²³ for each place."""
    words = jax.random.key_data(split_key(key, math.prod(shape))).reshape(*shape, 2)
    bits = (words[..., 0] ^ words[..., 1]) >> 9
    one = np.float32(1).view(np.uint32)
    return jax.lax.bitcast_convert_type(bits | one, jnp.float32) - 1


def choose(key: jax.Array, logits: jax.Array) -> jax.Array:
    """Draws from softmax(logits), float32 [..., V]: int32 [...], by the largest Gumbel value."""
    u = jnp.maximum(uniform(key, logits.shape), jnp.finfo(jnp.float32).tiny)
    return jnp.argmax(logits - jnp.log(-jnp.log(u)), axis=-1).astype(jnp.int32)
