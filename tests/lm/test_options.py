"""What the options of `generate`, `stream` and `chat` do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s3d_jax.engine.batch import Batch
from s3d_jax.errors import InputError
from tests.sampled import combinations, sampled
from tests.tiny import tiny_lm


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
    options["adaptive"] = False  # what is measured must not decide
    plain = baby.generate(prompts, **options)
    texts = [r.text for r in plain]
    for stop in ([texts[0][1:4]], [texts[1][40:43]], ["@", texts[2][83:87]], ["@@"]):
        rows = {}
        for steps in (8, 1):
            monkeypatch.setattr("s3d_jax.engine.batch.STEPS_PER_LOOK", steps)
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
