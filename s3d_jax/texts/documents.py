"""Documents as token ids: texts, chats, and what `s3d distill` writes."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from s3d_jax.engine.prompts import plain_messages, render_chat
from s3d_jax.errors import InputError
from s3d_jax.storage.tokenizer import special_tokens
from s3d_jax.text import common_length
from s3d_jax.texts.files import is_jsonl, read_jsonl, split_texts

_USUAL_ROLES = ("system", "user", "assistant")  # other ones are left out by many templates


@dataclasses.dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        tokens: int32 [n].
        learn: bool [n], the tokens that are learnt; the others are context.
        prompt_tokens: how many of the tokens are its prompt; None where the document does not say.
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
        "text": a text, all of which is learnt; empty ones are left out;
        "messages": [{"role": ..., "content": ...}], written out by the tokenizer's chat template;
            the assistant's turns are learnt, each up to the token that ends it;
        "prompt_tokens" and "tokens": ids, as `s3d distill` writes them; "tokens" are learnt.

    Args:
        paths: the files.
        tokenizer: a transformers tokenizer; None is enough for ids.
        eos_token_id: appended to each text, if there is one.
        prompts: the documents are to be continued: a chat that ends with a turn of the user is a
            prompt as a whole.
        texts: ids in the files belong to another tokenizer. From lines of `s3d distill` this takes
            the text ("prompt" and "text"); ids alone are refused.

    Raises:
        InputError: a file that cannot be read, or a line that is none of these (named by number).
    """
    documents: list[Document] = []
    for path in map(Path, paths):
        before = len(documents)
        if is_jsonl(path):
            documents += _jsonl_documents(path, tokenizer, eos_token_id, prompts, texts)
        else:
            documents += _text_documents(split_texts(path), tokenizer, eos_token_id)
        if len(documents) == before:
            raise InputError(f"{path} holds no text")
    return documents


def read_texts(paths: Iterable[str | os.PathLike[str]]) -> Iterator[str]:
    """The text of files that `read_documents` takes with `texts`, for a tokenizer to learn from.

    Raises:
        InputError: as `read_documents`.
    """
    for path in map(Path, paths):
        if not is_jsonl(path):
            yield from split_texts(path)
            continue
        for where, fields in read_jsonl(path):
            if "messages" in fields:
                contents = (m.get("content") for m in _turns(fields["messages"], where))
                yield from (content for content in contents if isinstance(content, str))
            else:
                yield _text_of(fields, where)


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
    plain_texts: list[str] = []
    for where, fields in read_jsonl(path):
        if "messages" in fields:
            yield _chat_document(fields["messages"], tokenizer, prompts, where)
        elif "tokens" in fields and not texts:
            yield _ids_document(fields, where)
        elif (text := _text_of(fields, where)).strip():  # as in a text file, else it has no token
            plain_texts.append(text)
    yield from _text_documents(plain_texts, tokenizer, eos_token_id)


def _text_of(fields: dict[str, Any], where: str) -> str:
    """The text of a line; the text of a continuation starts with its prompt."""
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


def _turns(messages: Any, where: str) -> list[dict[str, Any]]:
    try:
        turns = plain_messages(messages)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    if not turns:
        raise InputError(f'{where}: "messages" is empty')
    return turns


def _chat_document(messages: Any, tokenizer: Any, is_prompt: bool, where: str) -> Document:
    turns = _turns(messages, where)
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(f"{where} is a chat, and the model's tokenizer has no chat template")

    def render(turns: list[dict[str, Any]], to_be_answered: bool) -> str:
        try:
            return render_chat(tokenizer, turns, to_be_answered=to_be_answered)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error

    unusual = [i for i, turn in enumerate(turns) if i and turn["role"] not in _USUAL_ROLES]
    for i in unusual:
        if render(turns[:i], False) == render(turns[: i + 1], False):
            raise InputError(
                f"{where}: the chat template leaves out message {i} (of {turns[i]['role']!r}), so "
                "the answer to it cannot be learnt: remove the chat, or write it out as "
                '"prompt_tokens" and "tokens"'
            )
    if is_prompt and turns[-1]["role"] != "assistant":
        ids = tokenizer(render(turns, True), add_special_tokens=False, verbose=False)["input_ids"]
        return Document(np.asarray(ids, np.int32), np.zeros(len(ids), bool), len(ids))
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{where} is a chat, and the tokenizer is a slow one, which cannot say where the "
            'assistant\'s turns are: write the chat out as "prompt_tokens" and "tokens", or use a '
            "checkpoint with a tokenizer.json"
        )
    if all(turn["role"] != "assistant" for turn in turns):
        raise InputError(f"{where} has no turn of the assistant")
    text = render(turns, False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    tokens = np.asarray(encoded["input_ids"], np.int32)
    starts, ends = np.asarray(encoded["offset_mapping"]).reshape(-1, 2).T
    special = np.isin(tokens, list(special_tokens(tokenizer)))
    learn = np.zeros(len(tokens), bool)
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        answered = render(turns[: i + 1], False)
        # `text` need not repeat all of `answered`: some templates end each rendering with an
        # end-of-text token.
        same = common_length(text, answered)
        content = turn.get("content") or ""
        begin = _begin(text[:same], turns[: i + 1], content.strip(), render)
        stops = np.zeros(0, int)
        if begin is not None:
            ending = special & (starts < begin) & (begin < ends)
            if not content and ending.any():  # the template asks with what begins like the end
                begin = int(starts[ending][0])
            found = text.find(content, begin, same)
            after = begin if found < 0 else found + len(content)
            # Decoding ends with the turn's end token; nothing after it is ever drafted.
            stops = ends[special & (starts >= after) & (ends <= same)]
        if begin is None or (not len(stops) and same < len(answered)):
            raise InputError(
                f"{where}: the chat template changes earlier turns when more follow, so message "
                f'{i}, the assistant\'s, cannot be found: write the chat out as "prompt_tokens" '
                'and "tokens"'
            )
        learn |= (starts >= begin) & (starts < (stops[0] if len(stops) else same))
    if not learn.any():
        raise InputError(f"{where}: the assistant's turns are empty, so there is nothing to learn")
    return Document(tokens, learn, int(np.argmax(learn)))


def _begin(
    text: str,
    turns: list[dict[str, Any]],
    content: str,
    render: Callable[[list[dict[str, Any]], bool], str],
) -> int | None:
    """Where the last of the turns begins in a text, as far as decoding writes it.

    Args:
        text: the turns written out.
        turns: the last one is the assistant's.
        content: its own.
        render: as `render_chat`.

    Returns:
        None if the text changes the turns before it.
    """
    # The first turn is asked for like a turn after it, since templates refuse an empty chat.
    before = turns[:-1] or turns
    unasked, asked = render(before, False), render(before, True)
    asks_at = common_length(unasked, asked)
    if before is turns:
        asks = asked[asks_at:]
        if asks and (found := text.find(asks)) >= 0:
            return found + len(asks)
        asks_at = same = 0
    else:
        same = common_length(text, asked)
    if same == len(asked):
        return same
    if same < asks_at:
        return None
    # The template asks with more ("<think>") than it writes before an answer that is there.
    places = (at for at in range(same, asks_at - 1, -1) if text.startswith(content, at))
    return next(places, max(same, text.find(content, same)))
