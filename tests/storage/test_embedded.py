"""The model that comes with the package."""

import io
import json
import socket

import pytest

import s3d_jax
from recipes.embedded_model.prepare import chats, questions, split_stories
from s3d_jax.commands import main as cli
from s3d_jax.drafters.stored import read_draft
from s3d_jax.lm import EMBEDDED
from s3d_jax.nn.transformer import num_params
from s3d_jax.storage.native import read_header
from s3d_jax.texts.documents import read_documents
from s3d_jax.train.validation import held_out_prompts
from tests.sampled import combinations


@pytest.fixture(scope="module")
def lm():
    return s3d_jax.load()


@pytest.fixture(scope="module")
def rounded():
    return s3d_jax.load(kv_cache="int8")


def test_it_is_small_and_its_draft_smaller(lm):
    config = read_header(EMBEDDED).config
    draft = read_draft(EMBEDDED, "default", config, weights=False)
    assert config.num_layers >= 8 and 4e6 <= num_params(config) <= 20e6
    assert sum(not skipped for skipped in draft.config.skip) <= config.num_layers / 2
    assert draft.num_params <= 0.1 * num_params(config)
    files = [f for f in EMBEDDED.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 24e6 and len(files) <= 20
    assert lm.config.dtype == "float32"


@pytest.mark.parametrize(
    "domain, count, model",
    combinations(
        ["stories", "dialogues"],
        [64, 16],
        ["lm", "rounded"],
        quick=[("stories", 16, "lm"), ("stories", 16, "rounded")],
    ),
)
def test_held_out_texts_take_few_passes_and_are_those_of_plain_decoding(
    domain, count, model, request, data_dir, tmp_path
):
    """The bar of the project: τ ≥ 2.8 with four draft tokens and half of the layers."""
    lm = request.getfixturevalue(model)
    if domain == "stories":
        texts = [{"text": story} for story in split_stories(data_dir / "text")[1]]
    else:
        texts = list(questions(list(chats(data_dir / "text/dialogues_valid.jsonl.gz"))))
    file = tmp_path / "held_out.jsonl"
    file.write_text("".join(json.dumps(text) + "\n" for text in texts))
    documents = read_documents([file], lm.tokenizer, lm.eos_token_ids[0], prompts=True)
    prompts = held_out_prompts(documents, count, 16, lm.max_length)
    options = {"max_new_tokens": 96}
    ours = lm.generate(prompts, method="s3d", gamma=4, **options)
    reference = lm.generate(prompts, method="ar", **options)
    assert [r.tokens for r in ours] == [r.tokens for r in reference]
    tokens, passes = (sum(getattr(r.stats, n) for r in ours) for n in ("new_tokens", "iterations"))
    assert tokens / passes >= 2.8


def test_the_commands_use_it_and_need_no_network(monkeypatch, capsys):
    def refuse(*arguments, **options):
        raise AssertionError("no network is needed")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert cli.main(["generate", "Once upon a time", "--max-new-tokens", "40", "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert len(written["text"].split()) > 20
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert list(facts["drafts"]) == ["default"]
    monkeypatch.setattr("sys.stdin", io.StringIO("I want to book a table for two.\n"))
    assert cli.main(["chat", "--max-new-tokens", "30"]) == 0
    assert len(capsys.readouterr().out.split()) > 3
