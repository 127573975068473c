"""Prompts and chats as token ids, checked against the model's limits."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from s3d_jax.drafters.base import Target
from s3d_jax.errors import InputError
from s3d_jax.settings.records import is_list
from s3d_jax.storage.tokenizer import end_of_turn
from s3d_jax.text import is_text

Prompt = str | Sequence[int] | np.ndarray
Message = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class PromptEncoder:
    """Turns prompts and chats into token ids of a model.

    Attributes:
        target: whose vocabulary and limits count.
        tokenizer: a transformers tokenizer, or None for token ids only.
    """

    target: Target
    tokenizer: Any

    def encode(self, prompts: Any) -> list[np.ndarray]:
        """One or many prompts as checked arrays of ids, int32 [n] each.

        Raises:
            InputError: a prompt that is empty, too long, or holds ids outside the vocabulary, ...
        """
        if isinstance(prompts, str):
            prompts = [prompts]
        elif hasattr(prompts, "tolist"):  # arrays
            prompts = prompts.tolist()
        if not isinstance(prompts, Iterable) or isinstance(prompts, Mapping):
            raise InputError(
                f"a prompt is a text or a list of token ids, and prompts are a list of such, got "
                f"{prompts!r:.80}"
            )
        prompts = list(prompts)
        if not prompts:
            raise InputError("no prompt: give a text, a list of token ids, or a list of either")
        single = isinstance(prompts[0], int | float) or getattr(prompts[0], "ndim", None) == 0
        return [self._encode(i, p) for i, p in enumerate([prompts] if single else prompts)]

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, formatted by the tokenizer's template up to the answer.

        Raises:
            InputError: no tokenizer, no chat template, no list of messages, or messages that the
                template refuses.
        """
        if self.tokenizer is None:
            raise InputError("chat needs a tokenizer, and this model has none")
        template = getattr(self.tokenizer, "chat_template", None)
        if isinstance(template, dict) and "default" not in template:
            raise InputError(
                f"this model's tokenizer has chat templates for {', '.join(template)} and no "
                "default: choose one by lm.tokenizer.chat_template = "
                f"lm.tokenizer.chat_template[{next(iter(template))!r}]"
            )
        if not template:
            raise InputError(
                "this model's tokenizer has no chat template, so it was not made for chat: use "
                "generate with a text, or set lm.tokenizer.chat_template"
            )
        text = render_chat(self.tokenizer, plain_messages(messages), to_be_answered=True)
        return self.tokenizer.encode(text, add_special_tokens=False)

    @property
    def chat_eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: end-of-text tokens, and the template's end of a turn."""
        end = None if self.tokenizer is None else end_of_turn(self.tokenizer)
        return tuple(dict.fromkeys([*self.target.eos_token_ids, *([] if end is None else [end])]))

    def _encode(self, i: int, prompt: Any) -> np.ndarray:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InputError(
                    f"prompt {i} is a text, but this model has no tokenizer: give ids (--ids)"
                )
            if not prompt:
                raise InputError(f"prompt {i} is empty")
            _check_text(f"prompt {i}", prompt)
            prompt = self.tokenizer.encode(prompt)
        return self._checked(i, prompt)

    def _checked(self, i: int, prompt: Any) -> np.ndarray:
        vocab, max_length = self.target.config.vocab_size, self.target.max_length
        try:
            ids = np.asarray(prompt)
        except ValueError:  # lists of different depth or length
            ids = np.asarray(None)
        if ids.size == 0:
            raise InputError(f"prompt {i} is empty: it needs at least one token")
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise InputError(
                f"prompt {i} must be a text or a flat list of integers, got {prompt!r:.80}"
            )
        outside = ids[(ids < 0) | (ids >= vocab)]
        if outside.size:
            raise InputError(
                f"prompt {i} holds token id {outside[0]}; the vocabulary is 0 to {vocab - 1}"
            )
        if len(ids) >= max_length:
            raise InputError(
                f"prompt {i} has {len(ids)} tokens, and the cache holds {max_length} with at "
                "least one new token: shorten it, or load the model with a larger max_length"
            )
        return ids.astype(np.int32)


def plain_messages(messages: Any) -> list[dict[str, Any]]:
    """Messages as chat templates take them: a content in parts of text becomes one text.

    Raises:
        InputError: no list of messages, or a content that is no text; names the message.
    """
    if not is_list(messages) or not all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in messages
    ):
        raise InputError(
            'messages are a list of {"role": "user", "content": "..."} and the like, got '
            f"{messages!r:.80}"
        )
    return [_plain_message(i, message) for i, message in enumerate(messages)]


def _plain_message(i: int, message: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in message.items():
        _check_text(f"message {i}, {name!r},", value)
    content: Any = message.get("content")
    if is_list(content):
        parts: list[Any] = [p.get("text") if isinstance(p, Mapping) else p for p in content]
        if not all(isinstance(part, str) for part in parts):
            raise InputError(f"message {i} has parts that are no text: {content!r:.80}")
        return {**message, "content": "".join(parts)}
    if content is not None and not isinstance(content, str):
        raise InputError(f"message {i}: its content must be a text, got {content!r:.80}")
    return dict(message)


def render_chat(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, to_be_answered: bool
) -> str:
    """Plain messages written out by the tokenizer's chat template.

    Raises:
        InputError: the template refuses them.
    """
    try:
        return tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=to_be_answered, tokenize=False
        )
    except Exception as error:  # the template is a program of its own and may raise anything
        empty = [i for i, m in enumerate(messages) if m.get("content") is None]
        hint = f" (message {empty[0]} has no content)" if empty else ""
        raise InputError(f"the chat template refuses these messages: {error}{hint}") from error


def _check_text(what: str, value: Any) -> None:
    """Refuses a text that holds half a character, also within lists and objects."""
    parts = [value]
    while parts:  # not recursive: files may nest deeply
        part = parts.pop()
        if isinstance(part, str) and not is_text(part):
            raise InputError(
                f"{what} is no valid text: it holds half a character (a lone surrogate), from "
                f"bytes that are not UTF-8 or from a text that was cut: {part!r:.80}"
            )
        if isinstance(part, Mapping):
            parts += [*part, *part.values()]
        elif is_list(part):
            parts += part
