"""int8 weights: rounded right, multiplied exactly, and the same bits for a token in every block."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import hadamard

import s3d_jax
from s3d_jax import machine
from s3d_jax.drafters import stored
from s3d_jax.drafters.stored import merge_deltas, merged_bytes
from s3d_jax.errors import CheckpointError, ConfigError
from s3d_jax.lm import LM
from s3d_jax.nn import draft as draft_arrays
from s3d_jax.nn.cache import init_cache
from s3d_jax.nn.draft import mean_embedding, untrained_draft
from s3d_jax.nn.transformer import (
    abstract_params,
    forward,
    forward_logits,
    num_params,
    weight_bytes,
)
from s3d_jax.settings.drafting import DraftConfig
from s3d_jax.settings.model import RopeConfig
from s3d_jax.storage.trees import flatten
from s3d_jax.train.draft import DraftTask
from s3d_jax.weights import int8
from s3d_jax.weights.trees import store_tree, widen_tree
from tests.sampled import sampled
from tests.tiny import tiny_config, tiny_params
from tests.train.test_objective import noisy_draft

NAMES = ("int8", "int8-plain")
VARIANTS = {
    "plain": {},
    "one head per key": dict(num_heads=3, num_kv_heads=3),
    "tied": dict(tie_embeddings=True),
    "biases and head norms": dict(qkv_bias=True, mlp_bias=True, qk_norm=True),
    "gemma": dict(
        post_norms=True,
        norm_offset=1.0,
        attention_softcap=20.0,
        logit_softcap=10.0,
        sliding_window=(16, None, 16, None),
    ),
    "wide": dict(hidden_size=160, intermediate_size=420, head_dim=16, rope=RopeConfig(theta=5e5)),
    "bfloat16": dict(dtype="bfloat16"),
}


def quantized(changes, name="int8"):
    """A tiny model in float and in int8."""
    config = tiny_config(**changes)
    params = tiny_params(config, scale=6.0)
    stored = config.replace(quantization=name)
    return config, params, stored, jax.device_put(store_tree(stored, jax.device_get(params)))


# --- weights --------------------------------------------------------------------------------------


def test_weights_are_rounded_to_half_a_step():
    matrix = np.random.default_rng(0).normal(size=(40, 3000)).astype(np.float32)
    matrix[3], matrix[5, 7] = 0, 1e4
    whole, scale = int8.quantize(matrix)
    assert whole.dtype == np.int8 and scale.shape == (40,) and np.abs(whole).max() == 127
    error = np.abs(whole * scale[:, None] - matrix)
    assert (error <= scale[:, None] * 0.5000001).all() and not error[3].any()
    assert whole[5, 7] == 127 and np.isclose(scale[5], 1e4 / 127)
    np.testing.assert_array_equal(int8.quantize(-matrix)[0], -whole)


def test_rows_too_small_for_a_step_are_zeros():
    """Among float32's denormals a step is so coarse that numbers would not fit into int8."""
    matrix = np.outer([1e-45, 1e-43, 2e-43, 1e-37, 1e-36], np.linspace(-1, 1, 9)).astype(np.float32)
    whole, scale = int8.quantize(matrix)
    assert not whole[:4].any() and (scale[:4] == 1).all()
    assert np.abs(whole[4] * scale[4] - matrix[4]).max() <= scale[4] / 2 * 1.00001


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_not_finite_is_not_quantised(value, dtype, name):
    matrix = np.ones((40, 300), dtype)
    matrix[30, 7] = value
    with pytest.raises(ValueError, match="infinities or NaN"):
        store_tree(tiny_config(quantization=name), {"mlp": {"down": {"weight": matrix}}})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("changes", sampled(VARIANTS, ["tied", "gemma"]))
def test_the_tree_is_that_of_the_model_and_comes_back(changes, name):
    config, params, quantized_config, whole = quantized(changes, name)
    expected = abstract_params(quantized_config)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), whole) == jax.tree.map(
        lambda x: (x.shape, x.dtype), dict(expected)
    )
    assert num_params(quantized_config) == num_params(config)
    assert weight_bytes(quantized_config) == sum(x.nbytes for x in jax.tree.leaves(whole))
    back = flatten(widen_tree(quantized_config, whole, config.dtype))
    for path, x in flatten(params).items():
        assert back[path].shape == x.shape and back[path].dtype == x.dtype
        x, y = (np.asarray(a, np.float32) for a in (x, back[path]))
        if x.ndim == 1:
            np.testing.assert_array_equal(x, y)
        elif (
            name == "int8"
        ):  # at most half a step of the rotated row, whose numbers have its length
            length = np.linalg.norm(x, axis=-1)
            assert (
                np.linalg.norm(x - y, axis=-1) <= length * (0.5 / 127 * x.shape[1] ** 0.5)
            ).all()
        else:
            largest = np.abs(x).max(axis=-1, keepdims=True)
            assert (np.abs(x - y) <= largest * (0.5001 / 127 + 2**-8)).all()


def test_the_mean_of_the_table_is_that_of_the_float_one():
    config, params, quantized_config, whole = quantized({})
    table = np.asarray(params["embed"]["embedding"])
    np.testing.assert_allclose(
        mean_embedding(config, params, 2), np.mean(table**2, axis=0), rtol=1e-5
    )
    half_a_step = np.abs(table).max() / 254
    for c, tree, tolerance in ((config, params, 1e-7), (quantized_config, whole, half_a_step)):
        masks = untrained_draft(c, tree).mask_embeddings
        np.testing.assert_allclose(masks, table.mean(axis=0)[None], atol=tolerance)


@pytest.mark.usefixtures("compiled_here")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("power", [1, 2])
def test_the_mean_of_the_table_needs_no_copy_of_it(dtype, power):
    table = {
        "embedding": jax.ShapeDtypeStruct((32_000, 256), jnp.int8),
        "scale": jax.ShapeDtypeStruct((32_000,), jnp.float32),
    }
    config = tiny_config(vocab_size=32_000, hidden_size=256, quantization="int8")
    lowered = draft_arrays._mean_embedding.lower(config, table, jnp.dtype(dtype), power)
    program = lowered.compile()
    assert program.memory_analysis().temp_size_in_bytes < 2**20


# --- products -------------------------------------------------------------------------------------


def operands(rows: int, rotated: bool, dtype: str = "float32"):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(rows, 96)).astype(np.float32)
    x[0, :3] = 0, 127, -127
    whole, scale = int8.quantize(rng.normal(size=(70, 96)).astype(np.float32), rotated)
    return jnp.asarray(x, dtype), jnp.asarray(whole), jnp.asarray(scale)


def matrix_of(whole, scale, rotated: bool) -> np.ndarray:
    """The matrix of a product, float64 [out, 96]: 96 is three blocks of 32."""
    matrix = np.asarray(whole, np.float64) * np.asarray(scale, np.float64)[:, None]
    return matrix @ np.kron(np.eye(3), hadamard(32)) if rotated else matrix


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 9, 40])
def test_products_are_those_of_integers(rows, rotated):
    x, whole, scale = operands(rows, rotated)
    numbers, unit = np.asarray(x, np.float64), 1.0
    if rotated:
        power = np.floor(np.log2(np.abs(numbers).max(axis=1, keepdims=True)))
        unit = 2.0 ** (power + 1 - (24 - 5))  # sums of 32 numbers are below 2^24
        numbers = np.rint(numbers / unit) @ np.kron(np.eye(3), hadamard(32))
        assert np.abs(numbers).max() <= 2**24
    step = np.abs(numbers).max(axis=1, keepdims=True) / 127
    sums = np.rint(numbers / step).astype(np.int64) @ np.asarray(whole, np.int64).T
    for summed in (int8._int8_sums, int8._product):  # of CPUs, and of GPUs before Ampere
        product = jax.jit(int8._w8a8, static_argnames=("rotated", "sums"))
        y = product(x, whole, scale, rotated=rotated, sums=summed)
        np.testing.assert_allclose(y, sums * step * unit * np.asarray(scale), rtol=1e-6)
        assert not int8._w8a8(jnp.zeros_like(x), whole, scale, rotated, summed).any()


@pytest.mark.parametrize("rotated", [False, True])
def test_a_row_that_is_no_number_stays_so_alone(rotated):
    x, whole, scale = operands(4, rotated)
    for value in (np.nan, np.inf):
        y = np.asarray(int8._w8a8(x.at[1, 5].set(value), whole, scale, rotated, int8._product))
        assert np.isnan(y[1]).all() and np.isfinite(y[[0, 2, 3]]).all()


def test_rotation_keeps_the_rest_of_a_row_with_one_large_number():
    """What it is for: activations of language models are such rows."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 512)).astype(np.float32)
    x[:, 7] = 300
    matrix = rng.normal(size=(64, 512)).astype(np.float32)
    matrix[:, 7] = 0
    errors = []
    for rotated in (False, True):
        whole, scale = map(jnp.asarray, int8.quantize(matrix, rotated))
        y = np.asarray(int8._w8a8(jnp.asarray(x), whole, scale, rotated, int8._int8_sums))
        errors.append(np.linalg.norm(y - x @ matrix.T) / np.linalg.norm(x @ matrix.T))
    assert errors[0] > 0.5 and errors[1] < 0.12  # what remains is the rounding of the weight


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("dtype,tolerance", [("float32", 1e-6), ("bfloat16", 2**-8)])
def test_elsewhere_the_weight_alone_is_rounded(dtype, tolerance, rotated):
    x, whole, scale = operands(9, rotated, dtype)
    weight = matrix_of(whole, scale, rotated)
    terms = np.abs(np.asarray(x, np.float64)) @ np.abs(weight).T
    error = np.asarray(int8._w8a16(x, whole, scale, rotated)) - np.asarray(x, np.float64) @ weight.T
    assert (np.abs(error) / terms).max() <= tolerance


@pytest.mark.parametrize("capability,integers", [("7.5", True), ("8.0", False), ("12.0", False)])
def test_gpus_before_ampere_multiply_int8(monkeypatch, capability, integers):
    """By a stand-in of the device: what a GPU would get is lowered here, and not compiled."""
    device = SimpleNamespace(platform="gpu", compute_capability=capability)
    monkeypatch.setattr(machine, "default_device", lambda: device)
    x, whole, scale = operands(2, True, "float16")
    product = jax.jit(lambda x: int8.multiply(x, whole, scale, jnp.float16, True))
    text = product.trace(x).lower(lowering_platforms=("cuda",)).as_text()
    sums = re.findall(r"stablehlo.dot_general .*: \(tensor<2x96x(\w+)>, tensor<70x96x\w+>\)", text)
    assert sums == ["i8" if integers else "f16"]


@pytest.mark.parametrize("rotated", [False, True])
def test_the_gradient_is_that_of_the_product_without_rounding(rotated):
    x, whole, scale = operands(5, rotated)

    def product(x):
        return int8.multiply(x, whole, scale, jnp.float32, rotated)

    ours = jax.grad(lambda x: jnp.sum(jnp.sin(product(x))))(x)
    expected = np.cos(np.asarray(product(x))) @ matrix_of(whole, scale, rotated)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "shape", [(576, 576), (96, 4096), (40, 1152), (4096, 576), (18500, 576), (50, 1552), (50, 1000)]
)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9])
def test_sums_are_the_same_in_each_order(monkeypatch, rows, shape):
    """With and without VNNI, by old and new versions of jax: only one of them runs here."""
    rng = np.random.default_rng(0)
    x = rng.integers(-127, 128, (rows, shape[1]), np.int8)
    weight = rng.integers(-127, 128, shape, np.int8)
    x[0], weight[0] = 127, -127  # the largest sum
    for has, recent, slow in (
        (True, False, False),
        (True, True, False),
        (False, True, False),
        (False, False, True),
    ):
        monkeypatch.setattr(int8, "_multiplies_int8", lambda has=has: has)
        monkeypatch.setattr(int8, "_ANY_COLUMNS", recent)
        monkeypatch.setattr(int8, "_SLOW_PRODUCTS", slow)
        sums = int8._int8_sums(jnp.asarray(x), jnp.asarray(weight))
        np.testing.assert_array_equal(sums, x.astype(np.int32) @ weight.T.astype(np.int32))


@pytest.mark.parametrize("slow", [False, True])
def test_few_rows_are_summed_in_lanes_where_products_are_slow(monkeypatch, slow):
    monkeypatch.setattr(int8, "_SLOW_PRODUCTS", slow)
    weight = jax.ShapeDtypeStruct((40, 1152), jnp.int8)
    for count in (1, 32, 33):
        rows = jax.ShapeDtypeStruct((count, 1152), jnp.int8)
        text = jax.jit(lambda x, w: int8._int8_sums(x, w)).lower(rows, weight).as_text()
        assert ("dot_general" not in text) is (slow and count <= 32)


# --- the model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("changes", sampled(VARIANTS, ["gemma"]))
def test_a_token_gets_the_same_bits_alone_and_in_a_block(changes, name):
    """What makes verification exact, although activations are rounded."""
    _, _, config, params = quantized(changes | dict(num_layers=2) | cut(changes), name)
    rng = np.random.default_rng(0)
    run = jax.jit(forward, static_argnums=0, static_argnames="visible")
    tokens = jnp.asarray(rng.integers(0, config.vocab_size, (3, 100)), jnp.int32)
    length = jnp.asarray([1, 17, 60], jnp.int32)
    cache = init_cache(config, 3, 320, length)
    _, cache = run(config, params, tokens, cache.replace(length=jnp.zeros_like(length)))
    cache = cache.replace(length=length)
    for rows, counts in ((slice(3), (5,)), (slice(1, 2), (2, 24))):
        begin, here = jax.tree.map(lambda x, rows=rows: x[rows], cache), tokens[rows]
        alone, behind = [], begin
        for i in range(max(counts)):
            logits, behind = run(config, params, here[:, i : i + 1], behind, visible=128)
            behind = behind.replace(length=behind.length + 1)
            alone.append(logits[:, 0])
        for count in counts:
            block, _ = run(config, params, here[:, :count], begin, visible=320)
            np.testing.assert_array_equal(block, np.stack(alone[:count], axis=1))


def cut(changes):
    """Settings by layer, for two layers."""
    return {k: v[:2] for k, v in changes.items() if isinstance(v, tuple)}


@pytest.mark.parametrize("changes", sampled(VARIANTS, ["gemma"]))
def test_logits_are_near_those_of_the_float_model(changes):
    config, params, quantized_config, whole = quantized(changes)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 31, (2, 40)), jnp.int32)
    p = jax.nn.log_softmax(forward_logits(config, params, tokens))
    q = jax.nn.log_softmax(forward_logits(quantized_config, whole, tokens))
    assert float(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1))) <= 0.02


@pytest.mark.parametrize("name", sampled(["plain", "gemma"], ["plain"]))
def test_s3d_is_plain_decoding(name):
    _, _, config, params = quantized(VARIANTS[name])
    draft = DraftConfig((False, True, False, False), 5)
    trained = noisy_draft(config, params, draft)
    lm = LM(config, params, draft_config=draft, draft_params=merge_deltas(config, params, trained))
    for prompt in ([5, 6, 7], [1], list(range(20))):
        plain = lm.generate([prompt], max_new_tokens=90, method="ar")[0].tokens
        assert lm.generate([prompt], max_new_tokens=90)[0].tokens == plain


# --- drafts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_merged_deltas_draft_as_the_others(kind):
    config, params, quantized_config, whole = quantized({})
    if kind == "int8":
        config, params = quantized_config, whole
    draft = DraftConfig((False, True, False, False), 5)
    trained = noisy_draft(config, params, draft)
    merged = merge_deltas(config, params, trained)
    kept = [name for name in merged.layers]
    assert sorted(kept) == ["layers_0", "layers_2", "layers_3"] and not merged.deltas
    assert merged_bytes(params, trained) == sum(x.nbytes for x in jax.tree.leaves(merged.layers))
    cache = init_cache(config, 1, 40, jnp.zeros(1, jnp.int32))
    logits = [
        forward(config, params, jnp.asarray([[7]]), cache, skip=draft.skip, draft=d, num_masks=4)[0]
        for d in (trained, merged, untrained_draft(config, params))
    ]
    p, q, other = map(jax.nn.log_softmax, logits)
    kl, apart = (float(jnp.mean(jnp.sum(jnp.exp(p) * (p - x), axis=-1))) for x in (q, other))
    assert kl <= (1e-6 if kind == "float32" else 0.02) and apart > 0.05


def test_a_draft_that_is_not_finite_is_not_merged():
    _, _, config, params = quantized({})
    draft = noisy_draft(config, params, DraftConfig((False, True, False, False), 5))
    up = draft.deltas["layers_2"]["mlp"]["down"]["up"]
    draft.deltas["layers_2"]["mlp"]["down"]["up"] = up.at[0, 0].set(jnp.nan)
    with pytest.raises(CheckpointError, match=r"train it again: layers_2/mlp/down .* NaN"):
        merge_deltas(config, params, draft)


def test_a_full_draft_needs_float_weights():
    _, _, config, params = quantized({})
    with pytest.raises(ConfigError, match=r"mode 'full' changes the target's weights.*int8"):
        DraftTask(config, params, DraftConfig((False, True, True, False)), mode="full")


def test_small_drafts_are_merged_when_they_are_loaded(monkeypatch):
    assert s3d_jax.load().draft_params.layers and not s3d_jax.load().draft_params.deltas
    monkeypatch.setattr(stored, "MOST_MERGED", 1000)
    assert s3d_jax.load().draft_params.deltas and not s3d_jax.load().draft_params.layers
