"""Keys and values in int8: rounded well and once, read right, never copied or widened at large."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s3d_jax.decoding.prefill import prefill_jit
from s3d_jax.decoding.rows import put_row_jit
from s3d_jax.decoding.sampling import batch_sampling
from s3d_jax.decoding.state import DecodeSpec
from s3d_jax.decoding.step import decode_jit
from s3d_jax.drafters.s3d import S3D
from s3d_jax.nn import attention
from s3d_jax.nn.attention import attend, layout_after_committed
from s3d_jax.nn.cache import cache_bytes, grown, init_cache, write
from s3d_jax.nn.draft import recall
from s3d_jax.nn.rounded import Rounded, empty, rounded, widened
from s3d_jax.nn.transformer import forward
from s3d_jax.settings.drafting import DraftConfig
from s3d_jax.settings.sampling import SamplingConfig
from s3d_jax.weights.base import num_bytes
from tests.sampled import combinations
from tests.tiny import begin, tiny_config, tiny_params
from tests.train.test_objective import noisy_draft
from tests.weights.test_int8 import quantized

RNG = np.random.default_rng(0)
FLOAT32 = jnp.dtype("float32")


@pytest.fixture(autouse=True)
def _same_numbers_in_any_order():
    """Each test draws its numbers from the beginning, whatever ran before it."""
    RNG.bit_generator.state = np.random.default_rng(0).bit_generator.state


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numbers_are_rounded_to_half_a_step_of_their_head(dtype):
    x = RNG.normal(size=(2, 3, 6, 16)).astype(np.float32)
    x[0, 1, 2], x[0, 0, 3], x[1, 2, 5] = 0, x[0, 0, 3] * 1e30, x[1, 2, 5] * 1e-40
    x[1, 0, 0, 7] = 1e4
    x = jnp.asarray(x, dtype)
    found = rounded(x, jnp.dtype(dtype))
    assert found.numbers.dtype == jnp.int8 and found.scales.dtype == jnp.float32
    assert (found.shape, found.scales.shape) == ((2, 3, 6, 16), (2, 3, 6, 1))
    whole, error = np.asarray(x, np.float32), np.asarray(widened(found) - x.astype(jnp.float32))
    largest = np.abs(whole).max(axis=-1, keepdims=True)
    assert np.all(np.abs(error) <= largest / 127 / 2 * 1.0001 + 1e-30)
    assert not np.asarray(found.numbers)[0, 1, 2].any() and np.isfinite(found.scales).all()
    assert np.asarray(found.numbers)[1, 0, 0, 7] == 127
    np.testing.assert_array_equal(rounded(-x, found.dtype).numbers, -found.numbers)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_head_that_is_not_finite_stays_so_and_the_others_do_not_notice(value):
    x = normal(2, 3, 4, 8)
    found = rounded(x.at[1, 2, 3, 5].set(value), FLOAT32)
    bad = np.isnan(np.asarray(widened(found))).all(axis=-1)
    assert bad.sum() == 1 and bad[1, 2, 3]
    assert np.isfinite(np.asarray(found.scales)).sum() == bad.size - 1


@pytest.mark.parametrize("starts, ring", [([3], False), ([3, 0], False), ([7, 2], True)])
@pytest.mark.parametrize("count", [1, 4])
def test_what_is_written_is_rounded_and_the_rest_stays(starts, ring, count):
    old, new = normal(len(starts), 2, 9, 8), normal(len(starts), 2, count, 8)
    before, start = rounded(old, FLOAT32), jnp.asarray(starts)
    after = write(before, new, start, ring)
    assert isinstance(after, Rounded)
    expected = write(widened(before), widened(rounded(new, FLOAT32)), start, ring)
    np.testing.assert_array_equal(widened(after), expected)


# --- attention ------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole_bytes", [10**9, 0], ids=["at once", "block by block"])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("queries", [1, 7])
def test_attention_reads_what_the_cache_stands_for(queries, exact, whole_bytes, monkeypatch):
    """Grouped queries; scales of very different size; 300 slots in blocks of 128."""
    monkeypatch.setattr(attention, "_WHOLE_BYTES", whole_bytes)
    monkeypatch.setattr(attention, "_BLOCK_BYTES", 1)
    q = normal(2, queries, 6, 10)
    k, v = (normal(2, 2, 300, 10) * jnp.exp(2 * normal(2, 2, 300, 1)) for _ in range(2))
    mask = RNG.random((2, queries, 300)) < 0.3
    mask[..., 0] = True
    k, v = rounded(k, FLOAT32), rounded(v, FLOAT32)
    found = attend(q, k, v, mask, 0.3, 20.0, exact)
    expected = attend(q, widened(k), widened(v), mask, 0.3, 20.0, exact)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype, last_bit", [("bfloat16", 2.0**-8), ("float16", 2.0**-11)])
def test_in_16_bits_weights_lose_no_more_than_with_a_float_cache(dtype, last_bit):
    """4,096 slots of small values: weights times scales would be denormal numbers of float16."""
    q, k, v = normal(1, 3, 6, 10), normal(1, 2, 4096, 10), 0.01 * (1 + normal(1, 2, 4096, 10))
    k, v = (rounded(x, jnp.dtype(dtype)) for x in (k, v))
    mask = np.ones((1, 3, 4096), bool)
    q = q.astype(dtype)
    found = np.asarray(attend(q, k, v, mask, 0.3, None), np.float32)
    exact = attend(q.astype(jnp.float32), widened(k), widened(v), mask, 0.3, None)
    assert np.abs(found / exact - 1).max() < 2 * last_bit


def test_a_query_that_does_not_see_a_broken_token_does_not_notice_it():
    config = tiny_config(kv_cache="int8", num_layers=1)
    params = tiny_params(config)
    params["embed"]["embedding"] = params["embed"]["embedding"].at[7].set(jnp.nan)
    cache = init_cache(config, 1, 20, jnp.ones(1))
    run = jax.jit(forward, static_argnums=0)
    logits, cache = run(config, params, jnp.asarray([[1, 2, 7, 3]]), cache)
    assert np.isfinite(logits[0, :2]).all() and np.isnan(logits[0, 2:]).all(axis=-1).all()
    # A stale key after the committed tokens is not seen.
    cache = cache.replace(length=jnp.asarray([2]))
    assert np.isfinite(run(config, params, jnp.asarray([[4, 5, 6, 8]]), cache)[0]).all()


VARIANTS = {
    "grouped": {},
    "one head per key": dict(num_heads=3, num_kv_heads=3),
    "rings": dict(sliding_window=(16, None), num_kv_heads=1, attention_softcap=20.0),
    "bfloat16": dict(dtype="bfloat16"),
}


def _float_products_keep_bits(config, params, tokens) -> bool:
    """Whether tokens have the same logits alone and in a block where no cache is rounded."""
    config = config.replace(kv_cache=None, exact_sums=True)
    run = jax.jit(forward, static_argnums=0)
    rows, count = tokens.shape
    cache, alone = init_cache(config, rows, 64, jnp.full(rows, count)), []
    block, _ = run(config, params, tokens, cache)
    for i in range(count):
        logits, cache = run(config, params, tokens[:, i : i + 1], cache)
        cache = cache.replace(length=cache.length + 1)
        alone.append(logits[:, 0])
    return bool((block == jnp.stack(alone, axis=1)).all())


@pytest.mark.parametrize(
    "name, weights",
    combinations(VARIANTS, ["int8", "float"], quick=[("rings", "int8"), ("grouped", "float")]),
)
def test_a_token_gets_the_same_bits_alone_and_in_a_block(name, weights):
    """Logits and cache: a token's numbers do not depend on the pass that wrote them."""
    *floats, config, params = quantized(VARIANTS[name] | dict(kv_cache="int8", num_layers=2))
    counts = [2, 5, 16]
    if weights == "float":  # products of floats promise it for few rows only
        config, params = floats
        counts = [2, 5]
    run = jax.jit(forward, static_argnums=0, static_argnames="visible")
    tokens = jnp.asarray(RNG.integers(0, 31, (2, 60)), jnp.int32)
    if weights == "float" and not _float_products_keep_bits(config, params, tokens[:, :5]):
        pytest.skip("float products of this CPU (one without AVX-512) depend on the rows beside")
    length = jnp.asarray([17, 23], jnp.int32)
    begun = init_cache(config, 2, 320, length, 24)
    for first in (0, 17):  # 24 tokens at most, which a ring of this size holds
        here = tokens[:, first : first + 24]
        _, begun = run(config, params, here, begun.replace(length=jnp.full(2, first)))
    begun, behind, alone = begun.replace(length=length), begun.replace(length=length), []
    tokens = tokens[:, 30:]
    for i in range(counts[-1]):
        logits, behind = run(config, params, tokens[:, i : i + 1], behind, visible=128)
        behind = behind.replace(length=behind.length + 1)
        alone.append(logits[:, 0])
    for count in counts:
        block, after = run(config, params, tokens[:, :count], begun, visible=320)
        np.testing.assert_array_equal(block, np.stack(alone[:count], axis=1))
    for a, b in zip(*map(jax.tree.leaves, (after.keys, behind.keys)), strict=True):
        if a.shape[2] == 320:  # without the scratch slot after a single token
            for row, n in enumerate(length.tolist()):
                here = slice(n + counts[-1])
                np.testing.assert_array_equal(a[row, :, here], b[row, :, here])


# --- the cache ------------------------------------------------------------------------------------


def test_a_cache_takes_the_bytes_that_are_said_and_grows():
    config = tiny_config(kv_cache="int8", dtype="bfloat16", sliding_window=(5, None, None, 5))
    cache = init_cache(config, 3, 20, np.ones(3), largest_block=4)
    arrays = jax.tree.leaves((cache.keys, cache.values))
    assert len({x.unsafe_buffer_pointer() for x in arrays}) == len(arrays) == 16
    heads = config.num_kv_heads * (config.head_dim + 4)  # a byte each, and a float32 scale
    assert num_bytes(arrays) == 3 * cache_bytes(config, 20, 4) == 3 * 2 * heads * (20 + 9) * 2
    larger = grown(cache, config, 50, 4)
    assert num_bytes((larger.keys, larger.values)) == 3 * cache_bytes(config, 50, 4)
    assert (larger.kind, cache.kind, init_cache(tiny_config(), 1, 9, np.ones(1)).kind) == (
        "int8",
        "int8",
        None,
    )
    assert larger.keys[1].dtype == jnp.bfloat16


@pytest.mark.parametrize("window", [None, 5])
def test_a_draft_recalls_what_the_values_stand_for(window):
    config = tiny_config(kv_cache="int8", sliding_window=None if window is None else (window,) * 4)
    cache = init_cache(config, 2, 40, np.ones(2), largest_block=5)
    values = tuple(rounded(normal(*v.shape), FLOAT32) for v in cache.values)
    cache = cache.replace(values=values, length=jnp.asarray([23, 0]))
    floats = cache.replace(values=tuple(map(widened, values)))
    layouts = [layout_after_committed(cache, 4, False, values[0].shape[2])] * 4
    found, expected = (recall(c, layouts, 2, 4, 1e-5) for c in (cache, floats))
    np.testing.assert_array_equal(found, expected)
    assert np.abs(found[0]).max() > 1 and not found[1].any()


def states(config, prompts, slots, gamma=3):
    sampling, features = batch_sampling(
        [SamplingConfig()] * len(prompts), jax.random.split(jax.random.key(0), len(prompts)), 31
    )
    skip = (False, *(True,) * (config.num_layers - 2), False)
    spec = DecodeSpec(config, S3D(DraftConfig(skip, gamma)), features)
    return spec, begin(spec, prompts, [60] * len(prompts), slots, sampling)


@pytest.mark.usefixtures("compiled_here")
@pytest.mark.parametrize("prompts", [[[1, 2]], [[1] * n for n in (1, 3, 17)]], ids=len)
def test_programs_write_in_place(prompts):
    config = tiny_config(kv_cache="int8", num_layers=3, head_dim=20)
    params, sizes = tiny_params(config), []
    for slots in (512, 4096):
        spec, state = states(config, prompts, slots)
        draft = noisy_draft(config, params, spec.drafter.settings, recall=2)
        programs = [
            decode_jit.lower(spec, params, draft, state, jnp.int32(5), 64),
            prefill_jit.lower(config, params, state.tokens[:, :32], state.cache, jnp.int32(0), 64),
        ]
        if len(prompts) > 1:
            new = states(config, [[7, 8]], slots)[1]
            programs.append(put_row_jit.lower(state, jnp.int32(1), new))
        memory = [program.compile().memory_analysis() for program in programs]
        arrays = jax.tree.leaves((state.cache.keys, state.cache.values))
        assert all(m.alias_size_in_bytes >= num_bytes(arrays) for m in memory)
        sizes.append([m.temp_size_in_bytes for m in memory])
    # Less than a copy of the smallest array, the scales; a copy of `state.tokens` takes half.
    assert max(np.subtract(sizes[1], sizes[0])) < 0.6 * min(map(num_bytes, arrays))


@pytest.mark.usefixtures("compiled_here")
def test_a_cpu_widens_one_layer_at_a_time():
    """Products need float operands. What is widened for them must not grow with the layers."""
    taken = {}
    for layers in (3, 9):
        config = tiny_config(kv_cache="int8", num_layers=layers, head_dim=64)
        spec, state = states(config, [[1, 2]], 4096)
        params = jax.eval_shape(lambda c=config: tiny_params(c))
        draft = jax.eval_shape(
            lambda p, c=config, s=spec: noisy_draft(c, p, s.drafter.settings), params
        )
        program = decode_jit.lower(spec, params, draft, state, jnp.int32(5), None).compile()
        taken[layers] = program.memory_analysis().temp_size_in_bytes
    layer = num_bytes(jax.eval_shape(lambda: empty((1, 2, 4096, 64), "float32", None)))
    assert taken[9] < 3 * layer and taken[9] - taken[3] < layer / 4


def test_kinds_are_part_of_the_static_description():
    """So programs of one kind are never called with arrays of the other."""
    config = tiny_config()
    assert dataclasses.replace(config, kv_cache="int8") != config
    a, b = (jax.tree.structure(empty((1, 1, 1, 2), "float32", kind)) for kind in (None, "int8"))
    assert a != b
