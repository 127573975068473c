"""Prompt suites: built into the package, or read from the files of known benchmarks."""

import dataclasses
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from s3d_jax.errors import InputError
from s3d_jax.lm import EMBEDDED, LM
from s3d_jax.settings.records import is_integer
from s3d_jax.texts.files import read_jsonl

BUILT_IN = ("chat", "stories", "dialogues", "code")
HELD_OUT = Path(__file__).parent.parent / "assets" / "held_out"
_CHAT = Path(__file__).parent / "chat.jsonl"
_BEGINNING = 16  # tokens of a whole text that are its prompt
_HEAD = 400  # characters of a Python file that are its prompt
_MODULES = """argparse ast base64 bisect calendar configparser contextlib copy csv dataclasses
    fractions functools heapq queue random statistics string tempfile textwrap typing"""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        category: its part of the suite.
        tokens: int32 [T], its ids.
        eos_token_ids: tokens that end its continuation; None means the model's own.
    """

    category: str
    tokens: np.ndarray
    eos_token_ids: tuple[int, ...] | None = None


def default_suites(lm: LM, folder: Path) -> tuple[str, ...]:
    """The suites that fit a model: chat if it was made for that, else beginnings of texts.

    Args:
        lm: the model.
        folder: its checkpoint. The embedded model has a chat template too, but knows no more than
            its own stories and dialogues.
    """
    made_for_chat = bool(getattr(lm.tokenizer, "chat_template", None))
    is_embedded = folder.resolve() == EMBEDDED.resolve()
    return ("chat",) if made_for_chat and not is_embedded else ("stories", "dialogues")


def read_suites(
    names: Iterable[str], lm: LM, max_tokens: int, limit: int | None = None
) -> list[Prompt]:
    """The prompts of some suites.

    Args:
        names: names from BUILT_IN, or .jsonl files (also .gz). Each line has one of
            "turns", "question" or "messages": a chat, or its first question (MT-Bench, Spec-Bench,
                GSM8K); formatted by the chat template, or used as a text if the model has none;
            "prompt": a text that is continued as it is (HumanEval);
            "prompt_tokens": ids;
            "text": a whole text, whose beginning is continued;
            and may have a "category"; the default is the file's name.
        lm: the model whose tokenizer encodes them.
        max_tokens: tokens of a prompt at most. Longer ones leave no room for new tokens, and are
            left out.
        limit: prompts of each category at most, evenly spread.

    Raises:
        InputError: an unknown name, an unreadable file, a line of another kind, or no prompt that
            fits.

    Warns:
        UserWarning: how many prompts of a category were left out.
    """
    if max_tokens < 1:
        raise InputError(
            f"the model takes {lm.max_length} tokens, prompt and output, of which --max-new-tokens "
            "leaves none for a prompt: ask for fewer"
        )
    prompts = [prompt for name in names for prompt in _read(name, lm)]
    by_category: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_category.setdefault(prompt.category, []).append(prompt)
    chosen = []
    for category, rows in by_category.items():
        fitting = [row for row in rows if len(row.tokens) <= max_tokens]
        if len(fitting) < len(rows):
            warnings.warn(
                f"{category}: {len(rows) - len(fitting)} of {len(rows)} prompts have more than "
                f"{max_tokens} tokens, which do not fit the model, and are left out",
                stacklevel=2,
            )
        count = len(fitting) if limit is None else min(limit, len(fitting))
        chosen += [fitting[int(i)] for i in np.linspace(0, len(fitting), count, endpoint=False)]
    if not chosen:
        raise InputError("no prompt fits the model: take fewer new tokens, or shorter prompts")
    return chosen


def _read(name: str, lm: LM) -> Iterator[Prompt]:
    if name == "code":
        lines: Iterable[tuple[str, dict[str, Any]]] = _heads_of_modules()
        category = name
    else:
        path = HELD_OUT / f"{name}.jsonl" if name in BUILT_IN else Path(name)
        path = _CHAT if name == "chat" else path
        category = path.name.removesuffix(".gz").removesuffix(".jsonl")
        if category == path.name.removesuffix(".gz") or not path.exists():
            raise InputError(
                f"{name!r} is no suite: give one of {', '.join(BUILT_IN)}, or a .jsonl or .jsonl.gz"
                " file"
            )
        lines = read_jsonl(path)
    rows = [
        _prompt(str(fields.get("category", category)), fields, lm, where) for where, fields in lines
    ]
    if not rows:
        raise InputError(f"{name} holds no prompt")
    yield from rows


def _heads_of_modules() -> Iterator[tuple[str, dict[str, Any]]]:
    """Beginnings of standard library modules: code that is on every machine."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    for name in _MODULES.split():
        path = folder / f"{name}.py"
        if path.exists():
            head = path.read_text(encoding="utf-8")[:_HEAD]
            yield str(path), {"prompt": head[: head.rfind("\n") + 1]}


def _prompt(category: str, fields: Mapping[str, Any], lm: LM, where: str) -> Prompt:
    if "prompt_tokens" in fields:
        return Prompt(category, _checked(fields["prompt_tokens"], lm, where))
    if lm.tokenizer is None:
        raise InputError(
            f'{where}: this model has no tokenizer for texts: give ids as "prompt_tokens"'
        )
    messages, text, most = _messages(fields, where), fields.get("prompt"), None
    if messages and getattr(lm.tokenizer, "chat_template", None):
        try:
            ids = lm.chat_prompt(messages)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        return Prompt(category, np.asarray(ids, np.int32), lm.chat_eos_token_ids)
    if messages:
        text = messages[-1].get("content")
    elif text is None:
        text, most = fields.get("text"), _BEGINNING
    if text is None:
        raise InputError(
            f'{where} has none of "turns", "question", "messages", "prompt", "prompt_tokens" and '
            f'"text"; it has {sorted(fields)}'
        )
    if not isinstance(text, str) or not text:
        raise InputError(f"{where}: the prompt must be a text that is not empty, got {text!r:.80}")
    return Prompt(category, _checked(lm.tokenizer.encode(text, verbose=False)[:most], lm, where))


def _messages(fields: Mapping[str, Any], where: str) -> list[Mapping[str, Any]] | None:
    """The chat of a line, or None. Only the first of several questions is used."""
    if "turns" in fields:
        turns = fields["turns"]
        if not isinstance(turns, list) or not turns or not isinstance(turns[0], str):
            raise InputError(f'{where}: "turns" must be a list of texts, got {turns!r:.80}')
        return [{"role": "user", "content": turns[0]}]
    if "question" in fields:
        if not isinstance(fields["question"], str):
            raise InputError(f'{where}: "question" must be a text, got {fields["question"]!r:.80}')
        return [{"role": "user", "content": fields["question"]}]
    messages = fields.get("messages")
    if messages is not None and not (
        isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)
    ):
        raise InputError(
            f'{where}: "messages" must be a list of {{"role": ..., "content": ...}} objects, got '
            f"{messages!r:.80}"
        )
    return messages


def _checked(ids: Any, lm: LM, where: str) -> np.ndarray:
    """Ids as int32 [T]."""
    vocab_size = lm.config.vocab_size
    if (
        not isinstance(ids, list)
        or not ids
        or not all(is_integer(i) and 0 <= i < vocab_size for i in ids)
    ):
        raise InputError(
            f"{where}: a prompt is a list of token ids from 0 to {vocab_size - 1}, at least one, "
            f"got {ids!r:.80}"
        )
    return np.asarray(ids, np.int32)
