"""Random numbers are the same whatever jax is set to, and a row has its own."""

from contextlib import contextmanager

import jax
import numpy as np
import pytest

from s3d_jax.keys import make_key, seeded_keys
from s3d_jax.nn.transformer import init_params
from tests.tiny import tiny_config, tiny_lm

IMPL, PARTITIONABLE = "jax_default_prng_impl", "jax_threefry_partitionable"
SETTINGS = [("threefry2x32", True), ("threefry2x32", False), ("rbg", True), ("unsafe_rbg", False)]
# What jax 0.10 gives with its defaults.
KEYS = [[3716834203, 3481239269], [1946498123, 2217676430], [2822284597, 2722679661]]


@contextmanager
def jax_set(impl, partitionable):
    before = {name: getattr(jax.config, name) for name in (IMPL, PARTITIONABLE)}
    jax.config.update(IMPL, impl)
    jax.config.update(PARTITIONABLE, partitionable)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def test_numbers_are_those_of_jax_s_defaults():
    with jax_set("threefry2x32", True):
        for seed in (0, 7, 2**31, 2**32 - 1):
            key = jax.random.key(seed)
            assert make_key(seed) == key
            rows = seeded_keys(np.full(3, seed, np.uint32), np.arange(3))
            assert (rows == jax.random.split(key, 3)).all()


@pytest.mark.parametrize("impl, partitionable", SETTINGS)
def test_no_setting_of_jax_changes_a_number(impl, partitionable):
    with jax_set(impl, partitionable):
        keys = seeded_keys(np.array([3, 3, 9], np.uint32), np.array([0, 1, 0]))
        assert jax.random.key_data(keys).tolist() == KEYS


@pytest.mark.parametrize("impl, partitionable", SETTINGS[1:])
def test_random_weights_depend_on_no_setting(impl, partitionable):
    config = tiny_config()
    expected = init_params(config, make_key(3))
    with jax_set(impl, partitionable):
        jax.tree.map(np.testing.assert_array_equal, init_params(config, make_key(3)), expected)


@pytest.mark.parametrize("impl, partitionable", SETTINGS[1:])
def test_a_row_s_tokens_depend_on_no_setting_and_no_neighbour(impl, partitionable):
    lm, options = tiny_lm(), dict(max_new_tokens=12, temperature=1.5)
    row = lm.generate([[1, 2, 3]], seed=[5], **options)[0].tokens
    others = lm.generate([[7], [1, 2, 3]], seed=4, **options)
    with jax_set(impl, partitionable):
        lm.programs.clear()
        batch = [[9, 9], [1, 2, 3], [4]]
        assert lm.generate(batch, seed=[1, 5, 2], **options)[1].tokens == row
        again = lm.generate([[7], [1, 2, 3]], seed=4, **options)
        assert [r.tokens for r in again] == [r.tokens for r in others]
