"""Incremental detokenisation and stop strings: from token ids to text, token by token."""

import itertools
from collections.abc import Sequence
from typing import Any

# Prompt tokens decoded as context, so that spaces and joined bytes at the seam are correct.
_CONTEXT = 8


class Detokenizer:
    """Decodes a growing sequence without decoding all of it for every token.

    Text is released once its bytes form whole characters. Each step decodes only a short window:
    the tokens since the last release, with the tokens of the release before as context.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = [int(t) for t in prompt[-_CONTEXT:]]
        self._context_start = 0
        self._released = len(self._tokens)

    def _decode(self, start: int, end: int | None = None) -> str:
        return self._tokenizer.decode(
            self._tokens[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _unreleased(self) -> str:
        # Not by the length of what was released: where a prompt ends inside of a character, its
        # bytes were shown as U+FFFD each, and become one character now.
        before = self._decode(self._context_start, self._released)
        after = self._decode(self._context_start)
        alike = itertools.takewhile(
            lambda pair: pair[0] == pair[1], zip(before, after, strict=False)
        )
        return after[sum(1 for _ in alike) :]

    def add(self, token: int) -> str:
        """Takes one token, returns the text that became complete with it (often "")."""
        self._tokens.append(token)
        rest = self._unreleased()
        if not rest or rest.endswith("\ufffd"):
            return ""  # a character whose bytes are spread over several tokens
        self._context_start, self._released = self._released, len(self._tokens)
        return rest

    def finish(self) -> str:
        """What is left at the end: bytes that never became a character, as U+FFFD."""
        rest = self._unreleased()
        self._context_start = self._released = len(self._tokens)
        return rest


class TextRow:
    """The text of one row: grows token by token, ends at the first stop string.

    Attributes:
        text: what may be shown so far; never holds any part of a stop string that might be under
            way.
        stopped_by: the stop string that ended the row, or None.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._stop = tuple(stop)
        self._held = ""  # could be the beginning of a stop string
        self.text = ""
        self.stopped_by: str | None = None

    def add(self, token: int) -> bool:
        """Takes one token; True if it completed a stop string. Nothing may be added after that."""
        return self._take(self._detokenizer.add(token))

    def finish(self) -> None:
        """Ends the row where no stop string did: releases what was held back."""
        if self.stopped_by is None and not self._take(self._detokenizer.finish()):
            self.text += self._held
            self._held = ""

    def _take(self, piece: str) -> bool:
        pending = self._held + piece
        found = [(pending.find(s), s) for s in self._stop if s in pending]
        if found:
            at, self.stopped_by = min(found)
            self.text += pending[:at]
            self._held = ""
            return True
        held = max((_overlap(pending, s) for s in self._stop), default=0)
        self.text += pending[: len(pending) - held]
        self._held = pending[len(pending) - held :]
        return False


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
