"""Attention that goes through a long cache block by block, and caches that are rings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s3d_jax.decoding import sizes
from s3d_jax.decoding.prefill import prefill_jit
from s3d_jax.nn import attention
from s3d_jax.nn import transformer as model
from s3d_jax.nn.attention import attend
from s3d_jax.nn.cache import init_cache, layer_slots
from s3d_jax.nn.transformer import fill_cache, forward, forward_logits
from s3d_jax.settings.drafting import DraftConfig
from s3d_jax.settings.model import RopeConfig
from tests.tiny import tiny_config, tiny_params
from tests.train.test_objective import noisy_draft

WINDOW, BLOCK, SLOTS = 5, 4, 64
CONFIG = tiny_config(
    sliding_window=(WINDOW, None, 7), local_rope=RopeConfig(theta=500.0), num_layers=3
)
PARAMS = tiny_params(CONFIG)
run = jax.jit(lambda tokens, cache: forward(CONFIG, PARAMS, tokens, cache))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention_block_by_block_equals_attention_at_once(softcap, monkeypatch):
    """Values and gradients; 300 slots in blocks of 128, of which the last overlaps another."""
    rng = np.random.default_rng(0)
    shapes = (2, 7, 6, 10), (2, 2, 300, 10), (2, 2, 300, 10)
    q, k, v, weigh = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in (*shapes, shapes[0]))
    mask = rng.random((2, 7, 300)) < 0.1
    mask[0, :, :140] = False  # a block that nobody looks at, and tokens that see one slot alone
    mask[1, 3] = np.arange(300) == 299
    mask[:, :, 200] |= ~mask.any(axis=-1)

    def both(whole_bytes):
        monkeypatch.setattr(attention, "_WHOLE_BYTES", whole_bytes)
        monkeypatch.setattr(attention, "_BLOCK_BYTES", 1)

        def weighed(q, k, v):
            out = attend(q * 5, k, v, mask, 1.0, softcap)
            return jnp.sum(out * weigh), out

        return jax.jit(jax.grad(weighed, (0, 1, 2), has_aux=True))(q, k, v)

    for a, b in zip(*map(jax.tree.leaves, (both(0), both(10**9))), strict=True):
        assert not np.array_equal(a, b)  # they are two ways
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_in_bfloat16_many_blocks_are_as_exact_as_attention_at_once(monkeypatch):
    """Sums over 32 blocks, of which each adds less than the last bit of a 16-bit sum."""
    rng = np.random.default_rng(0)
    shapes = (1, 5, 6, 10), (1, 2, 4096, 10), (1, 2, 4096, 10)
    q, k, v = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in shapes)
    v = v + 1  # or the mean of so many values would be nothing but noise
    mask = np.ones((1, 5, 4096), bool)

    def out(whole_bytes, *arrays):
        monkeypatch.setattr(attention, "_WHOLE_BYTES", whole_bytes)
        monkeypatch.setattr(attention, "_BLOCK_BYTES", 1)
        return np.asarray(attend(*arrays, mask, 0.3, None), np.float32)

    exact = out(10**9, *(x.astype(jnp.float32) for x in (q, k, v)))
    whole, blocks = out(10**9, q, k, v), out(0, q, k, v)
    rounding = 2.0**-8 * np.abs(exact)  # of the output alone: half a unit in its last place
    assert np.all(np.abs(blocks - exact) <= rounding + 1e-3)
    assert np.all(np.abs(blocks - whole) <= 2 * rounding + 1e-3)


@pytest.mark.usefixtures("compiled_here")
def test_the_memory_of_a_prefill_grows_with_the_length_and_not_with_its_square():
    # The last layer only writes its keys and values.
    config = tiny_config(num_layers=2, num_heads=32, num_kv_heads=32, head_dim=2)
    params = jax.eval_shape(lambda: model.init_params(config, jax.random.key(0)))
    sizes = []
    for slots in (8192, 32768):
        cache = jax.eval_shape(lambda n=slots: init_cache(config, 1, n, jnp.ones(1, jnp.int32)))
        block = jax.ShapeDtypeStruct((1, 512), jnp.int32)
        lowered = prefill_jit.lower(config, params, block, cache, jnp.int32(0))
        sizes.append(lowered.compile().memory_analysis().temp_size_in_bytes)
    mask = 512 * (32768 - 8192)  # what does grow: one byte per token and slot
    assert sizes[1] - sizes[0] < 2 * mask
    assert sizes[1] < 100e6  # the scores of one layer would be 2.1e9


def test_rings_give_what_all_slots_give_whatever_is_rolled_back():
    """Rows advance by different amounts, 0 included; blocks and rests of blocks come in turns."""
    rng = np.random.default_rng(0)
    length, prompt = np.zeros(3, np.int32), np.full(3, 50)
    tight = init_cache(CONFIG, 3, SLOTS, prompt, BLOCK - 1)  # a slot less is refused, see below
    whole = init_cache(CONFIG, 3, SLOTS, prompt)
    assert [k.shape[2] for k in tight.keys] == [8, SLOTS, 10]
    assert tight.slots == whole.slots == SLOTS
    while length.min() < SLOTS - BLOCK:
        size = int(rng.choice([1, BLOCK]))
        tokens = jnp.asarray(rng.integers(0, 31, (3, size)))
        logits, caches = [], []
        for cache in (tight, whole):
            out, cache = run(tokens, cache.replace(length=jnp.asarray(length)))
            logits.append(out)
            caches.append(cache)
        np.testing.assert_allclose(*logits, atol=1e-4)
        tight, whole = caches
        length = np.minimum(length + rng.integers(0, size + 1, 3), SLOTS - BLOCK).astype(np.int32)


def test_a_block_that_does_not_fit_a_ring_is_refused():
    cache = init_cache(CONFIG, 1, SLOTS, jnp.ones(1), BLOCK - 2)
    tokens = jnp.zeros((1, BLOCK), jnp.int32)
    with pytest.raises(ValueError, match="a block of 4 tokens does not fit a ring of 7 slots"):
        forward(CONFIG, PARAMS, tokens, cache)


def test_a_short_prompt_next_to_a_long_one_is_not_overwritten(monkeypatch):
    """Prefill of the long one continues for more slots than the short one's rings have."""
    monkeypatch.setattr(sizes, "PREFILL_BUCKETS", (4, 8))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 31, n).astype(np.int32) for n in (3, 50, 21)]
    lengths = np.array([3, 50, 21])
    cache = init_cache(CONFIG, 3, SLOTS, lengths, 8)
    padded = np.zeros((3, SLOTS), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    offset = 0
    for chunk in sizes.prefill_chunks(49):
        block = padded[:, offset : offset + chunk]
        cache = prefill_jit(CONFIG, PARAMS, block, cache, jnp.int32(offset))
        offset += chunk
    assert cache.length.tolist() == [2, 49, 20]
    last = np.array([[prompt[-1]] for prompt in prompts])
    logits, _ = run(last, cache)
    expected = forward_logits(CONFIG, PARAMS, jnp.asarray(padded))
    for row, out, n in zip(np.asarray(expected), np.asarray(logits), lengths, strict=True):
        np.testing.assert_allclose(out[0], row[n - 1], atol=1e-4)


def test_bytes_of_the_cache_of_mistral_and_gemma():
    """At 32k in 16 bits, in GB, of all slots and of rings with room for blocks of 512."""
    mistral = dict(num_layers=32, num_kv_heads=8, head_dim=128, sliding_window=(4096,) * 32)
    local = (*(512,) * 5, None)
    gemma = dict(num_layers=26, num_kv_heads=1, head_dim=256, num_heads=4)
    gemma["sliding_window"] = (local * 5)[:26]
    for fields, whole, rings in ((mistral, 4.29, 0.60), (gemma, 0.872, 0.157)):
        config = tiny_config(dtype="bfloat16", **({"num_heads": 32} | fields))
        sizes = []
        for block in (None, 512):
            cache = jax.eval_shape(lambda c=config, n=block: init_cache(c, 1, 32768, np.ones(1), n))
            sizes.append(sum(2 * x.size for x in (*cache.keys, *cache.values)) / 1e9)
            assert [k.shape[2] for k in cache.keys] == list(layer_slots(config, 32768, block))
        assert sizes == pytest.approx([whole, rings], rel=0.01)


@pytest.mark.parametrize("skip", [(0, 1, 1, 0), (1, 0, 0, 1), (0, 1, 0, 1)])
def test_a_layer_that_is_not_kept_does_as_if_it_were_skipped(skip):
    """Bridges and deltas included; `keep` is an array, so all sets of layers share one program."""
    config = tiny_config()
    params = tiny_params(config)
    skip = tuple(map(bool, skip))
    draft = noisy_draft(config, params, DraftConfig(skip, 3))
    assert draft.bridges and draft.deltas
    cache = init_cache(config, 2, 20, np.ones(2)).replace(length=jnp.asarray([3, 0]))
    tokens = jnp.asarray([[5], [9]])
    options = dict(draft=draft, num_masks=2, bidirectional=True)
    keep = ~jnp.asarray(skip)
    skipped, _ = jax.jit(lambda: forward(config, params, tokens, cache, skip=skip, **options))()
    run = jax.jit(lambda keep: forward(config, params, tokens, cache, keep=keep, **options))
    kept, _ = run(keep)
    np.testing.assert_allclose(kept, skipped, atol=1e-5)
    everything, _ = run(jnp.ones(4, bool))
    assert np.abs(everything - kept).max() > 0.1 and run._cache_size() == 1


def test_filling_the_cache_writes_what_the_forward_pass_writes():
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 31, (2, 9)))
    cache = init_cache(CONFIG, 2, SLOTS, np.ones(2))
    _, expected = forward(CONFIG, PARAMS, tokens, cache)
    filled = fill_cache(CONFIG, PARAMS, tokens, cache)
    jax.tree.map(np.testing.assert_array_equal, filled, expected)
