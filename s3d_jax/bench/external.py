"""Contestants from outside: HF transformers on the same weights, and llama.cpp on a GGUF file."""

import dataclasses
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from s3d_jax.bench.contestants import Contestant, Run
from s3d_jax.errors import InputError
from s3d_jax.machine import core_count, out_of_memory_explained
from s3d_jax.storage.tokenizer import NO_CODE
from s3d_jax.texts.suites import Prompt

if TYPE_CHECKING:
    from s3d_jax.lm import LM

HF, HF_LOOKUP = "hf", "hf-prompt-lookup"
LLAMA_CPP, LLAMA_CPP_LOOKUP = "llama.cpp", "llama.cpp-prompt-lookup"
HF_METHODS = (HF, HF_LOOKUP)
LLAMA_CPP_METHODS = (LLAMA_CPP, LLAMA_CPP_LOOKUP)
EXTERNAL = {  # the methods, and the settings that each takes
    HF: ("dtype",),
    HF_LOOKUP: ("gamma", "dtype"),
    LLAMA_CPP: (),
    LLAMA_CPP_LOOKUP: ("gamma",),
}
_LOOKUP_GAMMAS = (3, 10)  # tried where none is given; 10 is the default of both


def candidates(method: str, given: dict[str, Any]) -> list[dict[str, Any]]:
    """The settings of an external method that are tried, of which the fastest will run."""
    if "gamma" not in EXTERNAL[method] or "gamma" in given:
        return [given]
    return [{"gamma": gamma, **given} for gamma in _LOOKUP_GAMMAS]


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
        if self.method == HF_LOOKUP:
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


_NO_ROOM = f"torch has no room for the model on the GPU: leave {HF} out of --methods"


def hf_models(folder: Path, dtypes: Iterable[str]) -> dict[str, Any]:
    """The checkpoint as models of HF transformers, on the device that jax uses.

    Args:
        folder: a native checkpoint; exported to a temporary folder.
        dtypes: of weights and computation, one model each.

    Raises:
        InputError: torch is not installed.
        DeviceError: the GPU has no memory left for torch.
    """
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"the methods {HF} and {HF_LOOKUP} need torch: pip install 's3d-jax[torch]', or leave "
            "them out of --methods"
        ) from error
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from convert import export  # convert uses this package too, but nothing of bench

    models = {}
    with tempfile.TemporaryDirectory() as parent:
        exported = export(folder, Path(parent) / "hf", progress=False)
        logging.disable_progress_bar()
        for dtype in dtypes:
            model = AutoModelForCausalLM.from_pretrained(
                exported, dtype=getattr(torch, dtype), local_files_only=True, **NO_CODE
            ).eval()
            if jax.default_backend() == "gpu" and torch.cuda.is_available():
                with out_of_memory_explained(lambda: _NO_ROOM):
                    model = model.cuda()
            # Else the model's own generation_config.json would change the settings.
            model.generation_config = type(model.generation_config)()
            models[dtype] = model
    return models


@dataclasses.dataclass(frozen=True)
class LlamaCpp(Contestant):
    """llama.cpp by its Python binding, plain or with the binding's prompt lookup.

    Attributes:
        lm: the same model in jax; has the end-of-text ids.
        model: the binding's `Llama`; of the lookup one that keeps the logits of all positions.
    """

    lm: "LM"
    model: Any

    def run(self, prompt: Prompt, max_new_tokens: int) -> Run:
        tokens, first, seconds, passes = self._generate(prompt, max_new_tokens)
        # The time to the first token comes from a call of its own, as for our methods.
        _, again, *_ = self._generate(prompt, 1)
        after = len(tokens) - 1  # the first is that of the prefill
        return Run(tokens, seconds, again, seconds - first, after, iterations=passes)

    def _generate(self, prompt: Prompt, max_new_tokens: int) -> tuple[list[int], float, float, int]:
        """New ids, seconds to the first of them, seconds of all, and passes after the prefill."""
        ends = self.lm.eos_token_ids if prompt.eos_token_ids is None else prompt.eos_token_ids
        drafts = 0
        if self.method == LLAMA_CPP_LOOKUP:
            from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

            lookup = LlamaPromptLookupDecoding(num_pred_tokens=self.settings["gamma"])

            def draft(ids: Any) -> Any:
                nonlocal drafts
                drafts += 1
                return lookup(ids)

            self.model.draft_model = draft
        start = time.perf_counter()
        self.model.reset()  # else it finds the prompt in its cache, and does not prefill
        tokens: list[int] = []
        first = 0.0
        for token in self.model.generate(prompt.tokens.tolist(), temp=0.0):  # 0 is greedy
            first = first or time.perf_counter() - start
            tokens.append(int(token))
            if token in ends or len(tokens) == max_new_tokens:
                break
        seconds = time.perf_counter() - start
        return tokens, first, seconds, drafts or len(tokens) - 1

    def in_full(self) -> dict[str, Any]:
        """The settings, and the type of the file's matrices: Q4_K - Medium."""
        import ctypes

        import llama_cpp

        text = ctypes.create_string_buffer(256)
        llama_cpp.llama_model_desc(self.model.model, text, len(text))
        *_, kind = text.value.decode().split(" ", 2)  # after architecture and size: llama 1B Q8_0
        return {**self.settings, "dtype": kind.removeprefix("(guessed) ")}

    def memory_bytes(self, prompt: Prompt, max_new_tokens: int) -> int:
        import llama_cpp

        config = self.lm.config
        slots = _slots(len(prompt.tokens) + max_new_tokens)
        caches = 2 * config.num_layers * config.num_kv_heads * config.head_dim * slots * 2
        return int(llama_cpp.llama_model_size(self.model.model)) + caches


def _slots(tokens: int) -> int:
    """Slots of a cache for so many tokens.

    llama.cpp rounds them up. If the binding is not told the same number, a draft near the end does
    not fit the binding's array of ids, and it raises a ValueError.
    """
    return tokens + -tokens % 256


def check_llama_cpp(file: Path | None) -> None:
    """Fails before the model is loaded if llama.cpp could not run after it.

    Raises:
        InputError: no GGUF file is given, or there is none, or the binding cannot be imported.
    """
    if file is None:
        raise InputError(
            f"the methods {LLAMA_CPP} and {LLAMA_CPP_LOOKUP} need the model as a GGUF file: give "
            "--gguf FILE, or leave them out of --methods"
        )
    if not file.is_file():
        raise InputError(f"--gguf: there is no file {file}: give the model's GGUF file")
    try:
        import llama_cpp  # noqa: F401
    except Exception as error:  # a library that cannot be loaded raises various kinds
        raise InputError(
            f"the methods {LLAMA_CPP} and {LLAMA_CPP_LOOKUP} need llama-cpp-python ({error}): pip "
            "install llama-cpp-python, or leave them out of --methods"
        ) from error


def llama_cpp_model(
    file: Path, lm: "LM", prompts: Sequence[Prompt], max_new_tokens: int, *, lookup: bool
) -> Any:
    """A GGUF file as the binding's `Llama`, with as many threads as jax, on the same device.

    Args:
        file: the GGUF file.
        lm: the same model in jax.
        prompts, max_new_tokens: what will run; the cache holds the longest.
        lookup: keep the logits of all positions, which drafting needs and plain decoding does not.

    Raises:
        InputError: llama.cpp cannot read the file, or its ids stand for other tokens.
    """
    import llama_cpp

    threads = core_count()
    try:
        model = llama_cpp.Llama(
            str(file),
            n_ctx=_slots(max(len(prompt.tokens) for prompt in prompts) + max_new_tokens),
            n_threads=threads,
            n_threads_batch=threads,
            n_gpu_layers=-1 if jax.default_backend() == "gpu" else 0,
            logits_all=lookup,
            verbose=False,
        )
    except (ValueError, RuntimeError) as error:
        raise InputError(f"llama.cpp cannot read {file}: {error}") from error
    _check_vocabulary(file, model, lm, prompts)
    return model


def _check_vocabulary(file: Path, model: Any, lm: "LM", prompts: Sequence[Prompt]) -> None:
    """Refuses another model's file: the ids of the prompts must stand for the same tokens."""
    import llama_cpp

    other = "the file is of another model: give the GGUF file of the one that is measured"
    if model.n_vocab() != lm.config.vocab_size:
        raise InputError(
            f"{file} has a vocabulary of {model.n_vocab()} tokens, and the model one of "
            f"{lm.config.vocab_size}: {other}"
        )
    vocabulary = llama_cpp.llama_model_get_vocab(model.model)
    if lm.tokenizer is None or (
        llama_cpp.llama_vocab_type(vocabulary) == llama_cpp.LLAMA_VOCAB_TYPE_NONE
    ):
        return  # ids only
    used = {i for p in prompts for i in (*p.tokens.tolist(), *(p.eos_token_ids or ()))}
    for i in sorted(used | set(lm.eos_token_ids)):
        ours = lm.tokenizer.convert_ids_to_tokens(i)
        theirs = llama_cpp.llama_vocab_get_text(vocabulary, i).decode("utf-8", "replace")
        if ours is not None and ours != theirs:
            raise InputError(
                f"token {i} is {theirs!r} in {file}, and {ours!r} in the model: {other}"
            )
