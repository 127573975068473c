"""Wrong prompts, options and models are refused; numbers of libraries are not."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest

import s3d_jax
from s3d_jax.errors import ConfigError, InputError
from s3d_jax.settings.model import RopeConfig
from s3d_jax.storage import native
from tests.tiny import tiny_config, tiny_params


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


def test_half_a_character_is_refused_where_it_is(baby, monkeypatch):
    half = "caf\ud83d"
    with pytest.raises(InputError, match=r"prompt 1 is no valid text.*half a character.*ud83d"):
        baby.generate(["Once", half])
    with pytest.raises(InputError, match=r"prompt 0 is no valid text"):
        baby.stream(half)
    with pytest.raises(InputError, match=r"stop is no valid text: 'caf\\ud83d' holds half"):
        baby.generate("Once", stop=["@", half])
    template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    monkeypatch.setattr(baby.tokenizer, "chat_template", template)
    parts = [{"type": "text", "text": half}]
    for content in (half, parts):
        with pytest.raises(InputError, match=r"message 1, 'content', is no valid text"):
            baby.chat([{"role": "user", "content": "a"}, {"role": "user", "content": content}])
    conversation = baby.conversation()
    with pytest.raises(InputError, match=r"message 0, 'content', is no valid text"):
        conversation.send(half)
    assert conversation.messages == []
    with pytest.raises(InputError, match=r"message 0, 'content', is no valid text"):
        baby.conversation(half)


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
        ({"skip": (True,) * 4}, "skips all"),
        ({"method": "hydra"}, "method must be one of"),
        ({"method": "medusa"}, "s3d train --kind medusa"),
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


def test_more_tokens_than_the_model_was_made_for_are_warned_of(tmp_path):
    for rope in (RopeConfig(), RopeConfig("dynamic", 2.0, original_max_position_embeddings=128)):
        config = tiny_config(rope=rope)
        native.save(tmp_path / rope.type, config, tiny_params(config))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            s3d_jax.load(tmp_path / rope.type, max_length=128)
    assert s3d_jax.load(tmp_path / "dynamic", max_length=129).max_length == 129  # made to continue
    with pytest.warns(UserWarning, match="is 129, and the model was made for 128 .* give fewer"):
        s3d_jax.load(tmp_path / "default", max_length=129)


def test_a_model_takes_numbers_of_numpy(tiny):
    lm = s3d_jax.LM(tiny.config, tiny.params, eos_token_ids=np.array([2]), max_length=np.int64(50))
    assert (lm.eos_token_ids, lm.max_length) == ((2,), 50)
    assert type(lm.max_length) is int


def test_streams_take_one_prompt(tiny):
    with pytest.raises(InputError, match="one prompt"):
        tiny.stream_tokens([[1], [2]])
    with pytest.raises(InputError, match="stream_tokens"):
        tiny.stream([1])
