"""From files to rows of token ids: documents, what is learnt of them, batches by step number.

A batch is a pure function of (seed, step), so a run that goes on after a kill sees what it would
have seen.
"""

import dataclasses
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from s3d_jax.errors import InputError
from s3d_jax.storage.tokenizer import special_ids

SEPARATOR = "<|endoftext|>"  # between the documents of a text file
_OPEN_ROWS = 64


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
    paths: Iterable[str | os.PathLike[str]],
    tokenizer: Any,
    eos_token_id: int | None,
    *,
    prompts: bool = False,
    texts: bool = False,
) -> list[Document]:
    """Reads .txt and .jsonl files (also .gz), one Document per text.

    A text file holds documents separated by <|endoftext|>, or is one document. A line of a jsonl
    file is an object with one of
        "text": a text, all of which is learnt;
        "messages": [{"role": ..., "content": ...}], written out by the tokenizer's chat template;
            the assistant's turns are learnt, each up to the token that ends it;
        "prompt_tokens" and "tokens": ids, as `s3d distill` writes them; "tokens" are learnt.

    Args:
        paths: the files.
        tokenizer: a transformers tokenizer; None is enough for ids.
        eos_token_id: put behind each text, if there is one.
        prompts: what is read is to be continued: a chat that ends with a turn of the user is a
            prompt as a whole.
        texts: the tokenizer is not the one that ids in the files are of: of what `s3d distill`
            wrote, the words are taken ("prompt" and "text"); ids alone are refused.

    Raises:
        InputError: a file that cannot be read, or a line that is none of these (named by number).
    """
    documents: list[Document] = []
    for path in map(Path, paths):
        before = len(documents)
        if _is_jsonl(path):
            documents += _jsonl_documents(path, tokenizer, eos_token_id, prompts, texts)
        else:
            documents += _text_documents(split_texts(path), tokenizer, eos_token_id)
        if len(documents) == before:
            raise InputError(f"{path} holds no text")
    return documents


def read_words(paths: Iterable[str | os.PathLike[str]]) -> Iterator[str]:
    """The words of files that `read_documents` takes with `texts`, for a tokenizer to learn from.

    Raises:
        InputError: as `read_documents`.
    """
    for path in map(Path, paths):
        if not _is_jsonl(path):
            yield from split_texts(path)
            continue
        for where, fields in read_jsonl(path):
            if "messages" in fields:
                contents = (m.get("content") for m in _turns(fields["messages"], where))
                yield from (content for content in contents if isinstance(content, str))
            else:
                yield _words(fields, where)


def split_texts(path: Path) -> list[str]:
    """The documents of a text file."""
    texts = (text.strip() for text in read_text(path).split(SEPARATOR))
    return [text for text in texts if text]


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a jsonl file, each with the words that say where it stands."""
    # Not splitlines(): U+2028 and the like may stand inside of a JSON string.
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            fields = json.loads(line)
            if "\\ud" in line.lower():  # a surrogate pair, or half of one
                json.dumps(fields, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{where} holds half a character: {error}") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise InputError(f"{where} is not a JSON object")
        yield where, fields


def read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.name.endswith(".gz") else data).decode("utf-8")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path} is not gzip, or damaged: {error}") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from error


def _is_jsonl(path: Path) -> bool:
    return path.name.removesuffix(".gz").endswith(".jsonl")


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


def _jsonl_documents(
    path: Path, tokenizer: Any, eos_token_id: int | None, prompts: bool, texts: bool
) -> Iterator[Document]:
    words: list[str] = []
    for where, fields in read_jsonl(path):
        if "messages" in fields:
            yield _chat_document(fields["messages"], tokenizer, prompts, where)
        elif "tokens" in fields and not texts:
            yield _ids_document(fields, where)
        else:
            words.append(_words(fields, where))
    yield from _text_documents(words, tokenizer, eos_token_id)


def _words(fields: dict[str, Any], where: str) -> str:
    """The text of a line; of a continuation, the prompt's words too."""
    text, prompt = fields.get("text"), fields.get("prompt")
    if isinstance(text, str):
        return prompt + text if "tokens" in fields and isinstance(prompt, str) else text
    if "tokens" in fields:
        raise InputError(
            f'{where} has "tokens" but no "text": ids of another tokenizer cannot be used here'
        )
    raise InputError(
        f'{where} has none of "text", "messages" and "tokens"; it has {sorted(fields)}'
    )


def _ids_document(fields: dict[str, Any], where: str) -> Document:
    prompt, output = fields.get("prompt_tokens", []), fields["tokens"]
    for ids in (prompt, output):
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
            raise InputError(f'{where}: "prompt_tokens" and "tokens" must be lists of token ids')
    if not prompt and not output:
        raise InputError(f"{where} has no token")
    tokens = np.asarray([*prompt, *output], np.int32)
    return Document(tokens, np.arange(len(tokens)) >= len(prompt), len(prompt))


# --- chats ----------------------------------------------------------------------------------------


def _turns(messages: Any, where: str) -> list[dict[str, Any]]:
    turns: list[Any] = messages if isinstance(messages, list) else [None]
    if not turns or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in turns):
        raise InputError(
            f'{where}: "messages" must be a list of {{"role": ..., "content": ...}} objects'
        )
    return turns


def _chat_document(messages: Any, tokenizer: Any, is_prompt: bool, where: str) -> Document:
    turns = _turns(messages, where)
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(f"{where} is a chat, and the model's tokenizer has no chat template")

    def render(turns: list[Any], to_be_answered: bool) -> str:
        try:
            return tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=to_be_answered
            )
        except Exception as error:  # the template is a program of its own
            raise InputError(f"{where}: the chat template refuses it: {error}") from error

    if is_prompt and turns[-1]["role"] != "assistant":
        ids = tokenizer(render(turns, True), add_special_tokens=False, verbose=False)["input_ids"]
        return Document(np.asarray(ids, np.int32), np.zeros(len(ids), bool), len(ids))
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{where} is a chat, and the tokenizer is a slow one, which cannot say where the "
            'assistant\'s words are: write the chat out as "prompt_tokens" and "tokens", or use a '
            "checkpoint with a tokenizer.json"
        )
    text = render(turns, False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    tokens = np.asarray(encoded["input_ids"], np.int32)
    starts, ends = np.asarray(encoded["offset_mapping"]).reshape(-1, 2).T
    special = np.isin(tokens, special_ids(tokenizer))
    learn = np.zeros(len(tokens), bool)
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        asked, answered = render(turns[:i], True), render(turns[: i + 1], False)
        # Not all of `answered` comes again in `text`: some templates end each rendering with an
        # end-of-text token.
        same = _common_length(text, answered)
        content = turn.get("content")
        behind = len(asked)
        if isinstance(content, str) and (found := text.find(content, behind, same)) >= 0:
            behind = found + len(content)
        # Decoding ends with the turn's end token; nothing behind it is ever drafted.
        stops = ends[special & (starts >= behind) & (ends <= same)]
        stop = stops[0] if len(stops) else same
        if not text.startswith(asked) or (not len(stops) and same < len(answered)):
            raise InputError(
                f"{where}: the chat template changes earlier turns, so the assistant's words "
                'cannot be found: write the chat out as "prompt_tokens" and "tokens"'
            )
        learn |= (starts >= len(asked)) & (starts < stop)
    if not learn.any():
        raise InputError(f"{where} has no turn of the assistant")
    return Document(tokens, learn, int(np.argmax(learn)))


def _common_length(a: str, b: str) -> int:
    differences = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differences, min(len(a), len(b)))


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


def row_length_for(documents: Sequence[Document], limit: int) -> int:
    """A row length that most documents fit into: a multiple of 32 that holds nine in ten of them.

    Args:
        documents: to train on.
        limit: positions of the model.

    Returns:
        From 64 to 512, and at most `limit`.
    """
    sizes = [len(document.tokens) for document in documents]
    most = int(np.quantile(sizes, 0.9, method="inverted_cdf"))
    return min(max(64, -(-most // 32) * 32), 512, limit)


def pack(documents: Sequence[Document], length: int) -> Rows:
    """Whole documents go into the first row with room; what is longer is cut into pieces.

    Documents of one row see each other. The rest of a row is padding. Only the last 64 rows with
    room are looked at. The first token of a piece is not learnt: what stands before it is another
    text, which ended, and no block is drafted over that end.
    """
    _check_length(length)
    tokens: list[np.ndarray] = []
    learn: list[np.ndarray] = []
    room: dict[int, int] = {}  # row -> free tokens at its end
    for document in documents:
        for cut in range(0, len(document.tokens), length):
            piece = slice(cut, cut + length)
            size = len(document.tokens[piece])
            row = next((row for row, free in room.items() if free >= size), len(tokens))
            if row == len(tokens):
                tokens.append(np.zeros(length, np.int32))
                learn.append(np.zeros(length, bool))
                room[row] = length
                if len(room) > _OPEN_ROWS:
                    del room[next(iter(room))]
            at = length - room[row]
            tokens[row][at : at + size] = document.tokens[piece]
            learn[row][at + 1 : at + size] = document.learn[piece][1:]
            room[row] -= size
            if room[row] == 0:
                del room[row]
    return Rows(np.stack(tokens), np.stack(learn))


def _check_length(length: int) -> None:
    if length < 2:
        raise InputError(f"a row needs at least two tokens, got a row length of {length}")


def concatenate(documents: Sequence[Document], length: int, seed: int) -> Rows:
    """All of all documents, shuffled and one behind the other, cut into rows: for pretraining.

    There is no padding, and every token is learnt, the user's words of a chat as well.
    """
    _check_length(length)
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
