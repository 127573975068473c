"""int4 weights: groups that are int8 numbers, four bits on disk, the same model on each backend."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from scipy.linalg import hadamard

from convert.__main__ import main
from s3d_jax import machine
from s3d_jax.errors import CheckpointError, ConfigError
from s3d_jax.lm import LM
from s3d_jax.nn.transformer import abstract_params, forward_logits, weight_bytes
from s3d_jax.settings.drafting import DraftConfig
from s3d_jax.storage import native as checkpoint
from s3d_jax.storage.arrays import ArrayWriter, read_array
from s3d_jax.storage.trees import flatten
from s3d_jax.weights import int4, int8
from s3d_jax.weights.base import num_bytes
from s3d_jax.weights.formats import in_memory
from s3d_jax.weights.trees import held_tree, store_tree, widen_tree
from tests.tiny import tiny_config, tiny_params
from tests.train.test_objective import noisy_draft

FORMAT = int4.Int4()


def quantized(**changes):
    """A tiny model in float, and in int4 as a checkpoint has it; in numpy."""
    config = tiny_config(**changes)
    params = jax.device_get(tiny_params(config, scale=6.0))
    stored = config.replace(quantization="int4")
    return config, params, stored, store_tree(stored, params)


# --- matrices -------------------------------------------------------------------------------------


def test_a_matrix_is_int8_with_16_values_in_each_group():
    matrix = np.random.default_rng(0).normal(size=(40, 192)).astype(np.float32)
    matrix[3], matrix[5, 7], matrix[6] = 0, 1e4, -matrix[7]
    numbers, factors, scale = arrays = int4.quantize(matrix)
    assert numbers.dtype == ml_dtypes.int4 and numbers.shape == (40, 192)
    assert factors.dtype == np.int8 and factors.shape == (40, 6) and np.abs(factors).max() <= 15
    assert scale.dtype == np.float32 and scale.shape == (40,)
    whole, same = FORMAT.as_int8(arrays)
    assert whole.dtype == np.int8 and np.abs(whole).max() <= 120 and same is scale
    by_hand = numbers.astype(int).reshape(40, 6, 32) * factors[..., None].astype(int)
    np.testing.assert_array_equal(whole, by_hand.reshape(40, 192))
    turned = np.kron(np.eye(3), hadamard(64))  # 192 is three blocks of 64
    expected = (whole * scale[:, None].astype(np.float64)) @ turned
    np.testing.assert_allclose(FORMAT.widen(arrays, np.float32), expected, rtol=1e-5, atol=1e-6)
    assert not expected[3].any()
    np.testing.assert_array_equal(whole[6], -whole[7])


def test_the_error_is_that_of_four_bits():
    """Gaussian rows in steps of the largest of 32 numbers have 0.099; a tenth of that is saved."""
    matrix = np.random.default_rng(0).normal(size=(256, 512)).astype(np.float32)
    error = FORMAT.widen(int4.quantize(matrix), np.float32) - matrix
    assert 0.07 < np.linalg.norm(error) / np.linalg.norm(matrix) < 0.09
    groups = matrix.reshape(256, -1, 32)
    step = np.abs(groups).max(axis=-1, keepdims=True) / 7
    plain = np.rint(groups / step) * step - groups
    assert np.linalg.norm(error) < 0.9 * np.linalg.norm(plain)


@pytest.mark.parametrize("inputs,groups", [(352, 11), (40, 5), (6, 3), (1536, 48)])
def test_groups_of_other_widths(inputs, groups):
    matrix = np.random.default_rng(0).normal(size=(5, inputs)).astype(np.float32)
    arrays = int4.quantize(matrix)
    assert arrays[1].shape == (5, groups)
    assert np.abs(FORMAT.widen(arrays, np.float32) - matrix).max() < 0.5


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_what_cannot_be_quantised_is_named(value):
    matrix = np.ones((40, 300), np.float32)
    with pytest.raises(ValueError, match="299 inputs, and int4 needs an even number"):
        int4.quantize(matrix[:, :299])
    matrix[30, 7] = value
    with pytest.raises(ValueError, match="infinities or NaN, which int4 cannot represent"):
        int4.quantize(matrix)
    with pytest.raises(ConfigError, match=r"even widths, and the model's are \(24, 41, 60\)"):
        tiny_config(quantization="int4", intermediate_size=41)


def test_products_and_gradients_are_those_of_int8():
    rng = np.random.default_rng(1)
    arrays = int4.quantize(rng.normal(size=(70, 96)).astype(np.float32))
    x = jnp.asarray(rng.normal(size=(5, 96)), jnp.float32)
    stored = tuple(map(jnp.asarray, arrays))
    whole, scale = map(jnp.asarray, FORMAT.as_int8(arrays))

    def product(x):
        return FORMAT.multiply(x, stored, jnp.float32)

    y = jax.jit(product)(x)
    of_int8 = jax.jit(lambda x: int8.multiply(x, whole, scale, jnp.float32, True))
    np.testing.assert_array_equal(y, of_int8(x))
    matrix = np.asarray(FORMAT.widen(arrays, np.float32), np.float64)
    gradient = jax.grad(lambda x: jnp.sum(jnp.sin(product(x))))(x)
    np.testing.assert_allclose(gradient, np.cos(np.asarray(y)) @ matrix, rtol=1e-4, atol=1e-4)
    # Elsewhere the weight alone is rounded.
    terms = np.abs(np.asarray(x, np.float64)) @ np.abs(matrix).T
    error = np.asarray(int8._w8a16(x, whole, scale, True)) - np.asarray(x, np.float64) @ matrix.T
    assert (np.abs(error) / terms).max() <= 1e-6


# --- the model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_the_tree_is_that_of_the_model(tied):
    _, params, stored, tree = quantized(tie_embeddings=tied, qkv_bias=True)
    found, expected = flatten(tree), flatten(abstract_params(stored))
    assert {k: (x.shape, x.dtype) for k, x in found.items()} == {
        k: (x.shape, x.dtype) for k, x in expected.items()
    }
    assert found["embed/embedding"].dtype == np.int8  # a token's rows stay in 8 bits
    assert found["layers_0/mlp/down/weight"].dtype == ml_dtypes.int4
    assert weight_bytes(stored) == num_bytes(tree)
    linear = tree["layers_0"]["mlp"]["gate_up"]
    assert num_bytes(linear) == 80 * 24 // 2 + 80 * 3 + 80 * 4
    back = flatten(widen_tree(stored, tree, "float32"))
    for path, x in flatten(params).items():
        if x.ndim == 2:
            assert np.linalg.norm(back[path] - x) < 0.12 * np.linalg.norm(x)
        else:
            np.testing.assert_array_equal(back[path], x)


def test_backends_hold_the_same_model():
    _, _, stored, tree = quantized()
    assert in_memory(stored, "gpu") == stored
    assert held_tree(stored, in_memory(stored, "gpu"), tree).keys() == tree.keys()
    assert in_memory(stored, "cpu") == stored.replace(quantization="int8")
    whole = held_tree(stored, in_memory(stored, "cpu"), tree)
    expected = abstract_params(in_memory(stored, "cpu"))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), whole) == jax.tree.map(
        lambda x: (x.shape, x.dtype), dict(expected)
    )
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 31, (2, 30)), jnp.int32)
    logits = [
        forward_logits(config, jax.device_put(params), tokens)
        for config, params in ((stored, tree), (in_memory(stored, "cpu"), whole))
    ]
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize("held", [True, False])
def test_s3d_is_plain_decoding(held):
    _, _, config, tree = quantized()
    params = jax.device_put(held_tree(config, in_memory(config, "cpu"), tree) if held else tree)
    config = in_memory(config, "cpu") if held else config
    draft = DraftConfig((False, True, False, False), 5)
    lm = LM(config, params, draft_config=draft, draft_params=noisy_draft(config, params, draft))
    for prompt in ([5, 6, 7], list(range(20))):
        plain = lm.generate([prompt], max_new_tokens=60, method="ar")[0].tokens
        assert lm.generate([prompt], max_new_tokens=60, adaptive=False)[0].tokens == plain


# --- files ----------------------------------------------------------------------------------------


def test_two_numbers_share_a_byte_on_disk(tmp_path):
    numbers = np.random.default_rng(0).integers(-8, 8, (64, 4096)).astype(ml_dtypes.int4)
    writer = ArrayWriter(tmp_path / "weights")
    writer.add({"a/weight": numbers})
    writer.finish()
    size = sum(f.stat().st_size for f in (tmp_path / "weights").rglob("*") if f.is_file())
    assert numbers.size // 2 <= size < numbers.size // 2 + 4096
    back = read_array(tmp_path / "weights", "a/weight", writer.index["a/weight"], numbers.dtype)
    np.testing.assert_array_equal(back, numbers)


def test_a_checkpoint_is_held_as_the_backend_needs_it(tmp_path, monkeypatch):
    _, _, config, tree = quantized()
    checkpoint.save(tmp_path / "model", config, tree)
    header = checkpoint.read_header(tmp_path / "model")
    assert header.config == config
    on_cpu = checkpoint.load(tmp_path / "model")
    assert on_cpu.header.config == config and on_cpu.config == in_memory(config, "cpu")
    held = held_tree(config, on_cpu.config, tree)
    jax.tree.map(np.testing.assert_array_equal, on_cpu.params, held)

    gpu = SimpleNamespace(platform="gpu", compute_capability="8.0", memory_stats=lambda: None)
    for module in (machine, checkpoint):
        monkeypatch.setattr(module, "default_device", lambda: gpu)
    elsewhere = checkpoint.load(tmp_path / "model", "bfloat16")
    assert elsewhere.config == config.replace(dtype="bfloat16")
    found = elsewhere.params["layers_0"]["mlp"]["down"]
    assert found["weight"].dtype == jnp.int4 and found["factors"].dtype == jnp.int8
    jax.tree.map(np.testing.assert_array_equal, found, tree["layers_0"]["mlp"]["down"])


def test_a_damaged_checkpoint_is_named(tmp_path):
    _, _, config, tree = quantized()
    tree["layers_1"]["mlp"]["down"]["weight"] = tree["layers_1"]["mlp"]["down"]["weight"][:, :-2]
    with pytest.raises(CheckpointError, match="layers_1/mlp/down/weight"):
        checkpoint.save(tmp_path / "model", config, tree)
    assert not (tmp_path / "model").exists()


def test_s3d_convert_makes_int4(tmp_path, capsys):
    """Through the command, from a model that stands for what people have."""
    config = tiny_config(hidden_size=64, intermediate_size=96, head_dim=16, num_heads=4)
    checkpoint.save(tmp_path / "float", config, jax.device_get(tiny_params(config, scale=2.0)))
    source, out = str(tmp_path / "float"), str(tmp_path / "out")
    assert main([source, out, "--quantize", "int4", "--quiet"]) == 0
    assert checkpoint.read_header(out).config.precision == "int4"
    lm = LM(*(getattr(checkpoint.load(out), name) for name in ("config", "params")))
    assert len(lm.generate([[1, 2]], max_new_tokens=8)[0].tokens) == 8
