"""A conversation: its messages, and a cache that is kept from turn to turn."""

from collections.abc import Iterator
from typing import Any, Protocol, Unpack

from s3d_jax.engine.batch import Batch
from s3d_jax.engine.options import GenerateOptions, check_options
from s3d_jax.engine.results import Result
from s3d_jax.engine.runner import UNLIMITED, Engine
from s3d_jax.errors import InputError
from s3d_jax.nn.cache import Kept
from s3d_jax.stream import Stream, text_pieces


class HasEngine(Protocol):
    """A model that can answer."""

    @property
    def engine(self) -> Engine:
        """What runs its batches, as the model is now."""
        ...


class Conversation:
    """Questions and answers in turns; begin one with `LM.conversation`.

    Each answer is the one that `LM.chat` would give to all the messages. But the tokens that this
    turn's prompt shares with the previous turn are in the cache already, and are not prefilled
    again; `stats.cached_tokens` of a result counts them.

    When the context has no room left for an answer, the oldest turns are forgotten. At most half of
    the context is kept free, so that a generous limit does not forget everything.

    A copy (`copy.deepcopy`, `pickle`) has a model, messages and cache of its own; a stream that is
    not read to its end remains with the original.

    Attributes:
        messages: {"role": ..., "content": ...} each, in order. They may be changed between turns:
            what no longer matches the cache is prefilled again.

    Raises:
        InputError: the model cannot chat (see `LM.chat_prompt`), or the system message is too long.
        ConfigError: an option that is unknown or out of range.
    """

    def __init__(
        self,
        model: HasEngine,
        system: str | None = None,
        **options: Unpack[GenerateOptions],
    ) -> None:
        """Begins a conversation; `model` is asked for its engine at each turn, as it may change."""
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self._model, engine = model, model.engine
        self._options = options
        if options.get("eos_token_ids") is None:
            options["eos_token_ids"] = engine.encoder.chat_eos_token_ids
        self._batch: Batch | None = None  # of the last turn
        self._kept: Kept | None = None  # in a copy: the cache of the original's last turn
        # Fail now, not after the first question.
        prompt = engine.encoder.encode_chat([*self.messages, {"role": "user", "content": "?"}])
        engine.encoder.encode(prompt)
        (self._wanted,) = check_options(engine.target, 1, **options).max_new_tokens

    def send(self, text: str) -> Result:
        """Sends a question to the model; returns its answer.

        After an error (of the result, too) the question is not among the messages. After an
        interruption (Ctrl-C) it is, with an empty answer.

        Raises:
            InputError: it is no text, too long, or refused by the template.
        """
        before = self.messages
        batch = self._begin(text)
        try:
            for _ in batch.run(UNLIMITED):
                pass
        except Exception:  # a question without an answer is not kept
            self.messages = before
            raise
        result = batch.results()[0]
        if result.error is not None:
            self.messages = before
            return result
        self.messages[-1]["content"] = result.text or ""
        return result

    def stream(self, text: str) -> Stream[str]:
        """As `send`, but yields pieces of the answer as soon as they are certain.

        An answer that is not read to its end is kept as far as it was read. The stream ends when
        the next turn begins. After an error of the result the question is not among the messages.
        """
        before = self.messages
        batch = self._begin(text)
        answer = self.messages[-1]

        def pieces() -> Iterator[str]:
            source = text_pieces(batch)
            while self._batch is batch:  # or another turn has begun, and has the cache
                if (piece := next(source, None)) is None:
                    if batch.results()[0].error is not None:
                        self.messages = before
                    return
                answer["content"] += piece
                yield piece

        return Stream(pieces(), batch)

    def _begin(self, text: str) -> Batch:
        """A batch for the answer; question and empty answer are among the messages."""
        if not isinstance(text, str):
            raise InputError(f"a question must be a text, got {text!r:.80}")
        before = self.messages
        question, answer = {"role": "user", "content": text}, {"role": "assistant", "content": ""}
        self.messages = [*before, question, answer]
        engine = self._model.engine
        try:
            turns, ids = self._fitting(engine, [*before, question])
            prompt = engine.encoder.encode(ids)
            batch = Batch(engine, prompt, self._cache(), to_keep=True, **self._options)
        except Exception:
            self.messages = before
            raise
        self.messages = [*turns, answer]
        self._batch, self._kept = batch, None
        return batch

    def _cache(self) -> Kept | None:
        return self._kept if self._batch is None else self._batch.kept()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_batch": None, "_kept": self._cache()}

    def _fitting(
        self, engine: Engine, messages: list[dict[str, str]]
    ) -> tuple[list[dict[str, str]], list[int]]:
        """The messages without the oldest turns that leave no room for an answer, and their ids."""
        max_length = engine.target.max_length
        room = max(1, min(self._wanted, max_length // 2))
        first = 1 if messages[0]["role"] == "system" else 0
        ids = engine.encoder.encode_chat(messages)
        while len(ids) + room > max_length and len(messages) > first + 1:
            messages = messages[:first] + messages[first + 2 :]  # without a question and its answer
            ids = engine.encoder.encode_chat(messages)
        return messages, ids
