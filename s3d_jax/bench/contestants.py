"""Those who run: the methods of this package, and HF transformers on the same weights."""

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from s3d_jax.errors import InputError

if TYPE_CHECKING:
    from s3d_jax.generate import LM

EXTERNAL = ("hf", "hf-prompt-lookup")


@dataclasses.dataclass(frozen=True)
class Run:
    """One prompt continued once. Compilation is in none of the other times.

    Attributes:
        tokens: the new ids.
        seconds: of the whole call.
        first_seconds: until the first token could be shown.
        decode_seconds: of `decoded` of the tokens, without the prefill.
        decoded: those tokens: all of ours, and of HF's all behind those that prefill gives.
        compile_seconds: spent on programs that did not exist yet.
        iterations: passes of the full model behind the prefill; 0 where it is not known.
        plain_iterations: of these, those in which a method that drafts did not.
        accepted: for each draft position, how often its token was.
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
        settings: options that it runs with.
    """

    method: str
    settings: Mapping[str, Any]

    def run(self, prompt: np.ndarray, max_new_tokens: int) -> Run:
        """Continues one prompt, int32 [T]."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Ours(Contestant):
    """A method of `LM.generate`."""

    lm: "LM"

    def run(self, prompt: np.ndarray, max_new_tokens: int) -> Run:
        options: Any = dict(max_new_tokens=max_new_tokens, method=self.method, **self.settings)
        start = time.perf_counter()
        (result,) = self.lm.generate([prompt], **options)
        seconds = time.perf_counter() - start
        stats = result.stats
        # The programs are the same and exist now; only the number of iterations per call differs.
        start = time.perf_counter()
        next(self.lm.stream_tokens(prompt, **options))
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


@dataclasses.dataclass(frozen=True)
class HuggingFace(Contestant):
    """`generate` of HF transformers, plain or with its prompt lookup."""

    model: Any
    end_ids: Sequence[int]

    def run(self, prompt: np.ndarray, max_new_tokens: int) -> Run:
        import torch

        ids = torch.tensor(np.asarray(prompt, np.int64)[None], device=self.model.device)
        clock = _FirstTokens()
        options: Any = dict(max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0)
        if self.method == "hf-prompt-lookup":
            options["prompt_lookup_num_tokens"] = self.settings["gamma"]
        clock.start = time.perf_counter()
        with torch.inference_mode():
            output = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                eos_token_id=list(self.end_ids) or None,
                streamer=clock,
                **options,
            )
        tokens = output[0, len(prompt) :].tolist()
        seconds, first = time.perf_counter() - clock.start, clock.seconds
        return Run(tokens, seconds, first, seconds - first, len(tokens) - clock.count)


class _FirstTokens:
    """A streamer of HF's that looks at the clock when the first tokens come behind the prompt."""

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
    import jax
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from convert import export  # the one use of a package that otherwise stands on this one

    with tempfile.TemporaryDirectory() as parent:
        exported = export(folder, Path(parent) / "hf", progress=False)
        logging.disable_progress_bar()
        model = AutoModelForCausalLM.from_pretrained(exported, dtype=getattr(torch, dtype)).eval()
    if jax.default_backend() == "gpu" and torch.cuda.is_available():
        model = model.cuda()
    # Else a model's own generation_config.json would have a say.
    model.generation_config = type(model.generation_config)()
    yield model
