"""A tiny model and its data, and a few texts, for all tests that train."""

import json

import pytest

from s3d_jax.storage import native as checkpoint
from tests.tiny import tiny_config, tiny_params
from tests.train.command import run


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
