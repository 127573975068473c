"""Writes land in the rows' own slots and nowhere else."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from s3d_jax.nn.cache import init_cache, write
from tests.tiny import tiny_config

SLOTS, BLOCK = 9, 3


@settings(max_examples=30, deadline=None)
@given(st.data(), st.integers(1, 3))
def test_write(data, batch):
    at = st.integers(0, SLOTS - BLOCK)
    starts = data.draw(st.lists(at, min_size=batch, max_size=batch))
    old = np.arange(batch * 2 * SLOTS * 4, dtype=np.float32).reshape(batch, 2, SLOTS, 4)
    new = -1 - np.arange(batch * 2 * BLOCK * 4, dtype=np.float32).reshape(batch, 2, BLOCK, 4)
    expected = old.copy()
    for row, start in enumerate(starts):
        expected[row, :, start : start + BLOCK] = new[row]
    written = write(jnp.asarray(old), jnp.asarray(new), jnp.asarray(starts))
    np.testing.assert_array_equal(written, expected)


def test_an_empty_cache_has_the_model_s_shape_and_no_shared_buffers():
    config = tiny_config(dtype="bfloat16")
    cache = init_cache(config, 3, 20, jnp.array([1, 2, 3]))
    arrays = (*cache.keys, *cache.values)
    assert len(arrays) == 2 * config.num_layers
    assert {x.shape for x in arrays} == {(3, config.num_kv_heads, 20, config.head_dim)}
    assert {str(x.dtype) for x in arrays} == {"bfloat16"}
    assert len({x.unsafe_buffer_pointer() for x in arrays}) == len(arrays)  # each is donated
    assert cache.slots == 20 and cache.length.tolist() == [0, 0, 0]
