"""Contestants: the methods of this package, and HF transformers on the same weights."""

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from s3d_jax.drafters import registry
from s3d_jax.engine.batch import Batch
from s3d_jax.errors import InputError
from s3d_jax.storage.tokenizer import NO_CODE
from s3d_jax.texts.suites import Prompt

if TYPE_CHECKING:
    from s3d_jax.lm import LM

EXTERNAL = ("hf", "hf-prompt-lookup")


@dataclasses.dataclass(frozen=True)
class Run:
    """One prompt continued once. Times do not include compilation.

    Attributes:
        tokens: the new ids.
        seconds: of the whole call.
        first_seconds: until the first token could be shown.
        decode_seconds: of `decoded` of the tokens, without the prefill.
        decoded: how many tokens that is: all of ours; HF's without those that its prefill gives.
        compile_seconds: spent on programs that did not exist yet.
        iterations: passes of the full model after the prefill; 0 where it is not known.
        plain_iterations: iterations among them in which a method that drafts did not draft.
        accepted: for each draft position, how often its token was accepted.
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
    """A method of `LM.generate`."""

    lm: "LM"

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
            accepted=stats.accepted_per_position,
        )

    def in_full(self) -> dict[str, Any]:
        target = self.lm.target
        choice = registry.choose(target, self.method, **self.settings)
        return {} if choice.drafter is None else choice.drafter.described(target, choice.costs)

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


@dataclasses.dataclass(frozen=True)
class HuggingFace(Contestant):
    """`generate` of HF transformers, plain or with its prompt lookup.

    Attributes:
        lm: the same model in jax; has the end-of-text ids.
        model: HF's.
    """

    lm: "LM"
    model: Any

    def run(self, prompt: Prompt, max_new_tokens: int) -> Run:
        output, seconds, clock = self._generate(prompt, max_new_tokens)
        tokens = output[0, len(prompt.tokens) :].tolist()
        # The time to the first token comes from a call of its own, as for our methods.
        _, _, again = self._generate(prompt, max_new_tokens, stopping_criteria=[_at_once])
        after = seconds - clock.seconds
        return Run(tokens, seconds, again.seconds, after, len(tokens) - clock.count)

    def _generate(
        self, prompt: Prompt, max_new_tokens: int, **options: Any
    ) -> tuple[Any, float, "_FirstTokens"]:
        """Ids with the prompt's [1, T + N], the seconds it took, and the clock."""
        import torch

        ids = torch.tensor(np.asarray(prompt.tokens, np.int64)[None], device=self.model.device)
        ends, clock = prompt.eos_token_ids, _FirstTokens()
        if self.method == "hf-prompt-lookup":
            options["prompt_lookup_num_tokens"] = self.settings["gamma"]
        clock.start = time.perf_counter()
        with torch.inference_mode():
            output = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=list(self.lm.eos_token_ids if ends is None else ends) or None,
                streamer=clock,
                **options,
            )
        return output, time.perf_counter() - clock.start, clock

    def in_full(self) -> dict[str, Any]:
        """The settings, and the dtype of the weights, which are our float weights."""
        return {**self.settings, "dtype": str(self.model.dtype).removeprefix("torch.")}

    def memory_bytes(self, prompt: Prompt, max_new_tokens: int) -> int:
        config, each = self.lm.config, self.model.dtype.itemsize
        slots = min(len(prompt.tokens) + max_new_tokens, self.lm.max_length)
        caches = 2 * config.num_layers * config.num_kv_heads * config.head_dim * slots * each
        return sum(x.nbytes for x in self.model.parameters()) + caches


def _at_once(ids: Any, scores: Any, **_: Any) -> Any:
    """A stopping criterion of HF's: bool [B], all True."""
    return ids.new_ones(len(ids), dtype=bool)


class _FirstTokens:
    """A streamer for HF that reads the clock when the first tokens after the prompt come."""

    start = seconds = 0.0
    calls = count = 0

    def put(self, tokens: Any) -> None:
        self.calls += 1
        if self.calls == 2:  # the prompt is the first
            self.seconds, self.count = time.perf_counter() - self.start, tokens.numel()

    def end(self) -> None:
        pass


@contextlib.contextmanager
def hf_model(folder: Path, dtype: str) -> Iterator[Any]:
    """The checkpoint as a model of HF transformers, on the device that jax uses.

    Args:
        folder: a native checkpoint; exported to a temporary folder.
        dtype: of weights and computation.

    Raises:
        InputError: torch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise InputError(
            "the methods hf and hf-prompt-lookup need torch: pip install 's3d-jax[torch]', or "
            "leave them out of --methods"
        ) from error
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from convert import export  # convert uses this package too, but nothing of bench

    with tempfile.TemporaryDirectory() as parent:
        exported = export(folder, Path(parent) / "hf", progress=False)
        logging.disable_progress_bar()
        model = AutoModelForCausalLM.from_pretrained(
            exported, dtype=getattr(torch, dtype), local_files_only=True, **NO_CODE
        ).eval()
    if jax.default_backend() == "gpu" and torch.cuda.is_available():
        model = model.cuda()
    # Else the model's own generation_config.json would change the settings.
    model.generation_config = type(model.generation_config)()
    yield model
