"""Files become documents, documents rows, rows batches."""

import gzip
import json

import numpy as np
import pytest

from s3d_jax.errors import InputError
from s3d_jax.train.data import Batches, Document, Rows, concatenate, pack, read_documents
from s3d_jax.train.pretrain import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A byte-level tokenizer with a chat template, as `s3d pretrain` makes them."""
    import transformers

    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["the cat sat on the mat", "the dog ran to the cat"] * 3, 270, folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def document(size: int, first: int = 0) -> Document:
    return Document(np.arange(first, first + size, dtype=np.int32), np.ones(size, bool))


def test_texts_begin_and_end(tokenizer, tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("the cat\n<|endoftext|>\n  the dog  <|endoftext|>\n")
    documents = read_documents([path], tokenizer, tokenizer.eos_token_id)
    assert [tokenizer.decode(d.tokens) for d in documents] == [
        "<|endoftext|>the cat<|endoftext|>",
        "<|endoftext|>the dog<|endoftext|>",
    ]
    assert all(d.learn.all() and d.prompt_tokens is None for d in documents)


def test_jsonl_with_text_and_ids_and_gzip(tokenizer, tmp_path):
    path = tmp_path / "mixed.jsonl.gz"
    lines = [{"prompt_tokens": [5, 6], "tokens": [7, 8, 9], "text": "x"}, {"text": "the cat"}, None]
    text = "\n".join(json.dumps(line) if line else "" for line in lines)
    path.write_bytes(gzip.compress(text.encode()))
    ids, words = read_documents([path], tokenizer, None)
    assert ids.tokens.tolist() == [5, 6, 7, 8, 9] and ids.prompt_tokens == 2
    assert ids.learn.tolist() == [False, False, True, True, True]
    assert tokenizer.decode(words.tokens, skip_special_tokens=True) == "the cat"


def test_only_the_assistants_words_are_learnt(tokenizer, tmp_path):
    path = tmp_path / "chat.jsonl"
    said = [("user", "the dog"), ("assistant", "the cat"), ("user", "ran"), ("assistant", "sat")]
    messages = [{"role": role, "content": content} for role, content in said]
    path.write_text(json.dumps({"messages": messages}) + "\n")
    (chat,) = read_documents([path], tokenizer, None)
    assert tokenizer.decode(chat.tokens[chat.learn]) == "the cat<|end|>sat<|end|>"
    assert tokenizer.decode(chat.tokens).startswith("<|endoftext|><|user|>the dog<|end|>")
    prompt = tokenizer.decode(chat.tokens[: chat.prompt_tokens])
    assert prompt == "<|endoftext|><|user|>the dog<|end|><|assistant|>"


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 is not a JSON object"),
        ('{"words": 1}', "line 2 has none of"),
        ('{"tokens": [1, -2]}', "line 2.*lists of token ids"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "no turn of the assistant"),
        ('{"messages": 3}', "line 2: the chat template refuses it"),
    ],
)
def test_wrong_lines_are_named(line, message, tokenizer, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(InputError, match=message):
        read_documents([path], tokenizer, None)


def test_wrong_files_are_named(tokenizer, tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*nowhere"):
        read_documents([tmp_path / "nowhere.txt"], tokenizer, None)
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(InputError, match="holds no text"):
        read_documents([tmp_path / "empty.txt"], tokenizer, None)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="not UTF-8"):
        read_documents([tmp_path / "latin.txt"], tokenizer, None)
    (tmp_path / "words.txt").write_text("words")
    with pytest.raises(InputError, match="need a tokenizer"):
        read_documents([tmp_path / "words.txt"], None, None)


def test_packing_loses_no_token_and_splits_no_document_that_fits():
    documents = [document(n, 100 * i) for i, n in enumerate([3, 4, 2, 11, 1])]
    rows = pack(documents, 5)
    assert (
        rows.tokens[rows.learn].tolist() == np.concatenate([d.tokens for d in documents]).tolist()
    )
    # 3 | 4 | 2 (the next piece of 5 does not fit) | 5 | 5 | 1 + 1
    assert rows.learn.sum(axis=1).tolist() == [3, 4, 2, 5, 5, 2]


def test_concatenation_is_a_shuffle_without_padding():
    documents = [document(7, 10 * i) for i in range(9)]
    rows = concatenate(documents, 4, seed=3)
    assert rows.tokens.shape == (15, 4) and rows.learn.all()
    stream = rows.tokens.reshape(-1)
    assert sorted(stream[::7].tolist()) == [10 * i for i in range(9)]
    assert stream[::7].tolist() != sorted(stream[::7].tolist())
    with pytest.raises(InputError, match="fewer than one row"):
        concatenate(documents, 100, seed=3)


def test_batches_are_a_function_of_the_step_and_every_epoch_sees_all_rows():
    rows = Rows(np.arange(7)[:, None], np.ones((7, 1), bool))
    batches = Batches(rows, 3, seed=1)
    seen = [batches(step)["tokens"].ravel().tolist() for step in range(14)]
    flat = sum(seen, [])
    epochs = [flat[i : i + 7] for i in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    again = Batches(rows, 3, seed=1)
    assert again(9)["tokens"].ravel().tolist() == seen[9]  # out of order, as after a resume
    assert again(2)["tokens"].ravel().tolist() == seen[2]
    assert Batches(rows, 3, seed=2)(0)["tokens"].ravel().tolist() != seen[0]
