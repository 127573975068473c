"""Many prompts in few rows: each gets what `generate` gives, and no row waits for another."""

import numpy as np
import pytest

import s3d_jax
from s3d_jax import machine
from s3d_jax.decoding.rows import put_row_jit
from s3d_jax.decoding.step import decode_jit
from s3d_jax.engine.queue import Queue
from s3d_jax.errors import ConfigError, DeviceError, InputError
from tests.tiny import tiny_lm

# Ends at many different places; more than one prefill chunk size.
NEW = [3, 40, 1, 17, 25, 8, 33, 2, 12, 40, 5]
PROMPTS = [[(7 * i + j) % 31 for j in range(1 + (6 * i) % 19)] for i in range(len(NEW))]


def outcomes(lm, prompts, rows, **options):
    """What `generate_many` yields: by number, and the order of the numbers."""
    found = list(lm.generate_many(prompts, rows=rows, **options))
    order = [i for i, _ in found]
    assert sorted(order) == list(range(len(prompts)))
    return [result for _, result in sorted(found, key=lambda item: item[0])], order


@pytest.fixture(scope="module")
def lm():
    model = tiny_lm()
    model.draft_model = model
    return model


@pytest.mark.parametrize(
    "options",
    [
        dict(method="ar"),
        dict(method="s3d", gamma=3, adaptive=False),
        dict(method="two-model", gamma=2),  # with a state of its own
        dict(
            method="s3d",
            gamma=3,
            adaptive=False,
            temperature=[0.0, 0.9, 1.3] * 3 + [0.0, 1.0],
            frequency_penalty=[0.0, 0.7] * 5 + [0.1],
            logit_bias=[{i: 2.0} for i in range(11)],
            seed=[100 + i for i in range(11)],
        ),
    ],
    ids=lambda options: f"{options['method']}{' sampled' * ('seed' in options)}",
)
def test_each_prompt_gets_what_it_gets_in_one_batch(lm, options):
    lm.programs.clear()
    results, order = outcomes(lm, PROMPTS, 3, max_new_tokens=NEW, **options)
    functions = [function for function, _ in lm.programs]
    assert functions.count(decode_jit) == functions.count(put_row_jit) == 1
    assert len(functions) - 2 == (4 if options["method"] == "two-model" else 2)  # two buckets
    together = lm.generate(PROMPTS, max_new_tokens=NEW, **options)
    for i, (result, plain) in enumerate(zip(results, together, strict=True)):
        assert result.tokens == plain.tokens and len(result.tokens) == NEW[i]
        assert result.stats.iterations == plain.stats.iterations
        assert result.stats.accepted_per_position == plain.stats.accepted_per_position
        assert result.stats.prompt_tokens == len(PROMPTS[i])
    assert order.index(2) < order.index(1)  # the short ones do not wait for the second


def test_no_row_waits_while_there_are_prompts(lm, monkeypatch):
    """Without a draft, an iteration commits a token of every row that has a prompt."""
    iterations, rows = [], 3
    decode = Queue._decode

    def counted(self, *arguments):
        lengths = np.array(self._state.cache.length)
        found = decode(self, *arguments)
        iterations.append((found[1] - lengths).max())
        return found

    monkeypatch.setattr(Queue, "_decode", counted)
    outcomes(lm, PROMPTS, rows, max_new_tokens=NEW, method="ar")
    # The last prompts to be begun leave rows empty, but not for longer than the longest takes.
    assert sum(NEW) <= rows * sum(iterations) <= sum(NEW) + (rows - 1) * max(NEW)
    assert rows * sum(iterations) < 0.7 * rows * sum(max(NEW[i : i + 3]) for i in range(0, 11, 3))


def test_texts_and_stop_strings_of_an_int8_model():
    lm = s3d_jax.load()
    prompts = ["Once upon a time", "A dog", "Lily", "One day, a girl"]
    options = dict(max_new_tokens=40, stop=[" a", "the"])
    heats, seeds = [0.0, 1.0, 1.0, 0.0], [5, 6, 7, 8]
    expected = []
    for i in (0, 2):  # two at once as well, so that the loop is the same program
        own = dict(temperature=heats[i : i + 2], seed=seeds[i : i + 2])
        expected += lm.generate(prompts[i : i + 2], **own, **options)
    assert "stop" in {result.finish_reason for result in expected}
    results, _ = outcomes(lm, prompts, 2, temperature=heats, seed=seeds, **options)
    for result, plain in zip(results, expected, strict=True):
        assert (result.tokens, result.text) == (plain.tokens, plain.text)
        assert (result.finish_reason, result.stopped_by) == (plain.finish_reason, plain.stopped_by)
    assert len([function for function, _ in lm.programs if function is decode_jit]) == 1


def test_one_row_runs_one_prompt_after_the_other(lm):
    results, order = outcomes(lm, PROMPTS[:3], 1, max_new_tokens=NEW[:3], method="ar")
    expected = lm.generate(PROMPTS[:3], max_new_tokens=NEW[:3], method="ar")
    assert [result.tokens for result in results] == [result.tokens for result in expected]
    assert order == [0, 1, 2]


def test_what_cannot_be_run_is_refused_at_once(lm, monkeypatch):
    for rows in (0, 2.5, "3"):
        with pytest.raises(InputError, match="rows must be an integer >= 1"):
            lm.generate_many(PROMPTS, rows=rows)
    with pytest.raises(InputError, match="seed has 2 entries for 11 prompts"):
        lm.generate_many(PROMPTS, seed=[1, 2])
    with pytest.raises(ConfigError, match="unknown generation options"):
        lm.generate_many(PROMPTS, rws=3)
    monkeypatch.setattr(machine, "_ALWAYS_TRIED", 0)
    monkeypatch.setattr(machine, "free_memory_bytes", lambda: 0)
    with pytest.raises(DeviceError, match=r"4 rows of 64 tokens need .* \(rows, --batch-size\)"):
        lm.generate_many(PROMPTS, rows=3, max_new_tokens=4)
