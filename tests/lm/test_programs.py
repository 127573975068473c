"""How many programs are compiled, and what they read of the cache."""

import re
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import s3d_jax
import s3d_jax.storage.native
from s3d_jax.decoding.step import decode_jit
from s3d_jax.engine.programs import keep_programs
from s3d_jax.machine import memory_maps
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
    lm.generate([1] * 40, max_new_tokens=80)  # another bucket, and a cache of another size
    assert len(lm.programs) == 6


def test_other_end_of_text_ids_compile_nothing():
    lm = tiny_lm()
    whole = lm.generate([1] * 20, max_new_tokens=20)[0].tokens
    compiled = len(lm.programs)
    for ids in ([whole[9]], (whole[5], 0), range(8), [1, 2, 1], ()):
        result = lm.generate([1] * 20, max_new_tokens=20, eos_token_ids=ids)[0]
        end = next((i for i, token in enumerate(whole) if token in ids), None)
        assert result.tokens == (whole if end is None else whole[: end + 1])
        assert result.stopped_by == (None if end is None else whole[end])
    assert len(lm.programs) == compiled
    # More than 8 ids share a larger size.
    for ids in (range(22, 31), range(31)):
        assert lm.generate([1] * 20, max_new_tokens=20, eos_token_ids=ids)[0].tokens[-1] in ids
    assert len(lm.programs) == compiled + 1


def test_a_process_keeps_a_bounded_number_of_programs():
    """Also in the middle of a text, and the other model's programs count too."""
    prompts, models = [[1] * 20, [2, 3]], [tiny_lm(), tiny_lm(seed=1)]
    expected = [[r.tokens for r in lm.generate(prompts, max_new_tokens=20)] for lm in models]
    assert [len(lm.programs) for lm in models] == [2, 2]
    keep_programs(1)
    try:
        assert [len(lm.programs) for lm in models] == [0, 1]
        for lm, tokens in zip(models, expected, strict=True):
            stream = lm.stream_tokens(prompts[1], max_new_tokens=20)
            begun = next(stream)
            assert [r.tokens for r in lm.generate(prompts, max_new_tokens=20)] == tokens
            assert begun + sum(stream, []) == tokens[1]
            assert sum(len(lm.programs) for lm in models) == 1
    finally:
        keep_programs(64)
    for most in (0, 1.5, None):
        with pytest.raises(s3d_jax.ConfigError, match="integer >= 1, got"):
            keep_programs(most)


@pytest.mark.skipif(memory_maps() is None, reason="only Linux counts memory maps")
def test_a_forgotten_program_gives_its_memory_maps_back():
    lm = tiny_lm()
    lm.generate([1, 2], max_new_tokens=4)
    before = memory_maps().used
    for rows in (2, 3, 4):
        lm.generate([[1, 2]] * rows, max_new_tokens=4)
    taken = memory_maps().used - before
    lm.programs.clear()
    assert taken > 200 and memory_maps().used < before + 50


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


def test_another_number_of_rows_compiles_its_programs_and_nothing_else(caplog):
    """Small arrays are made without a program of their own: jax would keep those forever."""
    lm = tiny_lm(num_layers=1)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for rows in (3, 4):  # keys are made for 4 rows each time
            caplog.clear()
            lm.generate([[1, 2]] * rows, max_new_tokens=4, temperature=1.0)
    text = [r.getMessage() for r in caplog.records]
    compiled = [m[1] for t in text if (m := re.match(r"Compiling (?:jit\()?([\w<>]+)", t))]
    assert sorted(compiled) == ["decode", "make", "prefill_chunk"]  # "make": caches


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


@pytest.mark.parametrize("capability, before", [("7.5", True), ("8.0", False), ("gfx90a", False)])
def test_gpus_without_fast_bfloat16_take_float16(tmp_path, monkeypatch, capability, before):
    """Where nothing is asked for. bfloat16 is warned of there, and taken if it is asked for."""
    config = tiny_config(dtype="bfloat16")
    s3d_jax.storage.native.save(tmp_path / "model", config, init_params(config, jax.random.key(0)))
    device = SimpleNamespace(compute_capability=capability, device_kind="Tesla T4", platform="gpu")
    monkeypatch.setattr("jax.local_devices", lambda: [device])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [
            s3d_jax.load(tmp_path / "model", dtype=dtype).config.dtype
            for dtype in (None, "float32", "bfloat16")
        ]
    assert found == ["float16" if before else "bfloat16", "float32", "bfloat16"]
    said = [str(w.message) for w in caught if "bfloat16" in str(w.message)]
    assert len(said) == (1 if before else 0)
    assert all("Tesla T4" in text and "float16" in text for text in said)


def test_models_that_overflow_in_float16_are_taken_in_float32(tmp_path, monkeypatch):
    gemma = tiny_config(dtype="bfloat16", post_norms=True, norm_offset=1.0)
    s3d_jax.storage.native.save(tmp_path / "model", gemma, init_params(gemma, jax.random.key(0)))
    device = SimpleNamespace(compute_capability="7.5", device_kind="Tesla T4", platform="gpu")
    monkeypatch.setattr("jax.local_devices", lambda: [device])
    assert s3d_jax.load(tmp_path / "model").config.dtype == "float32"
    with pytest.warns(UserWarning, match="model is a model of Gemma's kind, which overflows"):
        s3d_jax.load(tmp_path / "model", dtype="float16")
