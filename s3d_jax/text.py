"""Incremental detokenisation and stop strings: from token ids to text, token by token."""

import codecs
import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

# Tokens that are decoded as context, so that spaces and joined bytes at the seam are correct. Each
# has a byte at least, and after four bytes a decoder of UTF-8 is in step, wherever it begins.
_CONTEXT = 8
_LOST = "\ufffd"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def is_text(value: Any) -> bool:
    """Whether a value is a str of whole characters: a lone surrogate is half of one."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def common_length(a: str, b: str) -> int:
    """How many characters two texts begin with in common."""
    if b.startswith(a):  # the usual case, and the fast one
        return len(a)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


class Detokenizer:
    """Decodes a growing sequence without decoding all of it for every token.

    The pieces together are what the tokenizer makes of all tokens at once, without special tokens
    and without what the prompt has in common with it. A piece is released when no later token can
    change it:

    - Where a token ends inside of a character, it shows as up to three U+FFFD, which are held back.
    - Tokenizers of SentencePiece's kind have tokens of single bytes ("<0xE6>"), and transformers
      decodes a run of them as a whole: if a byte is wrong, each byte of the run becomes U+FFFD. So
      a run is held back to its end, or until a byte is wrong.

    Attributes:
        held: the whole characters of a run that is held back; they are text if the row ends here.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._kinds: dict[int, tuple[bool, int | None]] = {}
        context, run = self._end_of(prompt)
        self._context = context
        self._shown = self._decode([*context, *run])  # the beginning of what is decoded next
        self._begin_run()
        for token in run:
            self._add_byte(token)
        self.held = ""

    def add(self, token: int) -> str:
        """Takes one token, returns the text that became certain with it (often "")."""
        has_text, byte = self._kind(token)
        if not has_text:
            return ""
        if byte is not None:
            return self._add_byte(token)
        self._end_run()
        self._context.append(token)
        text = self._decode(self._context)
        return self._release(text, most_uncertain=3)

    def finish(self) -> str:
        """What is left at the end: held characters, and bytes that never became one, as U+FFFD."""
        self._end_run()
        return self._release(self._decode(self._context), most_uncertain=0)

    def _release(self, text: str, most_uncertain: int) -> str:
        """The new part of the decoded context, without so many U+FFFD at its end."""
        new = text[common_length(self._shown, text) :]
        uncertain = min(len(new) - len(new.rstrip(_LOST)), most_uncertain)
        piece = new[: len(new) - uncertain]
        self._context = self._context[-_CONTEXT:]
        text = self._decode(self._context)
        self._shown = text[: len(text) - uncertain]
        return piece

    @property
    def unfinished(self) -> int:
        """Bytes at the end of a run held back that are no character yet."""
        return 0 if self._run_is_lost else len(self._utf8.getstate()[0])

    def _begin_run(self) -> None:
        self._run: list[int] = []
        self._run_is_lost = False
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self.held = ""

    def _add_byte(self, token: int) -> str:
        self._run.append(token)
        if self._run_is_lost:
            return _LOST
        try:
            self.held += self._utf8.decode(bytes([self._kind(token)[1] or 0]))
            return ""
        except UnicodeDecodeError:
            self._run_is_lost, self.held = True, ""
            text = self._decode([*self._context, *self._run])
            return text[common_length(self._shown, text) :]

    def _end_run(self) -> None:
        if self._run:
            self._context += self._run
            if self._run_is_lost:  # and shown
                self._context = self._context[-_CONTEXT:]
                self._shown = self._decode(self._context)
            self._begin_run()

    def _end_of(self, prompt: Sequence[int]) -> tuple[list[int], list[int]]:
        """The last tokens that have text: context, and the run of bytes after it."""
        context: list[int] = []
        run: list[int] = []
        for token in map(int, reversed(prompt)):
            has_text, byte = self._kind(token)
            if has_text:
                (run if byte is not None and not context else context).append(token)
            if len(context) == _CONTEXT:
                break
        return context[::-1], run[::-1]

    def _kind(self, token: int) -> tuple[bool, int | None]:
        """Whether it has text (special and unknown tokens have none), and which byte it is."""
        if token not in self._kinds:
            text, byte = self._decode([token] * 2), None  # twice: a first space may be dropped
            if getattr(self._tokenizer, "is_fast", False):
                name = self._tokenizer.convert_ids_to_tokens(token) or ""
                if (found := _BYTE.fullmatch(name)) and name not in text:
                    byte = int(found[1], 16)
            self._kinds[token] = text != "", byte
        return self._kinds[token]

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


class TextRow:
    """The text of one row: grows token by token, ends at the first stop string.

    Attributes:
        text: what may be shown so far; never holds any part of a stop string that might be under
            way.
        stopped_by: the stop string that ended the row, or None.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt: Sequence[int],
        stop: Sequence[str],
        special: Mapping[int, str] | None = None,
    ) -> None:
        """Begins after the prompt.

        Args:
            tokenizer: a transformers tokenizer.
            prompt: ids.
            stop: strings that end the text; they may hold special tokens, written out.
            special: the special tokens, which are no text: id -> how it is written.
        """
        self._detokenizer = Detokenizer(tokenizer, prompt)
        # Special tokens that a stop string holds are looked for as one character each, a lone
        # surrogate, which no text holds.
        self._marks: dict[int, str] = {}
        marked = list(stop)
        for token, name in sorted((special or {}).items(), key=lambda item: -len(item[1])):
            mark = chr(0xD800 + len(self._marks))
            if name and any(name in s for s in marked):
                self._marks[token] = mark
                marked = [s.replace(name, mark) for s in marked]
        self._stop = list(zip(marked, stop, strict=True))
        self._waiting: list[tuple[int, str]] = []  # marks and their places in a run held back
        self._held = ""  # could be the beginning of a stop string; with marks
        self.text = ""
        self.stopped_by: str | None = None

    def add(self, token: int) -> bool:
        """Takes one token; True if it completed a stop string. Nothing may be added after that."""
        mark = self._marks.get(token, "")
        if mark:  # waits as long as a run is held back; comes after a character under way
            at = len(self._detokenizer.held) + (self._detokenizer.unfinished > 0)
            self._waiting.append((at, mark))
        piece, run = self._detokenizer.add(token), self._detokenizer.held
        lost = self._detokenizer.unfinished
        if mark and lost:
            # If a stop string ends here, these bytes never become a character.
            marked = self._marked(run).removesuffix(mark) + _LOST * lost + mark
            return self._stops(self._held + marked)
        if run:  # it is the end of the text if a stop string ends here
            return bool(self._stop) and self._stops(self._held + self._marked(run))
        if lost:
            return False
        return self._take(self._marked(piece))

    def finish(self) -> None:
        """Ends the row where no stop string did: releases what was held back."""
        if self.stopped_by is None and not self._take(self._marked(self._detokenizer.finish())):
            self.text += self._visible(self._held)
            self._held = ""

    def _marked(self, text: str) -> str:
        """The text with the marks that wait for it."""
        for at, mark in reversed(self._waiting):
            text = text[:at] + mark + text[at:]
        return text

    def _visible(self, marked: str) -> str:
        """A text without its marks."""
        if not self._marks:
            return marked
        return "".join(c for c in marked if c not in self._marks.values())

    def _begin(self, pending: str, marked: str, stop: str) -> int:
        """Where in `pending` this stop string may have begun; its length where it has not."""
        if marked != stop:
            return len(pending) - _overlap(pending, marked)
        places = [i for i, c in enumerate(pending) if c not in self._marks.values()]
        size = _overlap(self._visible(pending), stop)
        return places[-size] if size else len(pending)

    def _take(self, piece: str) -> bool:
        self._waiting.clear()
        pending = self._held + piece
        if self._stops(pending):
            return True
        begin = min((self._begin(pending, *stop) for stop in self._stop), default=len(pending))
        self.text += self._visible(pending[:begin])
        self._held = pending[begin:]
        return False

    def _stops(self, pending: str) -> bool:
        visible = self._visible(pending)
        found = []
        for marked, stop in self._stop:
            if stop in visible:
                found.append((visible.find(stop), stop))
            elif marked in pending:
                found.append((len(self._visible(pending[: pending.find(marked)])), stop))
        if found:
            at, self.stopped_by = min(found)
            self.text += visible[:at]
            self._held = ""
        return bool(found)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
