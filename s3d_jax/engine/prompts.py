"""Prompts and chats as token ids, checked against the model's limits."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from s3d_jax.drafters.base import Target
from s3d_jax.errors import InputError
from s3d_jax.settings.records import is_list
from s3d_jax.storage.tokenizer import end_of_turn

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
        if not is_list(messages) or not all(
            isinstance(m, Mapping) and "role" in m for m in messages
        ):
            raise InputError(
                'messages are a list of {"role": "user", "content": "..."} and the like, got '
                f"{messages!r:.80}"
            )
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(m) for m in messages], add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # the template is a program of its own and may raise anything
            raise InputError(f"the chat template refuses these messages: {error}") from error
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
            try:
                prompt = self.tokenizer.encode(prompt)
            except (TypeError, UnicodeError) as error:
                raise InputError(f"prompt {i} is no valid text ({error})") from error
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
