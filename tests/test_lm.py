"""LM: lossless on real checkpoints; options, stops, streams, errors, compilations."""

import dataclasses
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert
import s3d_jax
import s3d_jax.storage.native
from s3d_jax.decoding.step import decode_jit
from s3d_jax.engine.batch import UNLIMITED, Batch
from s3d_jax.errors import ConfigError, InputError
from s3d_jax.nn.draft import DraftParams
from s3d_jax.nn.transformer import init_params
from s3d_jax.settings.drafting import symmetric_skip
from tests.sampled import combinations, sampled
from tests.tiny import drafter_of, tiny_config, tiny_lm

REAL = ("babyllama-1m", "stories260k")
SKIPS = {
    "none": (False,) * 5,
    "middle": symmetric_skip(5, 2),
    "all but the first": (False, *(True,) * 4),
}


@pytest.fixture(scope="module")
def real(data_dir, tmp_path_factory) -> dict[str, s3d_jax.LM]:
    models = {}
    for name in REAL:
        native = tmp_path_factory.mktemp(name) / "native"
        convert.convert(data_dir / "checkpoints" / name, native, parity=False, progress=False)
        models[name] = s3d_jax.load(native)
    return models


@pytest.fixture(scope="module")
def baby(real) -> s3d_jax.LM:
    return real["babyllama-1m"]


@pytest.fixture(scope="module")
def tiny() -> s3d_jax.LM:
    return tiny_lm()


def ragged_prompts(lm: s3d_jax.LM) -> list[list[int]]:
    texts = (
        "O",
        "Once upon a time",
        "The",
        "Lily and Tom went to the",
        "A dog",
        "He",
        "One day, a girl",
    )
    return [lm.tokenizer.encode(t) for t in texts] + [[1]]


# --- lossless -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, skip, gamma",
    combinations(
        REAL,
        SKIPS,
        [1, 2, 4, 7],
        quick=[
            ("babyllama-1m", "middle", 4),
            ("babyllama-1m", "all but the first", 1),
            ("stories260k", "none", 2),
        ],
    ),
)
def test_s3d_equals_ar_on_real_checkpoints(real, name, skip, gamma):
    """Batch 1 and a ragged batch of 8; the compiled loop, and the stream of single steps."""
    lm = real[name]
    prompts = ragged_prompts(lm)
    ar = dict(max_new_tokens=100, method="ar")
    expected = [r.tokens for r in lm.generate(prompts, **ar)]
    options = dict(max_new_tokens=100, gamma=gamma, skip=SKIPS[skip])
    results = lm.generate(prompts, **options)
    assert [r.tokens for r in results] == expected
    assert all(1 <= r.stats.tokens_per_iteration <= gamma + 1 for r in results)
    streamed = Batch(lm, [np.asarray(p, np.int32) for p in prompts], **options)
    pieces = list(streamed.run(1))
    assert [sum((p[b] for p in pieces), []) for b in range(8)] == expected
    assert max(len(p[b]) for p in pieces for b in range(8)) <= gamma + 1

    alone = lm.generate(prompts[1], **options)[0]
    assert alone.tokens == expected[1] == lm.generate(prompts[1], **ar)[0].tokens
    stream = lm.stream(prompts[1], **options)
    assert "".join(stream) == alone.text == stream.result.text
    assert stream.result.tokens == alone.tokens


@pytest.mark.parametrize(
    "name, steps",
    combinations(REAL, [UNLIMITED, 1], quick=[("babyllama-1m", UNLIMITED), ("stories260k", 1)]),
)
def test_oracle_liar_and_noise_on_real_checkpoints(real, name, steps):
    """All accepted: τ = γ+1. None accepted: τ = 1. The text is always AR's."""
    lm, gamma, new = real[name], 4, 100
    prompts = [np.asarray(p, np.int32) for p in ragged_prompts(lm)]
    options = dict(max_new_tokens=new, eos_token_ids=())
    expected = [r.tokens for r in lm.generate(prompts, method="ar", **options)]
    table = np.zeros((len(prompts), 256), np.int32)
    for row, prompt, tokens in zip(table, prompts, expected, strict=True):
        row[: len(prompt) + new] = [*prompt, *tokens]

    def oracle(at, gamma):
        columns = at[:, None] + jnp.arange(gamma)
        return jnp.take_along_axis(jnp.asarray(table), columns, axis=1)

    def liar(at, gamma):
        return (oracle(at, gamma) + 1) % lm.config.vocab_size

    def noise(at, gamma):
        return (at[:, None] * 7 + jnp.arange(gamma) * 11) % lm.config.vocab_size

    for propose in (oracle, liar, noise):
        batch = Batch(lm.engine, prompts, gamma=gamma, **options)
        drafter = drafter_of(propose)(batch._spec.drafter.settings)
        batch._spec = dataclasses.replace(batch._spec, drafter=drafter)
        assert list(batch.run(steps))
        results = batch.results()
        assert [r.tokens for r in results] == expected
        taus = [r.stats.tokens_per_iteration for r in results]
        if propose is not noise:
            assert taus == [{oracle: gamma + 1, liar: 1}[propose]] * len(prompts)


def test_statistics_add_up(baby):
    result = baby.generate("Once upon a time", max_new_tokens=100, gamma=4, adaptive=False)[0]
    stats = result.stats
    assert stats.new_tokens == len(result.tokens) == 100
    assert stats.iterations + stats.accepted == 100
    assert stats.drafted == 4 * (stats.iterations - stats.plain_iterations)
    assert sum(stats.accepted_per_position) == stats.accepted
    assert list(stats.accepted_per_position) == sorted(stats.accepted_per_position, reverse=True)
    assert (
        stats.tokens_per_iteration == 100 / stats.iterations > 1.1
    )  # the untrained draft is right at times
    ar = baby.generate("Once upon a time", max_new_tokens=100, method="ar")[0].stats
    assert (ar.iterations, ar.drafted, ar.tokens_per_iteration) == (100, 0, 1.0)
    assert ar.peak_memory_bytes > 50 * 2**20


def test_text_continues_the_prompt(baby):
    prompt = "Once upon a time"
    result = baby.generate(prompt, max_new_tokens=60)[0]
    ids = baby.tokenizer.encode(prompt)
    assert (
        baby.tokenizer.decode(ids + result.tokens, skip_special_tokens=True) == prompt + result.text
    )


# --- options --------------------------------------------------------------------------------------


def test_rows_do_not_depend_on_their_neighbours(tiny):
    prompts, seeds, temperatures = [[1, 2], [3], [4, 5, 6]], [7, 8, 9], [0.0, 0.8, 1.2]
    options = dict(max_new_tokens=[9, 14, 20], gamma=3)
    batch = tiny.generate(prompts, seed=seeds, temperature=temperatures, **options)
    for b, prompt in enumerate(prompts):
        own = dict(max_new_tokens=options["max_new_tokens"][b], gamma=3, seed=[seeds[b]])
        alone = tiny.generate([prompt], temperature=temperatures[b], **own)[0]
        assert alone.tokens == batch[b].tokens
    assert [len(r.tokens) for r in batch] == [9, 14, 20]


def test_seeds(tiny):
    options = dict(max_new_tokens=20, temperature=1.5)
    first = tiny.generate([[1, 2]] * 3, seed=1, **options)
    again = tiny.generate([[1, 2]] * 3, seed=1, **options)
    other = tiny.generate([[1, 2]] * 3, seed=2, **options)
    assert [r.tokens for r in first] == [r.tokens for r in again]
    assert len({tuple(r.tokens) for r in [*first, *other]}) == 6


def test_a_sequence_of_seeds_holds_one_per_row(tiny):
    options = dict(max_new_tokens=20, temperature=1.5)
    expected = [r.tokens for r in tiny.generate([[1, 2]] * 2, seed=[0, 1], **options)]
    for seeds in (range(2), (0, 1), np.arange(2), [np.int64(0), jnp.int32(1)]):
        assert [r.tokens for r in tiny.generate([[1, 2]] * 2, seed=seeds, **options)] == expected
    assert expected[0] != expected[1]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("method", sampled(["ar", "s3d"], ["s3d"]))
@pytest.mark.parametrize("options", [{"temperature": 1e-44}, {"temperature": 1.0, "top_p": 1e-44}])
def test_the_smallest_temperature_and_top_p_are_greedy(tiny, options, method):
    greedy = tiny.generate([1, 2], max_new_tokens=20, method="ar")[0].tokens
    sampled = tiny.generate([1, 2], max_new_tokens=20, method=method, **options)[0].tokens
    assert sampled == greedy and set(greedy) != {0}


@pytest.mark.parametrize("method", sampled(["ar", "s3d"], ["s3d"]))
def test_logit_bias_forbids_and_forces(tiny, method):
    plain = tiny.generate([1, 2], max_new_tokens=12, method=method)[0].tokens
    biased = tiny.generate(
        [1, 2], max_new_tokens=12, method=method, logit_bias={plain[0]: -float("inf")}
    )[0].tokens
    assert plain[0] not in biased
    forced = tiny.generate([1, 2], max_new_tokens=12, method=method, logit_bias={5: 1e4})[0].tokens
    assert forced == [5] * 12


def test_penalties_act_and_are_the_same_for_both_methods(tiny):
    plain = tiny.generate([1, 2], max_new_tokens=30, method="ar")[0].tokens
    for penalty in (
        {"repetition_penalty": 1.8},
        {"frequency_penalty": 1.5},
        {"presence_penalty": 4.0},
    ):
        ar = tiny.generate([1, 2], max_new_tokens=30, method="ar", **penalty)[0].tokens
        s3d = tiny.generate([1, 2], max_new_tokens=30, gamma=5, skip=(False,) * 4, **penalty)[
            0
        ].tokens
        assert ar == s3d
        assert len(set(ar)) > len(set(plain))


def test_eos_ends_a_row_inside_the_block(tiny):
    plain = tiny.generate([[1, 2], [9]], max_new_tokens=30, method="ar")
    eos = plain[0].tokens[6]
    for method in ("ar", "s3d"):
        results = tiny.generate(
            [[1, 2], [9]], max_new_tokens=30, method=method, eos_token_ids=[eos, 30]
        )
        for result, full in zip(results, plain, strict=True):
            ends = [i for i, t in enumerate(full.tokens) if t in (eos, 30)]
            assert result.tokens == (full.tokens[: ends[0] + 1] if ends else full.tokens)
            assert result.finish_reason == ("stop" if ends else "length")
            assert result.stopped_by == (result.tokens[-1] if ends else None)


@pytest.mark.parametrize("method", sampled(["ar", "s3d"], ["s3d"]))
def test_stop_strings(baby, method):
    plain = baby.generate("Once upon a time", max_new_tokens=120, method="ar")[0]
    stop = plain.text[20:27]  # characters are tokens here, so this goes across their borders
    result = baby.generate(
        "Once upon a time", max_new_tokens=120, method=method, stop=["@@", stop]
    )[0]
    end = plain.text.index(stop)
    assert result.text == plain.text[:end]
    assert (result.finish_reason, result.stopped_by) == ("stop", stop)
    assert result.tokens == plain.tokens[: len(result.tokens)]
    assert baby.tokenizer.decode(result.tokens).endswith(stop)
    pieces = list(baby.stream("Once upon a time", max_new_tokens=120, method=method, stop=stop))
    assert "".join(pieces) == plain.text[:end]
    assert len(pieces) > 3
    batch = baby.generate(
        ["Once upon a time", "A dog"], max_new_tokens=120, method=method, stop=stop
    )
    assert batch[0].tokens == result.tokens
    alone = baby.generate("A dog", max_new_tokens=120, method=method, stop=stop)[0]
    assert batch[1].tokens == alone.tokens


@pytest.mark.parametrize(
    "method, temperature",
    combinations(["ar", "s3d"], [0.0, 1.0], quick=[("ar", 0.0), ("s3d", 1.0)]),
)
def test_stop_strings_end_a_row_where_a_look_after_each_step_would(
    baby, method, temperature, monkeypatch
):
    prompts = ["Once upon a time", "A dog", "One day, a girl"]
    options = dict(max_new_tokens=90, method=method, temperature=temperature, gamma=3)
    plain = baby.generate(prompts, **options)
    texts = [r.text for r in plain]
    for stop in ([texts[0][1:4]], [texts[1][40:43]], ["@", texts[2][83:87]], ["@@"]):
        rows = {}
        for steps in (8, 1):
            monkeypatch.setattr("s3d_jax.engine.batch._STEPS_PER_LOOK", steps)
            results = baby.generate(prompts, stop=stop, **options)
            for result, whole in zip(results, plain, strict=True):
                ends = [whole.text.index(s) for s in stop if s in whole.text]
                assert result.text == whole.text[: min(ends, default=None)]
                assert result.finish_reason == ("stop" if ends else whole.finish_reason)
            rows[steps] = [
                (r.tokens, r.stopped_by, r.stats.iterations, r.stats.accepted_per_position)
                for r in results
            ]
        assert rows[8] == rows[1]


def test_stop_strings_are_looked_for_every_few_steps(baby, monkeypatch):
    calls = []
    decode = Batch._decode
    monkeypatch.setattr(
        Batch, "_decode", lambda self, *args: calls.append(args) or decode(self, *args)
    )
    result = baby.generate("Once", max_new_tokens=80, method="ar", stop="@@")[0]
    assert (len(result.tokens), len(calls)) == (80, 10)
    calls.clear()
    pieces = list(baby.stream("Once", max_new_tokens=80, method="ar", stop="@@"))
    assert len(calls) == len(pieces) == 80


def test_the_end_of_the_cache_ends_a_row():
    lm = tiny_lm(max_position_embeddings=40)
    expected = tiny_lm().generate([[1, 2], [3] * 30], max_new_tokens=60, method="ar")
    for method in ("ar", "s3d"):
        results = lm.generate([[1, 2], [3] * 30], max_new_tokens=60, method=method)
        assert [len(r.tokens) for r in results] == [38, 10]
        assert all(r.finish_reason == "length" for r in results)
        assert all(
            r.tokens == e.tokens[: len(r.tokens)] for r, e in zip(results, expected, strict=True)
        )


def test_prompts_may_be_anything_of_the_kind(baby):
    ids = baby.tokenizer.encode("Once upon")
    expected = baby.generate("Once upon", max_new_tokens=8)[0].tokens
    for prompt in (ids, [ids], np.array(ids), [np.array(ids)], ["Once upon"], ("Once upon",)):
        results = baby.generate(prompt, max_new_tokens=8)
        assert len(results) == 1
        assert results[0].tokens == expected
    mixed = baby.generate(["Once upon", ids], max_new_tokens=8)
    assert [r.tokens for r in mixed] == [expected, expected]


def test_a_model_without_tokenizer_works_with_ids(tiny):
    result = tiny.generate([1, 2], max_new_tokens=5)[0]
    assert result.text is None and len(result.tokens) == 5
    stream = tiny.stream_tokens([1, 2], max_new_tokens=5)
    with pytest.raises(RuntimeError, match="read to its end"):
        _ = stream.result
    assert sum(stream, []) == result.tokens == stream.result.tokens


@pytest.mark.parametrize("in_a_program", [True, False])
def test_an_interrupted_stream_is_over_and_has_no_result(baby, monkeypatch, in_a_program):
    def interrupted(self, *args):
        if in_a_program:  # which has taken the arrays
            jax.tree.map(lambda array: array.delete(), self._state)
        raise KeyboardInterrupt

    whole = baby.generate("Once", max_new_tokens=20)[0]
    for make in (baby.stream, baby.stream_tokens):
        stream = make("Once", max_new_tokens=20)
        first = next(stream)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Batch, "_decode", interrupted)
            list(stream)
        assert list(stream) == [] and first in (
            whole.text[: len(first)],
            whole.tokens[: len(first)],
        )
        with pytest.raises(RuntimeError, match="without an interruption"):
            _ = stream.result


def test_chat_uses_the_template(baby):
    with pytest.raises(InputError, match="no chat template"):
        baby.chat([{"role": "user", "content": "Hi"}])
    baby.tokenizer.chat_template = (
        "{% for m in messages %}"
        "{% if m.role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
        "{{ m.role }}: {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    try:
        messages = [{"role": "user", "content": "Tell a story"}]
        ids = baby.chat_prompt(messages)
        assert baby.tokenizer.decode(ids).strip() == "user: Tell a story assistant:"
        answer = baby.chat(messages, max_new_tokens=10)
        assert answer.tokens == baby.generate(ids, max_new_tokens=10)[0].tokens
        with pytest.raises(InputError, match="no robots"):
            baby.chat([{"role": "robot", "content": "x"}])
        for wrong in ("Hello", ["Hello"], [{"content": "Hello"}], {"role": "user"}, None):
            with pytest.raises(InputError, match="messages are a list of"):
                baby.chat(wrong)
    finally:
        baby.tokenizer.chat_template = None


# --- compilations ---------------------------------------------------------------------------------


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
    monkeypatch.setattr("s3d_jax.lm.jax.devices", lambda: [device])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        s3d_jax.load(tmp_path / "model")
        s3d_jax.load(tmp_path / "model", dtype="float16")
    said = [str(w.message) for w in caught if "bfloat16" in str(w.message)]
    assert len(said) == (1 if warns else 0)
    assert all("Tesla T4" in text and "float16" in text for text in said)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompts, message",
    [
        ([], "no prompt"),
        ([[]], "prompt 0 is empty"),
        ([[1], []], "prompt 1 is empty"),
        ([[1, 31]], "token id 31; the vocabulary is 0 to 30"),
        ([[-1]], "token id -1"),
        ([[1.5]], "flat list of integers"),
        ([[[1]]], "flat list of integers"),
        ([[1, [2]]], r"prompt 0 must be .* flat list of integers, got \[1, \[2\]\]"),
        ([1, [2]], "flat list of integers"),
        ([[1], [2**70]], "prompt 1 must be"),
        ([None], "flat list of integers"),
        ("text", "no tokenizer"),
        ([[1] * 128], "128 tokens, and the cache holds 128"),
        (3, "a prompt is a text or a list of token ids"),
        (None, "a prompt is a text or a list of token ids"),
        ({"a": 1}, "a prompt is a text or a list of token ids"),
    ],
)
def test_bad_prompts(tiny, prompts, message):
    with pytest.raises(InputError, match=message):
        tiny.generate(prompts)


def test_numbers_may_be_those_of_numpy_and_jax(tiny):
    plain = tiny.generate(
        [[1, 2], [3]], max_new_tokens=9, gamma=2, top_k=[2, 3], temperature=0.5, seed=[4, 5]
    )
    of_libraries = tiny.generate(
        iter([jnp.array([1, 2]), np.array([3])]),
        max_new_tokens=np.int64(9),
        gamma=np.int64(2),
        skip=np.array([False, True, True, False]),
        top_k=np.array([2, 3]),
        temperature=np.float32(0.5),
        seed=jnp.array([4, 5]),
    )
    assert [r.tokens for r in plain] == [r.tokens for r in of_libraries]
    in_lists = tiny.generate(
        [[jnp.int32(1), np.int64(2)], (np.int8(3),)],
        max_new_tokens=[np.int64(9), jnp.int32(9)],
        gamma=2,
        skip=[np.bool_(False), np.True_, True, False],
        top_k=[np.int64(2), 3],
        temperature=[np.float32(0.5), 0.5],
        seed=[np.int64(4), jnp.int32(5)],
        eos_token_ids=[np.int64(30)],
        logit_bias={np.int64(3): np.float32(0.0), 4: jnp.float32(0)},
    )
    ends = [r.tokens.index(30) + 1 if 30 in r.tokens else 9 for r in plain]
    assert [r.tokens for r in in_lists] == [
        r.tokens[:end] for r, end in zip(plain, ends, strict=True)
    ]
    assert tiny.generate([jnp.int32(1), jnp.int32(2)], max_new_tokens=3)[0].tokens
    assert tiny.generate(jnp.array([1, 2]), max_new_tokens=3)[0].tokens


def test_an_empty_text_is_refused(baby):
    with pytest.raises(InputError, match="prompt 0 is empty"):
        baby.generate("")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"gamma": 0}, "gamma must be an integer >= 1"),
        ({"gamma": 2.5}, "gamma"),
        ({"gamma": 0, "method": "ar"}, "gamma"),
        ({"skip": (True, False)}, "skip has 2 entries, the model has 4 layers"),
        ({"skip": (True,) * 4}, "keeps no layer"),
        ({"method": "medusa"}, "method must be one of"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": [1, 2]}, "2 entries for 1 prompts"),
        ({"temperature": -0.1}, "temperature"),
        ({"typical_p": 0.5}, "unknown generation options.*typical_p"),
        ({"stop": "x"}, "need a tokenizer"),
        ({"logit_bias": {99: 1.0}}, "token 99"),
        ({"logit_bias": {2: 1e39}}, "within ±1e30"),
        ({"logit_bias": {2: "a"}}, "logit_bias"),
        ({"logit_bias": dict.fromkeys(range(31), -np.inf)}, "forbids every token"),
        ({"logit_bias": [(2, 1.0)]}, "dict from token id"),
        ({"logit_bias": {"a": 1.0, 3: 2.0}}, "logit_bias needs"),
        ({"top_k": [[1]]}, "top_k"),
        (
            {"frequency_penalty": 1e39},
            "frequency_penalty must be at least -1e.30 and at",
        ),
        ({"seed": range(2)}, "seed has 2 entries"),
        ({"seed": [1, 2]}, "seed has 2 entries"),
        ({"seed": 2**64}, "seed must be an integer"),
        ({"seed": "a"}, "seed must be an integer"),
        ({"seed": None}, "seed must be an integer"),
        ({"top_k": 2**40}, "top_k"),
        ({"top_k": True}, "top_k"),
        ({"top_p": None}, "top_p"),
        ({"max_new_tokens": True}, "max_new_tokens"),
        ({"eos_token_ids": 5}, "eos_token_ids must be a list"),
        ({"eos_token_ids": [999]}, "eos_token_ids must be a list of ids from 0 to 30"),
        ({"stop": None}, "stop must be"),
        ({"stop": 5}, "stop must be"),
        ({"skip": 2}, "skip must be a list"),
        ({"skip": (0, 1, 1, 0)}, "skip must hold only True and False"),
    ],
)
def test_bad_options(tiny, options, message):
    with pytest.raises((InputError, ConfigError), match=message):
        tiny.generate([[1]], **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"eos_token_ids": 2}, "eos_token_ids must be a list of ids from 0 to 30, got 2"),
        ({"eos_token_ids": (9999,)}, "eos_token_ids must be a list of ids from 0 to 30"),
        ({"eos_token_ids": None}, "eos_token_ids must be a list"),
        ({"max_length": 1}, "max_length must be an integer >= 2"),
        ({"max_length": True}, "max_length"),
    ],
)
def test_bad_models_are_refused_when_they_are_made(tiny, options, message):
    with pytest.raises((InputError, ConfigError), match=message):
        s3d_jax.LM(tiny.config, tiny.params, **options)


def test_a_model_takes_numbers_of_numpy(tiny):
    lm = s3d_jax.LM(tiny.config, tiny.params, eos_token_ids=np.array([2]), max_length=np.int64(50))
    assert (lm.eos_token_ids, lm.max_length) == ((2,), 50)
    assert type(lm.max_length) is int


# --- tokenizers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen2.5", "phi-3-mini"])
def test_large_tokenizers_load_in_silence_and_encode_as_before(data_dir, tmp_path, name, capfd):
    import transformers

    source = data_dir / "tokenizers" / name
    config = tiny_config()
    params = init_params(config, jax.random.key(0))
    s3d_jax.storage.native.save(tmp_path / "model", config, params, tokenizer=source)
    lm = s3d_jax.load(tmp_path / "model")
    assert "regex" not in "".join(capfd.readouterr())
    theirs = transformers.AutoTokenizer.from_pretrained(source, local_files_only=True)
    text = (data_dir / "text" / "wikitext2_valid.txt").read_text()[:50_000] + " 12345 don't \n\n 字"
    assert lm.tokenizer.encode(text) == theirs.encode(text)


@pytest.mark.parametrize(
    "file, advice",
    [("tokenizer.json", "JSONDecodeError"), ("tokenizer.model", "`pip install sentencepiece`")],
)
def test_an_unreadable_tokenizer_leaves_ids(tmp_path, monkeypatch, file, advice):
    monkeypatch.setattr("s3d_jax.storage.tokenizer.find_spec", lambda name: None)
    config = tiny_config()
    folder = s3d_jax.storage.native.save(
        tmp_path / "model", config, init_params(config, jax.random.key(0))
    )
    (folder / file).write_text("no tokenizer")
    with pytest.warns(UserWarning, match="cannot read the tokenizer.*--ids") as caught:
        lm = s3d_jax.load(folder)
    assert advice in str(caught[0].message)
    assert lm.tokenizer is None
    assert len(lm.generate([1, 2], max_new_tokens=3)[0].tokens) == 3


def test_streams_take_one_prompt(tiny):
    with pytest.raises(InputError, match="one prompt"):
        tiny.stream_tokens([[1], [2]])
    with pytest.raises(InputError, match="stream_tokens"):
        tiny.stream([1])
