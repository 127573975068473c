"""Prompts of the known files, and of the package."""

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from recipes.embedded_model.prepare import chats, split_stories
from s3d_jax.engine.prompts import PromptEncoder
from s3d_jax.errors import InputError
from s3d_jax.lm import EMBEDDED
from s3d_jax.storage.tokenizer import read_tokenizer
from s3d_jax.texts.suites import BUILT_IN, default_suites, read_suites


@pytest.fixture(scope="module")
def lm():
    """The parts of a model that prompts need, with the embedded model's vocabulary."""
    return stub(read_tokenizer(EMBEDDED))


def stub(tokenizer):
    model = SimpleNamespace(tokenizer=tokenizer, max_length=512, chat_eos_token_ids=(0, 3))
    model.config = SimpleNamespace(vocab_size=4096)
    model.chat_prompt = PromptEncoder(None, tokenizer).encode_chat
    return model


def test_files_of_known_benchmarks(lm, data_dir):
    folder = data_dir / "prompts"
    files = ("mt_bench.jsonl", "spec_bench.jsonl", "humaneval.jsonl.gz", "gsm8k_test.jsonl")
    suites = {f: read_suites([str(folder / f)], lm, 10_000) for f in files}
    assert [len(suites[f]) for f in files] == [80, 480, 164, 1319]
    counts = Counter(p.category for p in suites["spec_bench.jsonl"])
    assert counts["translation"] == counts["rag"] == 80 and counts["writing"] == 10
    assert {p.category for p in suites["humaneval.jsonl.gz"]} == {"humaneval"}
    # Questions by the chat template, code as it is.
    question = lm.tokenizer.decode(suites["gsm8k_test.jsonl"][0].tokens)
    assert question.startswith("<|endoftext|><|user|>Janet") and question.endswith("<|assistant|>")
    code = lm.tokenizer.decode(suites["humaneval.jsonl.gz"][0].tokens, skip_special_tokens=True)
    assert code.startswith("from typing import List\n") and code.endswith('"""\n')


def test_limit_and_length(lm, data_dir):
    file = str(data_dir / "prompts" / "mt_bench.jsonl")
    limited = read_suites([file, "stories"], lm, 10_000, limit=2)
    assert set(Counter(p.category for p in limited).values()) == {2}
    assert len(limited) == 2 * 9
    everything = read_suites([file], lm, 10_000)
    room = sorted(len(p.tokens) for p in everything)[40]
    with pytest.warns(UserWarning) as warned:
        shorter = read_suites([file], lm, room)
    (message,) = (str(w.message) for w in warned if "extraction" in str(w.message))
    long = sum(len(p.tokens) > room for p in everything if p.category == "extraction")
    assert message.startswith(f"extraction: {long} of 10 prompts have more than {room} tokens")
    assert {len(p.tokens) <= room for p in shorter} == {True}
    assert len(shorter) == sum(len(p.tokens) <= room for p in everything)
    with pytest.warns(UserWarning), pytest.raises(InputError, match="no prompt fits"):
        read_suites([file], lm, 3)


def test_suites_of_the_package(lm):
    assert BUILT_IN == ("chat", "stories", "dialogues", "code")
    counts = Counter(p.category for p in read_suites(BUILT_IN[1:], lm, 10_000))
    assert counts["stories"] == counts["dialogues"] == 24 and counts["code"] >= 15


def test_chat_questions_go_through_the_template(lm):
    prompts = read_suites(["chat"], lm, 10_000)
    counts = Counter(p.category for p in prompts)
    kinds = "explain", "list", "code", "story", "math", "rewrite", "summarise", "extract"
    assert counts == dict.fromkeys(kinds, 2)
    for prompt in prompts:
        text = lm.tokenizer.decode(prompt.tokens)
        assert text.startswith("<|endoftext|><|user|>") and text.endswith("<|assistant|>")
        assert prompt.eos_token_ids == lm.chat_eos_token_ids
    story = read_suites(["stories"], lm, 10_000)[0]
    assert "<|user|>" not in lm.tokenizer.decode(story.tokens) and story.eos_token_ids is None


def test_the_suites_of_a_model(lm, tmp_path):
    assert default_suites(lm, tmp_path) == ("chat",)
    assert default_suites(lm, EMBEDDED) == ("stories", "dialogues")
    assert default_suites(stub(None), tmp_path) == ("stories", "dialogues")
    plain = SimpleNamespace(chat_template=None)
    assert default_suites(stub(plain), tmp_path) == ("stories", "dialogues")


def test_the_prompts_of_the_package_are_held_out(lm, data_dir):
    """They stand in no text that the embedded model was trained on."""
    known, held_out = map("\n".join, split_stories(data_dir / "text"))
    train = chats(data_dir / "text/dialogues_train.jsonl.gz")
    said = {turn["content"] for chat in train for turn in chat["messages"]}
    folder = EMBEDDED.parent / "held_out"
    stories, dialogues = (
        [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("stories", "dialogues")
    )
    for story in stories:
        assert story["prompt"] in held_out and story["prompt"] not in known
    for chat in dialogues:
        assert chat["messages"][-1]["content"] not in said


def test_own_files(lm, tmp_path):
    file = tmp_path / "mine.jsonl"
    lines = [
        {"prompt_tokens": [5, 6]},
        {"text": "Once upon a time, there was a big dog. " * 9, "category": "texts"},
        {"messages": [{"role": "user", "content": "Hello"}]},
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    ids, chat, text = read_suites([str(file)], lm, 1000)
    assert ids.tokens.tolist() == [5, 6] and ids.category == chat.category == "mine"
    assert len(text.tokens) == 16 and text.category == "texts"
    assert [p.eos_token_ids for p in (ids, chat, text)] == [None, (0, 3), None]
    with pytest.raises(InputError, match=r"line 2: this model has no tokenizer"):
        read_suites([str(file)], stub(None), 1000)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "poems",
            None,
            "'poems' is no suite: give one of chat, stories, dialogues, code, or a .jsonl",
        ),
        ("none.jsonl", None, "is no suite"),
        ("a.jsonl", "", "holds no prompt"),
        ("a.jsonl", '{"answer": "x"}', r"line 1 has none of \"turns\".*it has \['answer'\]"),
        *(
            ("a.jsonl", f'\n{{"prompt_tokens": {ids}}}', r"a\.jsonl, line 2: .* ids from 0 to 4095")
            for ids in ('"ab"', "[1099511627776]", "[1.7, 2]", "[]", "[[1, 2]]", "[4096]", "[true]")
        ),
        *(
            ("a.jsonl", f'{{"turns": {turns}}}', r"line 1: \"turns\" must be a list of texts")
            for turns in ('"Hello"', "[]", "[1]", '[["Hello"]]', "null")
        ),
        ("a.jsonl", '{"question": ["x"]}', 'line 1: "question" must be a text'),
        ("a.jsonl", '{"messages": ["x"]}', 'line 1: "messages" must be a list'),
        ("a.jsonl", '{"messages": [{"content": "x"}]}', "line 1: messages are a list"),
        ("a.jsonl", '{"prompt": ""}', "line 1: the prompt must be a text that is not empty"),
        ("a.jsonl", '{"text": 3}', "line 1: the prompt must be a text that is not empty"),
    ],
)
def test_wrong_suites(lm, tmp_path, monkeypatch, name, content, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        read_suites([name], lm, 1000)


def test_a_plain_text_where_there_is_no_chat_template(lm, tmp_path):
    tokenizer = read_tokenizer(EMBEDDED)
    tokenizer.chat_template = None
    file = tmp_path / "q.jsonl"
    file.write_text('{"turns": ["Hello there", "Again"]}')
    (prompt,) = read_suites([str(file)], stub(tokenizer), 100)
    assert np.array_equal(prompt.tokens, tokenizer.encode("Hello there"))
    assert prompt.eos_token_ids is None


def test_no_room_for_a_prompt(lm):
    with pytest.raises(InputError, match=r"takes 512 tokens.*--max-new-tokens leaves none"):
        read_suites(["stories"], lm, 0)
