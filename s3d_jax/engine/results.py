"""What a batch returns: one Result per row, with its statistics."""

import dataclasses
from typing import Any, Literal

from s3d_jax.errors import NumericalError


@dataclasses.dataclass(frozen=True)
class Stats:
    """What one row cost. Times and memory are those of all rows up to then: they run together.

    Attributes:
        prompt_tokens, new_tokens: tokens in and out.
        iterations: passes of the full model after the prefill that committed the row's tokens.
        drafted: draft tokens proposed, γ per iteration that drafted or copied.
        accepted: draft tokens accepted and kept. Tokens after an end-of-text token, a stop string
            or the row's end do not count.
        accepted_per_position: the same for each of the γ positions of a draft; each was proposed
            `iterations - plain_iterations - copying_iterations` times.
        prefill_seconds, decode_seconds: without compilation.
        compile_seconds: spent on programs that did not exist yet.
        cached_tokens: prompt tokens that were in the cache already, from a conversation's previous
            turn; they are not prefilled.
        plain_iterations: iterations that neither drafted nor copied: how often a method fell back.
        copying_iterations: iterations that copied, where the text repeated itself (and a few
            elsewhere, while their cost was measured).
        iteration_cost: of an iteration with a draft, in steps of plain decoding, by which a method
            decides whether to draft; None where it does not decide.
        peak_memory_bytes: the device allocator's peak where it reports one (GPU, TPU), otherwise
            the peak resident set of this process.
    """

    prompt_tokens: int
    new_tokens: int
    iterations: int
    drafted: int
    accepted: int
    accepted_per_position: tuple[int, ...]
    prefill_seconds: float
    decode_seconds: float
    compile_seconds: float
    peak_memory_bytes: int
    cached_tokens: int = 0
    plain_iterations: int = 0
    copying_iterations: int = 0
    iteration_cost: float | None = None

    @property
    def tokens_per_iteration(self) -> float:
        """τ, mean tokens committed per iteration, the bonus token counted."""
        return self.new_tokens / self.iterations if self.iterations else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Of this row, while decoding."""
        return self.new_tokens / self.decode_seconds if self.decode_seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        derived = {
            "tokens_per_iteration": self.tokens_per_iteration,
            "tokens_per_second": self.tokens_per_second,
        }
        return dataclasses.asdict(self) | derived


@dataclasses.dataclass(frozen=True)
class Result:
    """One row's output.

    Attributes:
        tokens: the new ids, including the end-of-text token that ended the row, if one did.
        text: their text, without special tokens and without the stop string; None without a
            tokenizer.
        finish_reason: "stop" (end-of-text token or stop string), "length" (max_new_tokens, or the
            end of the cache), or "error" (the logits of the next token are no numbers).
        stopped_by: the token id or the stop string that caused "stop".
        stats: what it cost.
        error: of "error", what went wrong and what to do; the tokens before it are valid.
    """

    tokens: list[int]
    text: str | None
    finish_reason: Literal["stop", "length", "error"]
    stopped_by: int | str | None
    stats: Stats
    error: str | None = None

    def check(self) -> None:
        """Raises NumericalError if the row ended by an error."""
        if self.error is not None:
            raise NumericalError(self.error)
