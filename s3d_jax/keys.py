"""Keys of random numbers, which are the same whatever jax is set to.

They name their generator, since some of jax's generators give a row other numbers in another batch.
What is drawn from them is jax's own, under `usual_jax_settings`.
"""

import jax
import jax.numpy as jnp
import numpy as np

_IMPL = "threefry2x32"


def make_key(seed: int | jax.Array) -> jax.Array:
    """The typed PRNG key of a seed from 0 to 2³²-1."""
    # Not by `jax.random.key`, which adds `jax_random_seed_offset`.
    data = jnp.stack([jnp.zeros((), jnp.uint32), jnp.asarray(seed, jnp.uint32)])
    return jax.random.wrap_key_data(data, impl=_IMPL)


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
