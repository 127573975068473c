"""LM is lossless on real checkpoints, whatever is drafted."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import s3d_jax
import s3d_jax.storage.native
from s3d_jax.engine.batch import Batch
from s3d_jax.engine.runner import UNLIMITED
from s3d_jax.settings.drafting import symmetric_skip
from tests.lm.conftest import REAL
from tests.sampled import combinations
from tests.tiny import drafter_of

SKIPS = {
    "none": (False,) * 5,
    "middle": symmetric_skip(5, 2),
    "all but the first": (False, *(True,) * 4),
}


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
        batch = Batch(lm.engine, prompts, gamma=gamma, copies=False, **options)
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
