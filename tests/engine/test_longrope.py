"""LongRoPE: the whole text is rotated again when it grows past the original length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s3d_jax.decoding import sizes
from s3d_jax.nn.cache import init_cache
from s3d_jax.nn.transformer import forward
from s3d_jax.settings.model import RopeConfig
from tests.tiny import tiny_lm

TURN = 20
ROPE = RopeConfig(
    "longrope",
    theta=50.0,
    short_factors=(1.0, 1.1, 1.3, 1.7, 2.0),
    long_factors=(1.2, 2.5, 4.0, 9.0, 15.0),
    original_max_position_embeddings=TURN,
    attention_factor=1.2,
)
LENGTHS = (3, TURN - 1, TURN, TURN + 1, 30)
NEW = 24


@pytest.fixture(scope="module")
def lm():
    model = tiny_lm(rope=ROPE)
    model.draft_model = model
    return model


@pytest.fixture(scope="module")
def expected(lm):
    """Without cache or loop: each token from the whole text before it, rotated for its length."""

    @jax.jit
    def logits(tokens, length):
        cache = init_cache(lm.config, 1, 64, length[None])
        return forward(lm.config, lm.params, tokens[None], cache)[0][0, length - 1]

    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 31, n).tolist() for n in LENGTHS]
    outputs = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(NEW):
            row = np.zeros(64, np.int32)
            row[: len(tokens)] = tokens
            tokens.append(int(jnp.argmax(logits(row, jnp.int32(len(tokens))))))
        outputs.append(tokens[len(prompt) :])
    return prompts, outputs


# A draft of the whole model, so that blocks of accepted tokens reach over the turning point.
DRAFTS = {"ar": {}, "s3d": dict(gamma=3, skip=[False] * 4), "two-model": dict(gamma=3)}


@pytest.mark.parametrize("method", DRAFTS)
def test_past_the_turning_point(lm, expected, method, monkeypatch):
    monkeypatch.setattr(sizes, "PREFILL_BUCKETS", (4, 8))  # several chunks, also at the turn
    prompts, outputs = expected
    options = dict(max_new_tokens=NEW, method=method, **DRAFTS[method])
    results = lm.generate(prompts, **options)
    assert [result.tokens for result in results] == outputs
    for result in results:
        stats = result.stats
        assert result.finish_reason == "length"
        # One bonus token per iteration, but where a block was cut: at the end, and at the turn.
        assert stats.accepted + stats.iterations - 2 <= NEW <= stats.accepted + stats.iterations
        if method != "s3d":  # the model drafts for itself: all that it says stands
            before = max(0, TURN + 1 - stats.prompt_tokens)
            size = DRAFTS[method].get("gamma", 0) + 1
            assert stats.iterations == -(-before // size) + -(-(NEW - before) // size)

    # Row 2 gets its only token by short factors at once, and stops if that token ends it.
    stopped = lm.generate(prompts, eos_token_ids=outputs[2][:1], **options)
    assert stopped[2].tokens == outputs[2][:1] and stopped[2].finish_reason == "stop"
    for result, output in zip(stopped, outputs, strict=True):
        assert result.tokens == output[: len(result.tokens)]


def test_a_stream_continues_past_the_turning_point(lm, expected):
    prompts, outputs = expected
    streamed = lm.stream_tokens(prompts[1], max_new_tokens=NEW, **DRAFTS["s3d"])
    assert sum(streamed, []) == outputs[1]


def test_rows_that_take_prompt_after_prompt_continue_past_the_turning_point(lm, expected):
    prompts, outputs = expected
    options = dict(max_new_tokens=NEW, adaptive=False, **DRAFTS["s3d"])
    found = dict(lm.generate_many(prompts, rows=2, **options))
    assert [found[i].tokens for i in range(len(prompts))] == outputs
    for i, plain in enumerate(lm.generate(prompts, **options)):
        assert found[i].stats.accepted_per_position == plain.stats.accepted_per_position
