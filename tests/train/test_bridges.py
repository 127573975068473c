"""Bridges that are fitted by least squares stand for the layers of their gap."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s3d_jax.nn.draft import bridge_name, recall
from s3d_jax.nn.layers import bridge, bridge_inputs, rms_norm
from s3d_jax.nn.streams import gap_streams, text_cache
from s3d_jax.nn.transformer import bound
from s3d_jax.settings.drafting import DraftConfig
from s3d_jax.settings.training import AdapterConfig
from s3d_jax.train.bridges import fitted_draft, gaps, linear_factors
from tests.tiny import tiny_config, tiny_params
from tests.train.test_objective import noisy_draft

SKIP = (False, True, True, False)


def test_gaps_are_named_by_the_layer_after_them():
    assert gaps((False, True, True, False, True)) == [3, 5]
    assert gaps((False,) * 3) == []
    assert [bridge_name(i, 5) for i in (3, 5)] == ["layers_3", "final_norm"]


def regression(rows=400, inputs=12, outputs=6):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(rows, inputs))
    x /= np.sqrt(np.mean(x * x, axis=1, keepdims=True))
    y = x @ generator.normal(size=(inputs, outputs)) * np.array([9, 5, 3, 1, 0.3, 0.1])
    return x, y + 0.1 * generator.normal(size=y.shape)


def applied(x, factors):
    return np.asarray(jax.nn.silu(jnp.float32(x) @ factors["down"]) @ factors["up"])


def test_a_fitted_bridge_is_linear_and_the_best_of_its_rank():
    x, y = regression()
    errors = []
    for rank in (12, 13, 6, 2):
        factors = linear_factors(x.T @ x, x.T @ y, rank)
        features = 2 * (rank // 2)  # and at most two for each output
        assert factors["down"].shape == (12, features) and factors["up"].shape == (features, 6)
        np.testing.assert_allclose(applied(2 * x, factors), 2 * applied(x, factors), atol=1e-3)
        errors.append(float(np.mean((applied(x, factors) - y) ** 2)))
    best = np.linalg.lstsq(x, y, rcond=None)[0]
    left = np.mean((x @ best - y) ** 2)
    shrunk = 1e-4 * np.mean(y**2)  # what the ridge costs, at most
    assert errors[0] == pytest.approx(left, abs=shrunk)
    assert errors[1] == errors[0]  # 12 features are six linear ones
    _, sizes, _ = np.linalg.svd(x @ best, full_matrices=False)
    for error, kept in zip(errors[2:], (3, 1), strict=True):
        lost = np.sum(sizes[kept:] ** 2) / y.size
        assert error == pytest.approx(left + lost, abs=shrunk)


def test_inputs_that_never_occur_are_no_trouble():
    x, y = regression()
    x[:, 3] = 0
    factors = linear_factors(x.T @ x, x.T @ y, 8)
    assert all(np.isfinite(f).all() for f in factors.values())
    nothing = linear_factors(np.zeros((12, 12)), np.zeros((12, 6)), 8)
    assert not np.any(applied(x, nothing))


@functools.cache
def tokens(seed=3):
    return np.asarray(jax.random.randint(jax.random.key(seed), (2, 21), 0, 31))


@pytest.mark.parametrize("skip", [SKIP, (True, False, False, True), (False, True, False, True)])
def test_what_is_wanted_makes_the_draft_s_stream_the_target_s(skip):
    config = tiny_config()
    params = tiny_params(config)
    draft_config = DraftConfig(skip, 3)
    after = gaps(skip)[-1]
    draft = noisy_draft(config, params, draft_config, recall=2)
    name = bridge_name(after, config.num_layers)
    known = draft.replace(bridges={k: v for k, v in draft.bridges.items() if k != name})
    anchors = jnp.array([[0, 9, 3], [16, 1, 18]])
    arguments = (config, params, draft_config, known, jnp.asarray(tokens()), anchors, after)
    inputs, wanted = gap_streams(*arguments, 2)
    size = config.hidden_size
    assert inputs.shape == (2, 9, size + 2 * config.num_kv_heads * config.head_dim)
    # The target's stream before the layer, by a pass over the text alone.
    target = bound(config, params)
    cache = text_cache(config, params, tokens(), 24)
    x, shared = target.begin(jnp.asarray(tokens()), cache, visible=21)
    full, cache = target.run_layers(x, cache, shared, layers=range(after))
    _, cache = target.run_layers(full, cache, shared, layers=range(after, config.num_layers))
    # The draft's, and what it recalls, by a pass of decoding.
    for row, a in np.ndindex(2, 3):
        place = int(anchors[row, a])
        one = jax.tree.map(lambda x, row=row: x[row : row + 1], cache)
        one = one.replace(length=jnp.array([place]))
        block = bound(config, params, known)
        last = jnp.asarray(tokens()[row : row + 1, place : place + 1])
        x, shared = block.begin(last, one, draft=known, num_masks=2)
        drafted, _ = block.run_layers(x, one, shared, skip=skip, layers=range(after))
        here = slice(3 * a, 3 * a + 3)
        recalled = recall(one, shared.layouts, 2, 3, config.norm_eps)
        expected = bridge_inputs(drafted, config.norm_eps, recalled)[0]
        np.testing.assert_allclose(inputs[row, here], expected, atol=2e-5)
        missing = full[row, place : place + 3] - drafted[0]
        np.testing.assert_allclose(wanted[row, here], missing, atol=2e-5)


@pytest.mark.parametrize("skip", [SKIP, (False, True, False, True)])
def test_a_fit_explains_layers_that_are_skipped(skip):
    """Errors of the stream on other rows, with the fitted bridges and without."""
    config = tiny_config()
    params = tiny_params(config)
    draft_config = DraftConfig(skip, 2)
    learn = np.ones((2, 21), bool)
    learn[:, 0] = False
    adapter = AdapterConfig(bridge_rank=48, recall=2)

    def batches(i):
        return {"tokens": tokens(100 + i), "learn": learn}

    draft = fitted_draft(config, params, draft_config, adapter, batches, 40)
    assert list(draft.bridges) == [bridge_name(i, config.num_layers) for i in gaps(skip)]
    for after in gaps(skip):
        name = bridge_name(after, config.num_layers)
        known = draft.replace(bridges={k: v for k, v in draft.bridges.items() if k != name})
        anchors = jnp.arange(1, 19).reshape(1, -1).repeat(2, 0)
        streams = jax.jit(gap_streams, static_argnums=(0, 2, 6, 7))
        x, wanted = streams(
            config, params, draft_config, known, jnp.asarray(tokens(9)), anchors, after, 2
        )
        added = applied(x, draft.bridges[name])
        first = slice(None, None, 2)  # x_n of each block
        error = np.mean((added - wanted)[:, first] ** 2) / np.mean(wanted[:, first] ** 2)
        assert error < 0.7


def test_bridge_inputs_repeat_what_is_recalled():
    x = jnp.arange(24.0).reshape(1, 6, 4)
    known = jnp.array([[[7.0, 8.0], [1.0, 2.0]]])
    inputs = bridge_inputs(x, 1e-5, known)
    np.testing.assert_array_equal(inputs[0, :, 4], [7, 7, 7, 1, 1, 1])
    np.testing.assert_allclose(inputs[..., :4], rms_norm(x, 1e-5))
    factors = {"down": jnp.ones((6, 3)), "up": jnp.ones((3, 4))}
    expected = x + jax.nn.silu(inputs @ factors["down"]) @ factors["up"]
    np.testing.assert_allclose(bridge(x, factors, 1e-5, known), expected, rtol=1e-5)
