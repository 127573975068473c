"""Weight formats: one from outside serves the whole model; exact sums are a separate setting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s3d_jax.drafters.stored import merge_deltas
from s3d_jax.errors import ConfigError
from s3d_jax.lm import LM
from s3d_jax.nn.cache import init_cache
from s3d_jax.nn.transformer import abstract_params, forward, forward_logits, init_params
from s3d_jax.settings.drafting import DraftConfig
from s3d_jax.settings.model import QUANTIZATIONS, ModelConfig
from s3d_jax.weights import dense
from s3d_jax.weights.formats import FORMATS, exact_sums
from s3d_jax.weights.trees import store_tree, widen_tree
from tests.tiny import tiny_config, tiny_params
from tests.train.test_objective import noisy_draft

GROUP = 4


class Nibbles:
    """Two numbers from -8 to 7 in a byte, and a scale for every group of inputs."""

    exact_sums, trainable, takes_deltas = False, False, True

    def parts(self, name):
        return name, "group_scale"

    def declare(self, module, name, shape, dtype, init):
        (out, inputs), (name, scale) = shape, self.parts(name)
        return (
            module.param(name, jax.nn.initializers.zeros, (out, inputs // 2), jnp.uint8),
            module.param(scale, jax.nn.initializers.ones, (out, inputs // GROUP), jnp.float16),
        )

    def multiply(self, x, arrays, out_dtype):
        return dense.multiply(x, self.widen(arrays, x.dtype), out_dtype)

    def look_up(self, arrays, rows, dtype):
        return self.widen(tuple(a[rows] for a in arrays), dtype)

    def take_rows(self, arrays, rows):
        return tuple(a[rows] for a in arrays)

    def store(self, matrix):
        groups = np.asarray(matrix, np.float32).reshape(len(matrix), -1, GROUP)
        scale = (np.abs(groups).max(axis=-1) / 7).astype(np.float16)
        numbers = np.rint(groups / np.maximum(scale, 1e-4)[..., None]).astype(np.int8) + 8
        numbers = numbers.astype(np.uint8).reshape(len(matrix), -1, 2)
        return numbers[..., 0] | numbers[..., 1] << 4, scale

    def widen(self, arrays, dtype):
        packed, scale = arrays
        numbers = jnp.stack([packed & 15, packed >> 4], axis=-1).astype(jnp.float32) - 8
        groups = numbers.reshape(*scale.shape, GROUP) * scale[..., None].astype(jnp.float32)
        return groups.reshape(*scale.shape[:-1], -1).astype(dtype)

    def bound_by_memory(self, dtype, backend):
        return True


@pytest.fixture
def nibbles(monkeypatch):
    monkeypatch.setitem(QUANTIZATIONS, "nibbles", "four bits, for a test")
    monkeypatch.setitem(FORMATS, "nibbles", Nibbles())
    return tiny_config(quantization="nibbles", qkv_bias=True)


def test_every_format_has_a_description():
    assert set(FORMATS) == {None, *QUANTIZATIONS}


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), dict(tree))


@pytest.mark.parametrize("tied", [False, True])
def test_a_format_from_outside_serves_the_model(nibbles, tied):
    config = nibbles.replace(tie_embeddings=tied)
    plain = config.replace(quantization=None)
    stored = store_tree(config, jax.device_get(tiny_params(plain)))
    assert (
        shapes(stored)
        == shapes(abstract_params(config))
        == shapes(init_params(config, jax.random.key(0)))
    )
    assert stored["embed"]["embedding"].shape == (31, 12)
    stored = jax.device_put(stored)
    whole = widen_tree(config, stored, config.dtype)
    assert shapes(whole) == shapes(abstract_params(plain))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 31, (2, 20)), jnp.int32)
    logits = [forward_logits(c, p, tokens) for c, p in ((config, stored), (plain, whole))]
    np.testing.assert_allclose(*logits, atol=1e-5)


def test_a_format_from_outside_drafts(nibbles):
    plain = nibbles.replace(quantization=None)
    params = jax.device_put(store_tree(nibbles, jax.device_get(tiny_params(plain))))
    draft = DraftConfig((False, True, True, False), 3)
    arrays = merge_deltas(nibbles, params, noisy_draft(nibbles, params, draft))
    assert arrays.layers["layers_0"]["mlp"]["down"]["weight"].dtype == jnp.uint8
    lm = LM(nibbles, params, draft_config=draft, draft_params=arrays)
    whole = LM(plain, widen_tree(nibbles, params, plain.dtype))
    for method in ("ar", "s3d"):
        (ours,) = lm.generate([[1, 2, 3]], method=method, max_new_tokens=12)
        (expected,) = whole.generate([[1, 2, 3]], method="ar", max_new_tokens=12)
        assert ours.tokens == expected.tokens


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_exact_sums_are_a_setting_of_their_own(quantization):
    config = tiny_config(quantization=quantization, num_layers=1)
    assert exact_sums(config) == (quantization == "int8")
    params = tiny_params(config)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 31, (1, 30)), jnp.int32)
    cache = init_cache(config, 1, 64, np.zeros(1))
    found = {}
    for asked in (None, True, False):
        run = jax.jit(forward, static_argnums=0)
        text = run.lower(config.replace(exact_sums=asked), params, tokens, cache).as_text()
        # XLA's sums are float32; norms and softmax that are exact sum integers.
        found[asked] = text.count("stablehlo.bitcast_convert")
    assert found[True] > found[False]
    assert found[None] == found[quantization == "int8"]


def test_what_exact_sums_may_be():
    assert ModelConfig.from_dict(tiny_config(exact_sums=True).to_dict()).exact_sums is True
    older = tiny_config().to_dict()
    del older["exact_sums"]
    assert ModelConfig.from_dict(older).exact_sums is None
    for value in (1, "yes"):
        with pytest.raises(ConfigError, match="exact_sums must be True or False"):
            tiny_config(exact_sums=value)
