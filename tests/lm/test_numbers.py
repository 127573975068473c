"""Logits that are no numbers end a row with an error; other rows are not affected."""

import io
import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import s3d_jax
from s3d_jax.commands.main import main
from s3d_jax.decoding.step import are_usable
from s3d_jax.drafters import registry
from s3d_jax.errors import CheckpointError, NumericalError
from s3d_jax.lm import LM
from s3d_jax.settings.drafting import PromptLookupConfig
from s3d_jax.storage import native as checkpoint
from s3d_jax.train.distill import distill
from tests.tiny import drafter_of, tiny_config, tiny_lm, tiny_params

PROMPT, OTHER = [1, 2, 3], [4, 5, 6, 7]


def poisoned(token: int, **changes) -> LM:
    """A model that computes NaN from where it reads the token."""
    lm = tiny_lm(tie_embeddings=False, **changes)
    table = lm.params["embed"]["embedding"]
    lm.params = {**lm.params, "embed": {"embedding": table.at[token].set(jnp.nan)}}
    return lm


@pytest.fixture(scope="module")
def expected():
    lm = tiny_lm(tie_embeddings=False)
    return [r.tokens for r in lm.generate([PROMPT, OTHER], method="ar", max_new_tokens=12)]


@pytest.mark.parametrize("method", ["ar", "s3d", "prompt-lookup", "self-spec"])
def test_a_row_ends_where_its_logits_are_no_numbers(expected, method):
    """The token after which the model breaks is still valid; the other row is complete."""
    other, ours = expected
    token = next(t for t in ours if t not in [*other, *PROMPT, *OTHER])
    valid = ours[: ours.index(token) + 1]
    lm = poisoned(token)
    whole, broken = lm.generate([PROMPT, OTHER], method=method, max_new_tokens=12)
    assert (broken.tokens, broken.finish_reason) == (valid, "error")
    assert (whole.tokens, whole.finish_reason, whole.error) == (other, "length", None)
    assert "prompt 1" in broken.error and "float32" in broken.error
    assert broken.stats.new_tokens == len(valid)
    with pytest.raises(NumericalError, match="no numbers"):
        broken.check()
    whole.check()
    if method == "s3d":
        stream = lm.stream_tokens(OTHER, max_new_tokens=12)
        assert sum(stream, []) == valid and stream.result.finish_reason == "error"


@pytest.mark.parametrize("options", [{}, {"top_k": 5, "top_p": 0.9, "repetition_penalty": 1.2}])
def test_sampled_rows_end_as_well(options):
    options |= dict(temperature=[0.8, 0.0], logit_bias={0: -np.inf, 1: -np.inf})
    broken, whole = poisoned(1).generate([PROMPT, OTHER], max_new_tokens=6, **options)
    assert (broken.tokens, broken.finish_reason) == ([], "error")
    assert (len(whole.tokens), whole.finish_reason) == (6, "length")


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_row_ends_by_its_own_tokens_alone(monkeypatch, temperature):
    """NaN in token 0, which pads prompts and is proposed all the time, but never said."""
    zeros = drafter_of(lambda at, gamma: jnp.zeros((len(at), gamma), jnp.int32))
    zeros.default_settings = lambda target: PromptLookupConfig(gamma=3)
    monkeypatch.setitem(registry._registered, "zeros", zeros)
    options = dict(temperature=temperature, seed=3, logit_bias={0: -np.inf}, max_new_tokens=12)
    for method in ("ar", "zeros", "s3d"):
        whole, found = (
            lm.generate([PROMPT, OTHER], method=method, **options)
            for lm in (tiny_lm(tie_embeddings=False), poisoned(0))
        )
        assert [(r.tokens, r.error) for r in found] == [(r.tokens, None) for r in whole]


def test_a_value_that_overflows_ends_the_rows_that_attend_to_it():
    lm = tiny_lm(num_layers=1, tie_embeddings=False)
    feature = np.zeros(31)
    feature[1] = 1.0
    lm.params["embed"]["embedding"] = lm.params["embed"]["embedding"].at[:, 0].set(feature)
    qkv = lm.params["layers_0"]["attention"]["qkv"]
    qkv["weight"] = qkv["weight"].at[-lm.config.num_kv_heads * lm.config.head_dim :, 0].set(3e38)
    broken, whole = lm.generate([PROMPT, OTHER], method="ar", max_new_tokens=1)
    assert (broken.tokens, broken.finish_reason) == ([], "error")
    assert (len(whole.tokens), whole.error) == (1, None)


def test_a_forbidden_token_is_no_error():
    lm = tiny_lm()
    bias = {token: -np.inf for token in range(30)}
    for method in ("ar", "s3d"):
        (result,) = lm.generate(PROMPT, method=method, logit_bias=bias, max_new_tokens=4)
        assert (result.tokens, result.finish_reason) == ([30] * 4, "length")


def test_which_logits_are_numbers():
    nan, inf = np.nan, np.inf
    rows = [[[0, 1], [-inf, 0]], [[nan, 0], [0, 0]], [[0, 0], [0, inf]], [[0, 0], [-inf, -inf]]]
    usable = are_usable(jnp.array(rows, jnp.float32)).tolist()
    assert usable == [[True, True], [False, True], [True, False], [True, False]]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """bfloat16 weights whose MLP overflows float16, each weight being small enough."""
    folder = tmp_path_factory.mktemp("large") / "model"
    config = tiny_config(dtype="bfloat16")
    params = tiny_params(config, scale=3e3)
    return checkpoint.save(folder, config, params)


def test_float16_is_named_with_advice(large, capsys):
    command = ["generate", "--ids", "1 2 3", "--model", str(large), "--max-new-tokens", "4"]
    assert main([*command, "--dtype", "float16", "--json"]) == 2
    captured = capsys.readouterr()
    fields = json.loads(captured.out)
    assert (fields["tokens"], fields["finish_reason"]) == ([], "error")
    assert "float16" in fields["error"] and "bfloat16" in fields["error"]
    assert captured.err.startswith("error: the logits of prompt 0 are no numbers")
    assert main(command) == 0


def test_a_conversation_forgets_such_a_question(monkeypatch, capsys):
    lm = s3d_jax.load()
    lm.params = {**lm.params, "final_norm": {"scale": jnp.full(lm.config.hidden_size, jnp.nan)}}
    conversation = lm.conversation(max_new_tokens=4)
    assert conversation.send("Hi").finish_reason == "error" and conversation.messages == []
    stream = conversation.stream("Hi")
    assert list(stream) == [] and stream.result.finish_reason == "error"
    assert conversation.messages == []
    monkeypatch.setattr("s3d_jax.lm.load", lambda *_, **__: lm)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\nYes\n"))
    assert main(["chat", "--max-new-tokens", "4"]) == 2
    assert "no numbers" in capsys.readouterr().err


def test_no_data_is_written_of_it(tmp_path):
    with pytest.raises(NumericalError):
        distill(poisoned(1), [PROMPT], tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_every_array_that_overflows_is_named(tmp_path):
    config, params = tiny_config(num_layers=2), tiny_params(tiny_config(num_layers=2))
    for layer in ("layers_0", "layers_1"):
        params[layer]["mlp"]["down"]["weight"] *= 1e7
    checkpoint.save(tmp_path / "model", config, params)
    with pytest.raises(CheckpointError, match="2 arrays hold values too large for float16") as info:
        checkpoint.load(tmp_path / "model", "float16")
    for part in ("layers_0/mlp/down/weight", "layers_1/mlp/down/weight", "bfloat16", "65504"):
        assert part in str(info.value)
