"""How many programs are compiled, and what they read of the cache."""

import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import s3d_jax
import s3d_jax.storage.native
from s3d_jax.decoding.step import decode_jit
from s3d_jax.nn.draft import DraftParams
from s3d_jax.nn.transformer import init_params
from tests.sampled import sampled
from tests.tiny import tiny_config, tiny_lm


def test_programs_are_compiled_once():
    lm = tiny_lm()
    lm.generate([1] * 20, max_new_tokens=20)
    assert len(lm.programs) == 2  # prefill of a bucket; draft and verify in one
    assert lm.generate([2] * 25, max_new_tokens=20)[0].stats.compile_seconds == 0
    lm.generate([3] * 33, max_new_tokens=20)  # the largest prompt of this bucket: 32 and x_n
    assert sum(lm.stream_tokens([2] * 22, max_new_tokens=17), [])
    assert len(lm.programs) == 2
    lm.generate([1] * 20, max_new_tokens=20, method="ar")  # shares the prefill
    assert len(lm.programs) == 3
    lm.generate([1] * 20, max_new_tokens=20, temperature=1.0)
    assert len(lm.programs) == 4
    lm.generate([1] * 20, max_new_tokens=20, temperature=0.3, seed=4)
    assert len(lm.programs) == 4
    # Caches come in few sizes: other limits, and a row to its end, need nothing new.
    for limit in (18, 24, 26, 46):
        for method in ("s3d", "ar"):
            lm.generate([1] * 20, max_new_tokens=limit, method=method)
    assert len(lm.programs) == 4
    lm.generate([1] * 20, max_new_tokens=20, eos_token_ids=(2, 1))
    lm.generate([1] * 20, max_new_tokens=20, eos_token_ids=[1, 2, 1])
    assert len(lm.programs) == 5
    lm.generate([1] * 40, max_new_tokens=80)  # another bucket, and a cache of another size
    assert len(lm.programs) == 7


@pytest.mark.parametrize(
    "lengths, new_tokens",
    [
        (([64], [40], [34]), 200),  # grows past 256 slots
        (([257], [200], [255]), 20),  # starts on either side of 256
        (([300, 17], [270, 2], [385, 9]), [5, 500]),  # the short row continues alone
    ],
)
@pytest.mark.parametrize("method", sampled(["ar", "s3d"], ["s3d"]))
def test_prompt_lengths_within_a_bucket_share_all_programs(lengths, new_tokens, method):
    lm = tiny_lm(max_position_embeddings=1024)
    first, *others = ([[1] * n for n in row] for row in lengths)
    lm.generate(first, max_new_tokens=new_tokens, method=method)
    for prompts in others:
        results = lm.generate(prompts, max_new_tokens=new_tokens, method=method)
        assert results[0].stats.compile_seconds == 0


def test_a_row_s_end_brings_no_smaller_program():
    lm = tiny_lm(max_position_embeddings=1024)
    lm.generate([[1] * 300, [1]], max_new_tokens=[5, 60], progress=lambda n: None)
    assert len([function for function, _ in lm.programs if function is decode_jit]) == 1


@pytest.mark.parametrize("method", sampled(["ar", "s3d"], ["s3d"]))
def test_a_long_generation_reads_the_cache_in_stages(method):
    """The cache is allocated once; programs read 256, then 512, then 1024 slots of it."""
    lm = tiny_lm(max_position_embeddings=4096)
    prompts = [[1, 2], [3] * 100]
    whole = lm.generate(prompts, max_new_tokens=[600, 30], method=method)
    assert [len(r.tokens) for r in whole] == [600, 30]
    visible = [static["visible"] for f, static in lm.programs if f is decode_jit]
    assert visible == [256, 512, 768]  # the last one is the whole cache
    # The cache of this run is small enough to be read whole; it must give the same tokens.
    short = lm.generate(prompts, max_new_tokens=30, method=method)
    assert short[0].tokens == whole[0].tokens[:30] and short[1].tokens == whole[1].tokens
    streamed = sum(lm.stream_tokens(prompts[0], max_new_tokens=600, method=method), [])
    assert streamed == whole[0].tokens


def test_other_parameters_of_the_draft_get_programs_of_their_own():
    lm = tiny_lm()
    first = lm.generate([1, 2], max_new_tokens=20)[0]
    masks = lm.draft_params.mask_embeddings
    lm.draft_params = DraftParams(mask_embeddings=jnp.concatenate([masks] * 3))
    assert lm.generate([1, 2], max_new_tokens=20)[0].tokens == first.tokens


@pytest.mark.parametrize("capability, warns", [("7.5", True), ("8.0", False), ("gfx90a", False)])
def test_gpus_without_fast_bfloat16_are_warned_of(tmp_path, monkeypatch, capability, warns):
    config = tiny_config(dtype="bfloat16")
    s3d_jax.storage.native.save(tmp_path / "model", config, init_params(config, jax.random.key(0)))
    device = SimpleNamespace(compute_capability=capability, device_kind="Tesla T4", platform="gpu")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        s3d_jax.load(tmp_path / "model")
        s3d_jax.load(tmp_path / "model", dtype="float16")
    said = [str(w.message) for w in caught if "bfloat16" in str(w.message)]
    assert len(said) == (1 if warns else 0)
    assert all("Tesla T4" in text and "float16" in text for text in said)
