"""Files become documents, documents rows, rows batches."""

import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s3d_jax.errors import InputError
from s3d_jax.texts.documents import Document, read_documents, read_texts
from s3d_jax.train.data import Batches, Rows, concatenate, pack, row_length_for
from s3d_jax.train.objective import block_targets, random_anchors
from s3d_jax.train.tokenizer import train_tokenizer


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


def test_empty_texts_are_left_out(tokenizer, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": ""}\n{"text": "the cat"}\n{"text": " \\n"}')
    (document,) = read_documents([path], tokenizer, tokenizer.eos_token_id)
    assert tokenizer.decode(document.tokens, skip_special_tokens=True) == "the cat"
    path.write_text('{"text": ""}\n' * 8)
    with pytest.raises(InputError, match="holds no text"):
        read_documents([path], tokenizer, tokenizer.eos_token_id)


def test_jsonl_with_text_and_ids_and_gzip(tokenizer, tmp_path):
    path = tmp_path / "mixed.jsonl.gz"
    lines = [{"prompt_tokens": [5, 6], "tokens": [7, 8, 9], "text": "x"}, {"text": "the cat"}, None]
    text = "\n".join(json.dumps(line) if line else "" for line in lines)
    path.write_bytes(gzip.compress(text.encode()))
    ids, text = read_documents([path], tokenizer, None)
    assert ids.tokens.tolist() == [5, 6, 7, 8, 9] and ids.prompt_tokens == 2
    assert ids.learn.tolist() == [False, False, True, True, True]
    assert tokenizer.decode(text.tokens, skip_special_tokens=True) == "the cat"


def test_only_the_assistants_turns_are_learnt(tokenizer, tmp_path):
    path = tmp_path / "chat.jsonl"
    turns = [("user", "the dog"), ("assistant", "the cat"), ("user", "ran"), ("assistant", "sat")]
    messages = [{"role": role, "content": content} for role, content in turns]
    path.write_text(json.dumps({"messages": messages}) + "\n")
    (chat,) = read_documents([path], tokenizer, None)
    assert tokenizer.decode(chat.tokens[chat.learn]) == "the cat<|end|>sat<|end|>"
    assert tokenizer.decode(chat.tokens).startswith("<|endoftext|><|user|>the dog<|end|>")
    prompt = tokenizer.decode(chat.tokens[: chat.prompt_tokens])
    assert prompt == "<|endoftext|><|user|>the dog<|end|><|assistant|>"


@pytest.mark.parametrize("name", ["phi-3-mini", "qwen2.5"])
def test_turns_of_real_templates_end_with_their_end_token(name, data_dir, tmp_path):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(data_dir / "tokenizers" / name)
    end = {"phi-3-mini": "<|end|>", "qwen2.5": "<|im_end|>"}[name]
    answers = ["Blue, I think.", "end", " two\nlines "]
    messages = []
    for answer in answers:
        messages += [{"role": "user", "content": "And now?"}]
        messages += [{"role": "assistant", "content": answer}]
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": messages}))
    (chat,) = read_documents([path], tokenizer, tokenizer.eos_token_id)
    first, *_ = starts = np.flatnonzero(np.diff(chat.learn.astype(int), prepend=0) == 1)
    stops = np.flatnonzero(np.diff(chat.learn.astype(int), append=0) == -1)
    turns = [chat.tokens[a : b + 1] for a, b in zip(starts, stops, strict=True)]
    assert [t[-1] for t in turns] == [tokenizer.convert_tokens_to_ids(end)] * 3
    assert [tokenizer.decode(t[:-1]).strip() for t in turns] == [a.strip() for a in answers]

    # The prompt is what the model is asked in decoding.
    asked = tokenizer.apply_chat_template(
        messages[:1], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert chat.tokens[:first].tolist() == asked and chat.prompt_tokens == len(asked)
    path.write_text(json.dumps({"messages": messages[:1]}))
    (prompt,) = read_documents([path], tokenizer, None, prompts=True)
    assert prompt.tokens.tolist() == asked and prompt.prompt_tokens == len(asked)


def test_chats_that_cannot_be_told_apart_are_refused(tokenizer, tmp_path):
    import copy

    path = tmp_path / "chat.jsonl"
    turns = [("user", "the dog"), ("assistant", "the cat"), ("user", "ran"), ("assistant", "sat")]
    messages = [{"role": role, "content": content} for role, content in turns]
    path.write_text(json.dumps({"messages": messages}))
    forgetful = copy.deepcopy(tokenizer)
    forgetful.chat_template = tokenizer.chat_template.replace(
        "{{ m['content'] }}", "{% if loop.last %}{{ m['content'] }}{% endif %}"
    )
    with pytest.raises(InputError, match="line 1: the chat template changes earlier turns"):
        read_documents([path], forgetful, None)

    class Slow:
        chat_template = tokenizer.chat_template
        is_fast = False

    with pytest.raises(InputError, match=r"line 1 .* the tokenizer is a slow one"):
        read_documents([path], Slow(), None)


THINKING = (
    "{% for m in messages %}<|user|>{{ m.role }}:{{ m.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant:<|assistant|>{% endif %}"
)
ROLES = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}


@pytest.mark.parametrize(
    "template, turns, learnt",
    [
        (None, ["a:sat", "u:ran", "a: cat "], "sat<|end|> cat <|end|>"),  # the assistant begins
        (None, ["s:the", "a:sat"], "sat<|end|>"),
        (None, ["u:ran", "a:", "u:ran", "a:sat"], "<|end|>sat<|end|>"),
        (None, ["u:ran", "a:sat", "t:42", "a:cat"], "sat<|end|>cat<|end|>"),
        (None, ["u:ran", "a:sat", "a:cat"], "sat<|end|>cat<|end|>"),
        # It asks with more than it writes before an answer, like a template that opens "<think>".
        (THINKING, ["u:ran", "a:sat", "u:a", "a:cat "], "sat<|end|>cat<|end|>"),
        (THINKING, ["u:ran", "a:<b", "u:a", "a:"], "<b<|end|><|end|>"),
        (THINKING, ["u:ran", "a:<|assistant|>sat", "u:a", "a:cat"], "sat<|end|>cat<|end|>"),
        (THINKING, ["a:sat", "u:ran", "a:cat"], "sat<|end|>cat<|end|>"),
    ],
)
def test_the_assistants_turns_are_found(template, turns, learnt, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", template or tokenizer.chat_template)
    path = tmp_path / "chat.jsonl"
    pairs = [turn.split(":", 1) for turn in turns]
    for parts in (False, True):
        messages = [
            {"role": ROLES[r], "content": [{"type": "text", "text": c}] if parts else c}
            for r, c in pairs
        ]
        path.write_text(json.dumps({"messages": messages}))
        (chat,) = read_documents([path], tokenizer, None)
        assert tokenizer.decode(chat.tokens[chat.learn]) == learnt
        assert list(read_texts([path])) == [c for _, c in pairs]


def test_what_a_template_does_not_write_is_the_reason(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "chat.jsonl"
    messages = [{"role": r, "content": c} for r, c in (("user", "a"), ("tool", "b"))]
    messages += [{"role": "assistant"}]
    for template, reason in (
        (
            "{% for m in messages if m.role != 'tool' %}{{ m.content }}{% endfor %}",
            r"leaves out message 1 \(of 'tool'\)",
        ),
        (
            "{% for m in messages %}{{ m.role + m.content }}{% endfor %}",
            r"refuses these messages: .*\(message 2 has no content\)",
        ),
        (
            "{% for m in messages %}{{ m.content or '' }}{% endfor %}",
            "the assistant's turns are empty",
        ),
        ("{{ raise_exception('Alternate!') }}", "line 1: the chat template refuses .* Alternate!"),
    ):
        monkeypatch.setattr(tokenizer, "chat_template", template)
        path.write_text(json.dumps({"messages": messages}))
        with pytest.raises(InputError, match=reason):
            read_documents([path], tokenizer, None)


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 is not a JSON object"),
        ('{"words": 1}', "line 2 has none of"),
        ('{"tokens": [1, -2]}', "line 2.*lists of token ids"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "no turn of the assistant"),
        ('{"messages": 3}', "line 2: messages are a list"),
        ('{"messages": [{"content": "x"}]}', "line 2: messages are a list"),
        ('{"messages": []}', 'line 2: "messages" is empty'),
        (
            '{"messages": [{"role": "user", "content": 3}]}',
            "line 2: message 0: its content must be",
        ),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
            "line 2: message 0 has parts that are no text",
        ),
        ('{"tokens": []}', "line 2 has no token"),
        ('{"text": "half \\ud83d"}', "line 2 holds half a character"),
    ],
)
def test_wrong_lines_are_named(line, message, tokenizer, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(InputError, match=message):
        read_documents([path], tokenizer, None)


VALUES = st.recursive(
    st.none()
    | st.integers(-2, 300)
    | st.floats()
    | st.sampled_from(["the cat", "", "user", "assistant", "\ud83d", "字", 2**31, 10**400, True]),
    lambda some: (
        st.lists(some, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "text", "type"]), some, max_size=3)
    ),
    max_leaves=5,
)
TURNS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(list(ROLES.values())), "content": VALUES}),
    max_size=3,
)
LINES = st.dictionaries(
    st.sampled_from(["text", "prompt", "tokens", "prompt_tokens"]), VALUES, max_size=3
) | st.fixed_dictionaries({"messages": VALUES | TURNS})


def test_any_line_gives_documents_or_a_clear_error(tokenizer, tmp_path):
    path, outcomes = tmp_path / "data.jsonl", set()

    @settings(
        derandomize=True, max_examples=150, deadline=None, database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )  # fmt: skip
    @given(LINES, st.booleans(), st.integers(0, 400))
    def check(line, escaped, cut):
        text = json.dumps(line, ensure_ascii=escaped)
        part = text if cut > 40 else text[:cut]  # some are cut off
        path.write_bytes(part.encode("utf-8", "surrogatepass"))
        for read in (
            lambda: read_documents([path], tokenizer, 0),
            lambda: read_documents([path], tokenizer, None, prompts=True),
            lambda: read_documents([path], tokenizer, None, texts=True),
            lambda: read_documents([path], None, None),
        ):
            try:
                documents = read()
            except InputError as error:
                outcomes.add(False)
                assert str(path) in str(error) or "tokenizer" in str(error)
            else:
                outcomes.add(True)
                assert all(len(d.tokens) == len(d.learn) > 0 for d in documents)

    check()
    assert outcomes == {True, False}


def test_wrong_files_are_named(tokenizer, tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*nowhere"):
        read_documents([tmp_path / "nowhere.txt"], tokenizer, None)
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(InputError, match="holds no text"):
        read_documents([tmp_path / "empty.txt"], tokenizer, None)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="not UTF-8"):
        read_documents([tmp_path / "latin.txt"], tokenizer, None)
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"words " * 99)[:-20])
    with pytest.raises(InputError, match="not gzip, or damaged"):
        read_documents([tmp_path / "cut.txt.gz"], tokenizer, None)
    damaged = bytearray(gzip.compress(bytes(range(256)) * 9))
    damaged[15:25] = b"\xff" * 10
    (tmp_path / "damaged.txt.gz").write_bytes(damaged)
    with pytest.raises(InputError, match="not gzip, or damaged"):
        read_documents([tmp_path / "damaged.txt.gz"], tokenizer, None)
    (tmp_path / "words.txt").write_text("words")
    with pytest.raises(InputError, match="need a tokenizer"):
        read_documents([tmp_path / "words.txt"], None, None)


def test_a_line_ends_at_a_newline_only(tokenizer, tmp_path):
    path = tmp_path / "lines.jsonl"
    text = "the\u2028cat\x85sat"
    path.write_bytes((json.dumps({"text": text}, ensure_ascii=False) + "\r\n").encode())
    (document,) = read_documents([path], tokenizer, None)
    assert tokenizer.decode(document.tokens, skip_special_tokens=True) == text
    assert list(read_texts([path])) == [text]


def test_another_tokenizer_takes_the_text_of_distilled_lines(tokenizer, tmp_path):
    path = tmp_path / "own.jsonl"
    line = {"prompt_tokens": [900], "tokens": [901], "prompt": "the cat", "text": " sat"}
    path.write_text(json.dumps(line) + "\n" + json.dumps(line | {"prompt": None}))
    both, alone = read_documents([path], tokenizer, None, texts=True)
    assert tokenizer.decode(both.tokens, skip_special_tokens=True) == "the cat sat"
    assert tokenizer.decode(alone.tokens, skip_special_tokens=True) == " sat"
    assert both.learn.all()
    assert list(read_texts([path])) == ["the cat sat", " sat"]
    path.write_text(json.dumps({"tokens": [901], "text": None}))
    with pytest.raises(InputError, match=r"line 1 .* ids of another tokenizer"):
        read_documents([path], tokenizer, None, texts=True)
    with pytest.raises(InputError, match=r"line 1 .* ids of another tokenizer"):
        list(read_texts([path]))


def test_packing_loses_no_token_and_splits_no_document_that_fits():
    documents = [document(n, 100 * i) for i, n in enumerate([3, 4, 2, 11, 1])]
    rows = pack(documents, 5)
    every = np.concatenate([d.tokens for d in documents])
    assert sorted(rows.tokens[rows.tokens > 0].tolist()) == sorted(every[every > 0].tolist())
    # 3 + 2 | 4 + 1, the rest of the long one | 5 | 5 | 1
    assert rows.learn.sum(axis=1).tolist() == [3, 3, 4, 4, 0]
    assert rows.tokens[0].tolist() == [0, 1, 2, 200, 201]
    assert rows.tokens[1].tolist() == [100, 101, 102, 103, 310]
    with pytest.raises(InputError, match="at least two tokens"):
        pack(documents, 1)
    with pytest.raises(InputError, match="at least two tokens"):
        concatenate(documents, 0, seed=0)


def test_no_block_runs_from_a_packed_text_into_the_next():
    rows = pack([document(4, 10), document(3, 20)], 8)
    assert rows.learn.tolist() == [[False, True, True, True, False, True, True, False]]
    tokens, learn = jnp.asarray(rows.tokens), jnp.asarray(rows.learn)
    _, targets, weights = block_targets(tokens, learn, jnp.array([[2, 3, 4]]), 3, 0.5)
    assert targets.tolist() == [[13, 20, 21, 20, 21, 22, 21, 22, 0]]
    assert weights.tolist() == [[1, 0, 0, 0, 0, 0, 1, 0.5, 0]]
    anchors = random_anchors(jax.random.key(0), learn, 5)
    assert sorted(anchors[0].tolist()) == [0, 1, 2, 4, 5]


def test_distilled_documents_fill_their_rows():
    generator = np.random.default_rng(0)
    sizes = [272] * 150 + generator.integers(20, 272, 50).tolist()
    documents = [document(n) for n in generator.permutation(sizes)]
    length = row_length_for(documents, 2048)
    rows = pack(documents, length)
    assert length == 288
    assert rows.learn.mean() > 0.85


def test_the_row_length_has_bounds():
    assert row_length_for([document(5)] * 10, 2048) == 64
    assert row_length_for([document(5)] * 10, 48) == 48
    assert row_length_for([document(900)] * 10, 2048) == 512
    assert row_length_for([document(100)] * 9 + [document(900)], 2048) == 128


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
