"""Contestants: what takes part in a measurement, and the methods of this package."""

import dataclasses
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from s3d_jax.drafters import registry
from s3d_jax.engine.batch import Batch
from s3d_jax.texts.suites import Prompt

if TYPE_CHECKING:
    from s3d_jax.lm import LM


@dataclasses.dataclass(frozen=True)
class Run:
    """One prompt continued once. Times do not include compilation.

    Attributes:
        tokens: the new ids.
        seconds: of the whole call.
        first_seconds: until the first token could be shown.
        decode_seconds: of `decoded` of the tokens, without the prefill.
        decoded: how many tokens that is: all of ours; of HF and llama.cpp without those that the
            prefill gives.
        compile_seconds: spent on programs that did not exist yet.
        iterations: passes of the full model after the prefill; 0 where it is not known.
        plain_iterations: iterations among them in which a method that drafts neither drafted nor
            copied.
        accepted: for each draft position, how often its token was accepted.
        copying_iterations: iterations among them that copied.
    """

    tokens: list[int]
    seconds: float
    first_seconds: float
    decode_seconds: float
    decoded: int
    compile_seconds: float = 0.0
    iterations: int = 0
    plain_iterations: int = 0
    accepted: tuple[int, ...] = ()
    copying_iterations: int = 0


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A method with its settings; decodes greedily.

    Attributes:
        method: its name.
        settings: options that it is given.
    """

    method: str
    settings: Mapping[str, Any]

    def run(self, prompt: Prompt, max_new_tokens: int) -> Run:
        """Continues one prompt."""
        raise NotImplementedError

    def in_full(self) -> dict[str, Any]:
        """The settings that it runs with, defaults included (JSON)."""
        return dict(self.settings)

    def memory_bytes(self, prompt: Prompt, max_new_tokens: int) -> int:
        """Bytes that the method needs for a prompt: its weights and its caches.

        Computed, without programs and activations.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Ours(Contestant):
    """A method of `LM.generate`.

    Attributes:
        lm: with the draft that it uses.
        draft: the name of that draft, if it was asked for.
    """

    lm: "LM"
    draft: str | None = None

    def run(self, prompt: Prompt, max_new_tokens: int) -> Run:
        options = self._options(prompt, max_new_tokens)
        start = time.perf_counter()
        (result,) = self.lm.generate([prompt.tokens], **options)
        seconds = time.perf_counter() - start
        result.check()
        stats = result.stats
        # The programs exist now; only the number of iterations per call differs.
        start = time.perf_counter()
        next(self.lm.stream_tokens(prompt.tokens, **options))
        first_seconds = time.perf_counter() - start
        return Run(
            tokens=result.tokens,
            seconds=seconds - stats.compile_seconds,
            first_seconds=first_seconds,
            decode_seconds=stats.decode_seconds,
            decoded=stats.new_tokens,
            compile_seconds=stats.compile_seconds,
            iterations=stats.iterations,
            plain_iterations=stats.plain_iterations,
            copying_iterations=stats.copying_iterations,
            accepted=stats.accepted_per_position,
        )

    def in_full(self) -> dict[str, Any]:
        target = self.lm.target
        choice = registry.choose(target, self.method, **self.settings)
        if choice.drafter is None:
            return {}
        named = {} if self.draft is None else {"draft": self.draft}
        found = named | choice.drafter.described(target, choice.costs)
        return found | {"copies": True} if choice.copies else found

    def memory_bytes(self, prompt: Prompt, max_new_tokens: int) -> int:
        options = self._options(prompt, max_new_tokens)
        return Batch(self.lm.engine, [prompt.tokens], **options).nbytes

    def _options(self, prompt: Prompt, max_new_tokens: int) -> Any:
        return dict(
            max_new_tokens=max_new_tokens,
            method=self.method,
            eos_token_ids=prompt.eos_token_ids,
            **self.settings,
        )
