"""A tiny model and its data, for all tests that train; and compiled programs that they share."""

import json

import jax
import pytest

from s3d_jax import checkpoint
from tests.tiny import tiny_config, tiny_params
from tests.train.command import run


@pytest.fixture(scope="module", autouse=True)
def shared_programs(tmp_path_factory):
    """Many runs here are of the same programs; each is compiled once."""
    folder = tmp_path_factory.getbasetemp() / "programs"
    options = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A model of ids alone, with its own output as data."""
    folder = tmp_path_factory.mktemp("tiny")
    config = tiny_config()
    checkpoint.save(folder / "model", config, tiny_params(config))
    lines = [{"prompt_tokens": [i % 31, (7 * i) % 31, i // 31], "tokens": []} for i in range(200)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "prompts.jsonl").write_text(text)
    arguments = ("--batch-size", "50", "--max-new-tokens", "29", "--sampled-fraction", "0")
    command = ("distill", "--model", folder / "model", "--prompts", folder / "prompts.jsonl")
    assert run(*command, "--out", folder / "own.jsonl", *arguments) == 0
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    sentence = "the small cat sat on the warm mat and saw a bird in the tall tree. "
    path.write_text("<|endoftext|>".join([sentence * 2] * 30))
    return path
