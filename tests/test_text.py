"""Text arrives whole and in order, and ends exactly before the first stop string."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3d_jax.lm import EMBEDDED
from s3d_jax.storage.tokenizer import special_tokens
from s3d_jax.text import Detokenizer, TextRow, common_length
from tests.conftest import need


class ByteTokenizer:
    """One token per byte, so that characters are spread over tokens; 256 is a special token."""

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        assert skip_special_tokens and not clean_up_tokenization_spaces
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


TOKENIZER = ByteTokenizer()


def feed(text: str | bytes, stop: list[str]) -> tuple[TextRow, list[str], int]:
    data = text.encode() if isinstance(text, str) else text
    row, shown = TextRow(TOKENIZER, list(b"prompt"), stop), []
    taken = 0
    for byte in data:
        taken += 1
        stopped = row.add(byte)
        shown.append(row.text)
        if stopped:
            break
    row.finish()
    return row, shown, taken


@given(
    st.text(alphabet="abé🙂", max_size=12),
    st.lists(st.text("abé🙂", min_size=1, max_size=3), max_size=3),
)
def test_streamed_text_is_the_text_up_to_the_first_stop(text, stop):
    row, shown, taken = feed(text, stop)
    # the stop string that is complete first, and what stands before it
    ends = [(text.find(s) + len(s), text.find(s), s) for s in stop if s in text]
    if ends:
        end = min(ends)[0]
        begin = min(b for e, b, _ in ends if e == end)
        assert row.text == text[:begin]
        assert row.stopped_by in [s for e, b, s in ends if e == end and b == begin]
        assert taken == len(text[:end].encode())
    else:
        assert row.text == text
        assert row.stopped_by is None
    assert all(row.text.startswith(part) for part in shown)  # nothing shown is ever taken back


@pytest.mark.parametrize("cut", range(1, 14))
def test_a_prompt_may_end_inside_a_character(cut):
    text = "a字b🙂 cé!"
    data = text.encode()
    row = TextRow(TOKENIZER, list(data[:cut]), [])
    for byte in data[cut:]:
        row.add(byte)
    row.finish()
    begun = data[:cut].decode("utf-8", errors="ignore")  # what is whole in the prompt
    assert row.text == text[len(begun) :]


def test_a_stop_string_across_tokens_is_never_shown():
    row, shown, _ = feed("one. END two", ["END"])
    assert row.text == "one. "
    assert row.stopped_by == "END"
    assert not any("E" in part for part in shown)


def test_half_a_character_waits_and_a_lost_one_is_replaced():
    row = TextRow(TOKENIZER, [65], [])
    first, second = "é".encode()
    row.add(first)
    assert row.text == ""
    row.add(second)
    assert row.text == "é"
    row, _, _ = feed(b"a\xc3", [])
    assert row.text == "a\ufffd"


def test_invalid_bytes_do_not_hold_back_the_rest():
    row, _, _ = feed(b"a\xff then much more text", [])
    assert row.text == "a\ufffd then much more text"


@pytest.mark.parametrize("prompt", [[], [256], list(b"longer than the context window")])
def test_the_prompt_is_context_and_never_text(prompt):
    row = TextRow(TOKENIZER, prompt, [])
    for byte in b"new":
        row.add(byte)
    row.finish()
    assert row.text == "new"


def transformers_tokenizer(name: str, data_dir: Path) -> Any:
    transformers = need("transformers")
    folders = {"embedded": EMBEDDED, "babyllama": data_dir / "checkpoints" / "babyllama-1m"}
    return transformers.AutoTokenizer.from_pretrained(
        folders.get(name, data_dir / "tokenizers" / name)
    )


def decoded(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def pieces(tokenizer: Any, prompt: list[int], ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt)
    return [*(detokenizer.add(i) for i in ids), detokenizer.finish()]


def byte_tokens(tokenizer: Any, data: bytes) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in data]


@pytest.mark.parametrize("name", ["phi-3-mini", "qwen2.5", "embedded", "babyllama"])
def test_pieces_of_any_tokens_are_what_the_tokenizer_decodes(name, data_dir):
    """Whole characters, broken ones, spaces, special and unknown tokens, after any prompt."""
    tokenizer = transformers_tokenizer(name, data_dir)
    size = len(tokenizer)
    of_text = [
        tokenizer.encode(text, add_special_tokens=False) for text in ("日🙂é", " a  b", "\n")
    ]
    single = [i for i in range(size) if _is_byte(tokenizer, i)]
    token = st.integers(0, size + 3) | st.sampled_from([*sum(of_text, []), 0, 1, 2])
    token = token | st.sampled_from(single) if single else token

    @settings(derandomize=True, max_examples=150, deadline=None, database=None)
    @given(st.lists(token, max_size=6), st.lists(token, max_size=24))
    def check(prompt, ids):
        before, after = decoded(tokenizer, prompt), decoded(tokenizer, prompt + ids)
        text = "".join(pieces(tokenizer, prompt, ids))
        assert text == after[common_length(before, after) :]
        assert text == after or prompt

    check()


def _is_byte(tokenizer: Any, token: int) -> bool:
    name = tokenizer.convert_ids_to_tokens(token)
    return name.startswith("<0x") or decoded(tokenizer, [token]) == "\ufffd"


def test_a_character_of_a_broken_run_is_counted_once(data_dir):
    tokenizer = transformers_tokenizer("phi-3-mini", data_dir)
    ids = [*byte_tokens(tokenizer, b"\xe6\x97\xa5\xe6"), *tokenizer.encode("abc")[-1:]]
    assert pieces(tokenizer, [], ids) == ["", "", "", "", "\ufffd" * 4 + " abc", ""]
    whole = byte_tokens(tokenizer, "日本".encode())
    assert pieces(tokenizer, [], [*whole, ids[-1]])[-2:] == ["日本 abc", ""]


@pytest.mark.parametrize("name", ["phi-3-mini", "qwen2.5"])
def test_invalid_bytes_are_shown_at_once_and_in_linear_time(name, data_dir):
    tokenizer = transformers_tokenizer(name, data_dir)
    byte = byte_tokens(tokenizer, b"\xff")[0]
    byte = tokenizer.convert_tokens_to_ids("ÿ") if name == "qwen2.5" else byte
    decodes, longest = 0, 0

    class Counting:
        is_fast = True
        convert_ids_to_tokens = tokenizer.convert_ids_to_tokens

        def decode(self, ids, **options):
            nonlocal decodes, longest
            decodes, longest = decodes + 1, max(longest, len(ids))
            return tokenizer.decode(ids, **options)

    shown = pieces(Counting(), [], [byte] * 8000)
    assert "".join(shown) == "\ufffd" * 8000
    assert sum(map(len, shown[:100])) >= 97  # at most three are held back
    assert decodes <= 2 * 8000 + 10 and longest <= 12


def test_a_stop_string_in_a_run_of_bytes_ends_the_text_at_once(data_dir):
    tokenizer = transformers_tokenizer("phi-3-mini", data_dir)
    row = TextRow(tokenizer, tokenizer.encode("a"), ["\n\n"])
    first, newline, ids = *tokenizer.encode("b")[-1:], *byte_tokens(tokenizer, b"\n"), []
    for token in [first, newline, newline, first]:
        ids.append(token)
        if row.add(token):
            break
    row.finish()
    assert (row.text, row.stopped_by, len(ids)) == (" b", "\n\n", 3)


SPECIAL = {256: "<|end|>", 257: "<|user|>", 258: "<|end|>!"}


@pytest.mark.parametrize(
    "stop, ids, expected",
    [
        (["<|end|>"], [*b"ab", 256, *b"c"], ("ab", "<|end|>", 3)),
        (["b<|end|>"], [*b"ab", 256, *b"c"], ("a", "b<|end|>", 3)),
        (["b<|end|>"], [*b"bab", 257, *b"c"], ("babc", None, 5)),
        (["<|end|>\n<|user|>"], [*b"a", 256, *b"\n", 257], ("a", "<|end|>\n<|user|>", 4)),
        (["<|end|>x", "cd"], [*b"a", 256, *b"cd"], ("a", "cd", 4)),
        (["ab"], [*b"a", 256, *b"b"], ("", "ab", 3)),  # special tokens are no text
        (["ab", "<|user|>"], [*b"a", 257, *b"b"], ("a", "<|user|>", 2)),
        (["<|end|>!"], [*b"a", 256, *b"b", 258], ("ab", "<|end|>!", 4)),
    ],
)
def test_a_stop_string_may_hold_special_tokens(stop, ids, expected):
    row = TextRow(TOKENIZER, [], stop, SPECIAL)
    taken = 0
    for token in ids:
        taken += 1
        if row.add(token):
            break
    row.finish()
    assert (row.text, row.stopped_by, taken) == expected


def test_a_stop_string_of_bytes_and_special_tokens(data_dir):
    tokenizer = transformers_tokenizer("phi-3-mini", data_dir)
    end, newline = tokenizer.convert_tokens_to_ids("<|end|>"), *byte_tokens(tokenizer, b"\n")
    row = TextRow(tokenizer, [], ["\n<|end|>\n"], special_tokens(tokenizer))
    ids = [*tokenizer.encode("a")[-1:], newline, end, newline]
    assert [row.add(token) for token in ids] == [False, False, False, True]
    assert (row.text, row.stopped_by) == ("a", "\n<|end|>\n")


@pytest.mark.parametrize("stop, whole", [("<|end|>", "a\ufffd"), ("a<|end|>", None)])
def test_a_special_token_after_half_a_character(data_dir, stop, whole):
    """If the row ends there, the bytes before it are lost; they show as U+FFFD."""
    tokenizer = transformers_tokenizer("phi-3-mini", data_dir)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    ids = [*tokenizer.encode("a")[-1:], *byte_tokens(tokenizer, b"\xe6"), end]
    row = TextRow(tokenizer, [], [stop], {end: "<|end|>"})
    assert [row.add(token) for token in ids] == [False, False, whole is not None]
    for token in byte_tokens(tokenizer, b"\x97\xa5") if whole is None else []:
        assert not row.add(token)
    row.finish()
    assert row.text == (whole or "a日")


END, USER = "<|end|>", "<|user|>"
WORDS = [END, USER, "a", "b", "ab", "日", "\n"]
BYTES = sorted({*"aé日🙂".encode(), 0xFF})


@pytest.fixture(scope="module")
def toy():
    """Special tokens, text, and single bytes, as SentencePiece has them."""
    tokenizers, transformers = need("tokenizers"), need("transformers")
    tokens = [*WORDS, *(f"<0x{byte:02X}>" for byte in BYTES)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], byte_fallback=True))
    decoders = tokenizers.decoders
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    kind = transformers.PreTrainedTokenizerFast
    return kind(tokenizer_object=backend, additional_special_tokens=[END, USER])


def written_out(ids: list[int], marks: list[str]) -> str:
    """The text with the special tokens of `marks`, each after the characters before it."""
    text, data, places = "", b"", list[tuple[int, str]]()
    for token in [*ids, WORDS.index("a")]:
        if token >= len(WORDS):
            data += bytes([BYTES[token - len(WORDS)]])
        elif WORDS[token] in (END, USER):
            places.append((len(data), WORDS[token]))
        else:
            run = data.decode() if is_utf8(data) else "\ufffd" * len(data)
            for at, name in reversed(places):
                if name in marks:
                    before = data[:at].decode(errors="ignore") if is_utf8(data) else data[:at]
                    run = run[: len(before)] + name + run[len(before) :]
            text, data, places = text + run + WORDS[token], b"", []
    return text[:-1]


def is_utf8(data: bytes) -> bool:
    try:
        return bool(data.decode()) or True
    except UnicodeDecodeError:
        return False


def test_any_tokens_end_at_the_first_stop_string(toy):
    special = special_tokens(toy)
    token = st.integers(0, len(WORDS) + len(BYTES) - 1)
    chars = st.sampled_from(["a", "é", "日"]).map(
        lambda c: [len(WORDS) + BYTES.index(byte) for byte in c.encode()]
    )
    ids = st.lists(token.map(lambda i: [i]) | chars, max_size=16).map(lambda parts: sum(parts, []))
    stop = st.lists(st.sampled_from(["a", "b", "é", "日", END, USER]), min_size=1, max_size=3)

    @settings(derandomize=True, max_examples=250, deadline=None, database=None)
    @given(ids, st.lists(stop.map("".join), max_size=2))
    def check(ids, stops):
        marks = [name for name in (END, USER) if any(name in s for s in stops)]
        row, taken, before = TextRow(toy, [], stops, special), 0, ""
        for token in ids:
            taken += 1
            stopped = row.add(token)
            assert row.text.startswith(before)
            before = row.text
            if stopped:
                break
        row.finish()
        assert row.text.startswith(before)
        assert not any(s in row.text for s in stops)
        text, plain = written_out(ids[:taken], marks), decoded(toy, ids[:taken])
        found = [s for s in stops if s in text or s in plain]
        if row.stopped_by is None:
            assert (row.text, taken, found) == (plain, len(ids), [])
        else:
            assert row.stopped_by in found
            assert plain.startswith(row.text)

    check()
