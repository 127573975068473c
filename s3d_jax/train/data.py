"""From files to rows of token ids: documents, what is learnt of them, batches by step number.

A batch is a pure function of (seed, step), so a run that goes on after a kill sees what it would
have seen.
"""

import dataclasses
import gzip
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from s3d_jax.errors import InputError

SEPARATOR = "<|endoftext|>"  # between the documents of a text file


@dataclasses.dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        tokens: int32 [n].
        learn: bool [n], the tokens that are to be predicted; the others are context.
        prompt_tokens: how many of the tokens a held-out document gives as its prompt; None where
            it says nothing about that.
    """

    tokens: np.ndarray
    learn: np.ndarray
    prompt_tokens: int | None = None


def read_documents(
    paths: Iterable[str | os.PathLike[str]], tokenizer: Any, eos_token_id: int | None
) -> list[Document]:
    """Reads .txt and .jsonl files (also .gz), one Document per text.

    A text file holds documents separated by <|endoftext|>, or is one document. A line of a jsonl
    file is an object with one of
        "text": a text, all of which is learnt;
        "messages": [{"role": ..., "content": ...}], written out by the tokenizer's chat template;
            the assistant's turns are learnt;
        "prompt_tokens" and "tokens": ids, as `s3d distill` writes them; "tokens" are learnt.

    Args:
        paths: the files.
        tokenizer: a transformers tokenizer; None is enough for ids.
        eos_token_id: put behind each text, if there is one.

    Raises:
        InputError: a file that cannot be read, or a line that is none of these (named by number).
    """
    documents: list[Document] = []
    for path in map(Path, paths):
        before = len(documents)
        if path.name.removesuffix(".gz").endswith(".jsonl"):
            documents += _jsonl_documents(path, tokenizer, eos_token_id)
        else:
            texts = [t.strip() for t in read_text(path).split(SEPARATOR)]
            documents += _text_documents([t for t in texts if t], tokenizer, eos_token_id)
        if len(documents) == before:
            raise InputError(f"{path} holds no text")
    return documents


def read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.name.endswith(".gz") else data).decode("utf-8")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from error


def _text_documents(
    texts: Sequence[str], tokenizer: Any, eos_token_id: int | None
) -> list[Document]:
    if not texts:
        return []
    if tokenizer is None:
        raise InputError("texts need a tokenizer, and this checkpoint has none: give ids (jsonl)")
    end = [] if eos_token_id is None else [eos_token_id]
    rows = tokenizer(list(texts), verbose=False)["input_ids"]
    arrays = [np.asarray([*ids, *end], np.int32) for ids in rows]
    return [Document(a, np.ones(len(a), bool)) for a in arrays]


def _jsonl_documents(path: Path, tokenizer: Any, eos_token_id: int | None) -> Iterator[Document]:
    texts: list[str] = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise InputError(f"{where} is not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise InputError(f"{where} is not a JSON object")
        if "messages" in fields:
            yield _chat_document(fields["messages"], tokenizer, where)
        elif "tokens" in fields:
            yield _ids_document(fields, where)
        elif isinstance(fields.get("text"), str):
            texts.append(fields["text"])
        else:
            raise InputError(
                f'{where} has none of "text", "messages" and "tokens"; it has {sorted(fields)}'
            )
    yield from _text_documents(texts, tokenizer, eos_token_id)


def _ids_document(fields: dict[str, Any], where: str) -> Document:
    prompt, output = fields.get("prompt_tokens", []), fields["tokens"]
    for ids in (prompt, output):
        if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
            raise InputError(f'{where}: "prompt_tokens" and "tokens" must be lists of token ids')
    tokens = np.asarray([*prompt, *output], np.int32)
    return Document(tokens, np.arange(len(tokens)) >= len(prompt), len(prompt))


def _chat_document(messages: Any, tokenizer: Any, where: str) -> Document:
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(f"{where} is a chat, and the model's tokenizer has no chat template")

    def render(turns: list[Any], to_be_answered: bool) -> str:
        try:
            return tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=to_be_answered
            )
        except Exception as error:  # the template is a program of its own
            raise InputError(f"{where}: the chat template refuses it: {error}") from error

    text = render(messages, False)
    spans: list[tuple[int, int]] = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            asked, answered = render(messages[:i], True), render(messages[: i + 1], False)
            if not (text.startswith(answered) and answered.startswith(asked)):
                raise InputError(
                    f"{where}: the chat template changes earlier turns, so the assistant's words "
                    'cannot be found: write the chat out as "prompt_tokens" and "tokens"'
                )
            spans.append((len(asked), len(answered)))
    if not spans:
        raise InputError(f"{where} has no turn of the assistant")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts = np.asarray([start for start, _ in encoded["offset_mapping"]])
    learn = np.zeros(len(starts), bool)
    for begin, stop in spans:
        learn |= (starts >= begin) & (starts < stop)
    first = int(np.argmax(learn))
    return Document(np.asarray(encoded["input_ids"], np.int32), learn, first)


# --- rows -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rows:
    """Documents in rows of equal length.

    Attributes:
        tokens: int32 [R, T].
        learn: bool [R, T], False on padding as well.
    """

    tokens: np.ndarray
    learn: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


def pack(documents: Sequence[Document], length: int) -> Rows:
    """One row after the other is filled with whole documents; what is longer is cut into pieces.

    Documents of one row see each other. The rest of a row is padding.
    """
    tokens: list[np.ndarray] = []
    learn: list[np.ndarray] = []
    room = 0
    for document in documents:
        for cut in range(0, len(document.tokens), length):
            piece = slice(cut, cut + length)
            size = len(document.tokens[piece])
            if size > room:
                tokens.append(np.zeros(length, np.int32))
                learn.append(np.zeros(length, bool))
                room = length
            at = length - room
            tokens[-1][at : at + size] = document.tokens[piece]
            learn[-1][at : at + size] = document.learn[piece]
            room -= size
    return Rows(np.stack(tokens), np.stack(learn))


def concatenate(documents: Sequence[Document], length: int, seed: int) -> Rows:
    """All of all documents, shuffled and one behind the other, cut into rows: for pretraining.

    There is no padding, and every token is learnt, the user's words of a chat as well.
    """
    order = np.random.default_rng(seed).permutation(len(documents))
    tokens = np.concatenate([documents[i].tokens for i in order])
    rows = len(tokens) // length
    if rows == 0:
        raise InputError(f"the texts have {len(tokens)} tokens, fewer than one row of {length}")
    tokens = tokens[: rows * length].reshape(rows, length)
    return Rows(tokens, np.ones(tokens.shape, bool))


class Batches:
    """Batch `step` of endless epochs, each one a permutation of its own of the rows."""

    def __init__(self, rows: Rows, batch_size: int, seed: int) -> None:
        self.rows = rows
        self.batch_size = batch_size
        self._seed = seed
        self._epoch, self._order = -1, np.zeros(0, int)

    def _row(self, index: int) -> int:
        epoch, at = divmod(index, len(self.rows))
        if epoch != self._epoch:
            generator = np.random.default_rng((self._seed, epoch))
            self._epoch, self._order = epoch, generator.permutation(len(self.rows))
        return int(self._order[at])

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """{"tokens": int32 [B, T], "learn": bool [B, T]} of one step."""
        first = step * self.batch_size
        chosen = [self._row(first + i) for i in range(self.batch_size)]
        return {"tokens": self.rows.tokens[chosen], "learn": self.rows.learn[chosen]}
