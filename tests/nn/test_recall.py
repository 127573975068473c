"""What a draft reads of the token before its block: the last layers' values in the cache."""

import jax.numpy as jnp
import numpy as np
import pytest

from s3d_jax.nn.attention import layout_after_anchors, layout_after_committed
from s3d_jax.nn.cache import init_cache
from s3d_jax.nn.draft import recall
from s3d_jax.nn.transformer import forward
from s3d_jax.settings.drafting import DraftConfig
from tests.tiny import tiny_config, tiny_params
from tests.train.test_objective import noisy_draft

EPS = 1e-5


def filled(cache):
    """A cache of random values, all different."""
    generator = np.random.default_rng(0)
    values = (jnp.asarray(generator.normal(size=v.shape), jnp.float32) for v in cache.values)
    return cache.replace(values=tuple(values))


def normed(values):
    """[K, H] as a bridge reads it."""
    x = np.asarray(values).reshape(-1)
    return x / np.sqrt(np.mean(x * x) + EPS)


def test_it_is_of_the_last_layers_and_of_the_last_committed_token():
    config = tiny_config()
    cache = filled(init_cache(config, 3, 20, np.ones(3)))
    cache = cache.replace(length=jnp.array([7, 1, 0]))
    layouts = [layout_after_committed(cache, 4, False, 20)] * config.num_layers
    found = np.asarray(recall(cache, layouts, 2, 4, EPS))
    size = config.num_kv_heads * config.head_dim
    assert found.shape == (3, 1, 2 * size)
    for row, before in ((0, 6), (1, 0)):
        for i, layer in enumerate((-1, -2)):
            expected = normed(cache.values[layer][row, :, before])
            np.testing.assert_allclose(found[row, 0, i * size : (i + 1) * size], expected, 1e-5)
    assert not found[2].any()  # nothing is before the first token


@pytest.mark.parametrize("length", [9, 10, 23])
def test_it_finds_the_token_in_a_ring(length):
    config = tiny_config(sliding_window=(5,) * 4)
    cache = filled(init_cache(config, 1, 40, np.ones(1), largest_block=5))
    cache = cache.replace(length=jnp.array([length]))
    ring = cache.values[0].shape[2]
    assert ring == 10
    layouts = [layout_after_committed(cache, 4, False, ring)] * config.num_layers
    found = recall(cache, layouts, 1, 4, EPS)[0, 0]
    expected = normed(cache.values[-1][0, :, (length - 1) % ring])
    np.testing.assert_allclose(found, expected, 1e-5)


def test_each_block_of_training_has_its_own():
    config = tiny_config()
    cache = filled(init_cache(config, 2, 12 + 3 * 2, np.ones(2)))
    anchors = jnp.array([[4, 0, 9], [1, 11, 2]])
    layouts = [layout_after_anchors(anchors, 2, 12, False)] * config.num_layers
    found = np.asarray(recall(cache, layouts, 1, 2, EPS))
    for (row, a), anchor in np.ndenumerate(anchors):
        expected = normed(cache.values[-1][row, :, anchor - 1]) if anchor else 0.0
        np.testing.assert_allclose(found[row, a], expected, 1e-5)


def test_a_bridge_that_recalls_depends_on_the_token_before_alone():
    """The draft keeps no layer that could attend to it but the first, whose values stay."""
    config = tiny_config()
    params = tiny_params(config)
    skip = (False, True, True, True)
    draft = noisy_draft(config, params, DraftConfig(skip, 3), recall=1)
    cache = filled(init_cache(config, 1, 20, np.ones(1))).replace(length=jnp.array([6]))

    def logits(position, draft=draft):
        last = cache.values[-1]
        changed = last.at[:, :, position].multiply(-1.0)
        here = cache.replace(values=(*cache.values[:-1], changed))
        options = dict(skip=skip, draft=draft, num_masks=2)
        return np.asarray(forward(config, params, jnp.array([[5]]), here, **options)[0])

    assert np.abs(logits(5) - logits(4)).max() > 0.01
    np.testing.assert_array_equal(logits(4), logits(3))
    size = config.hidden_size
    factors = {n: {"down": b["down"][:size], "up": b["up"]} for n, b in draft.bridges.items()}
    without = draft.replace(bridges=factors)
    np.testing.assert_array_equal(logits(5, without), logits(4, without))
