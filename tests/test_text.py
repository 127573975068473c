"""Text arrives whole and in order, and ends exactly before the first stop string."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s3d_jax.text import TextRow


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
