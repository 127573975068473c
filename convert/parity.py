"""Agreement of a converted checkpoint with HF transformers."""

import dataclasses
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from convert.sources.base import FLOATS, first_line
from s3d_jax.errors import ConversionError
from s3d_jax.jax_settings import under_usual_jax_settings
from s3d_jax.machine import free_host_memory_bytes
from s3d_jax.storage.tokenizer import NO_CODE

# Long enough to see a wrong rotation, which a short prompt cannot.
LENGTH = 640
_ROWS = 32  # positions that are compared at a time
_OVERHEAD = 1 << 30  # bytes of memory in addition to weights and logits: libraries, activations

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Parity:
    """How far a model is from HF's on one sequence of random tokens.

    Attributes:
        num_tokens: length of the sequence.
        max_difference, mean_difference: of two logits, absolute.
        kl: KL divergence of the next token's distribution from HF's, in nats, mean over positions.
        greedy_agreement: share of the positions with the same most likely token.
    """

    num_tokens: int
    max_difference: float
    mean_difference: float
    kl: float
    greedy_agreement: float


def measure_parity(
    hf_folder: Path | None, native: Path, num_params: int, vocab_size: int
) -> tuple[Parity | None, str]:
    """Compares a conversion with its original, if that is possible.

    Args:
        hf_folder: the original, or None if it is not in HF's format.
        native: the converted one.
        num_params, vocab_size: their sizes, to see whether they fit into memory.

    Returns:
        The agreement, and ""; or None, and the reason why it was not measured.
    """
    if hf_folder is None:
        return None, "the source is no HF checkpoint"
    if reason := obstacle(num_params, vocab_size, "float32", LENGTH):
        return None, reason
    return attempt(lambda: (compare(hf_folder, native), ""))


def attempt(measure: Callable[[], tuple[T | None, str]]) -> tuple[T | None, str]:
    """Runs a comparison at the end of a conversion, which is done whatever fails here.

    Returns:
        The result, and ""; or None, and the reason why there is none.
    """
    try:
        return measure()
    except KeyboardInterrupt:
        return None, "interrupted; the checkpoint itself is complete"
    except Exception as error:
        return None, f"the comparison failed ({type(error).__name__}: {first_line(error)})"


def obstacle(num_params: int, vocab_size: int, dtype: str, num_tokens: int) -> str:
    """Why two models of that size cannot be compared, and what to do; or "".

    One model is in memory at a time, then the logits of both and their difference.
    """
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed (pip install 's3d-jax[torch]')"
    weights = FLOATS[dtype].itemsize * num_params
    reason = lacking_memory(weights + logits_bytes(num_tokens, vocab_size))
    half = "; s3d-convert verify --dtype bfloat16 needs half" if dtype == "float32" else ""
    return reason and reason + half


def logits_bytes(num_tokens: int, vocab_size: int) -> int:
    """Bytes that a comparison needs in addition to the weights."""
    return 3 * 4 * num_tokens * vocab_size + _OVERHEAD


def lacking_memory(needed: int) -> str:
    """Says that so many bytes of memory are not free; "" if they are."""
    if needed <= (free := _available_memory()):
        return ""
    return f"it needs {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"


@under_usual_jax_settings
def compare(
    hf_folder: Path, native: Path, *, dtype: str = "float32", num_tokens: int = LENGTH
) -> Parity:
    """Runs both models, one after the other, over the same random tokens.

    Args:
        hf_folder: a HF folder.
        native: a native checkpoint of the same vocabulary.
        dtype: of weights and activations, in both.
        num_tokens: length of the sequence.

    Raises:
        CheckpointError: `native` cannot be loaded.
        ConversionError: HF transformers cannot load or run `hf_folder`.
    """
    import jax

    from s3d_jax.nn.transformer import forward_logits
    from s3d_jax.storage import native as checkpoint

    loaded = checkpoint.load(native, dtype)
    vocab = loaded.config.vocab_size
    tokens = np.random.default_rng(0).integers(0, vocab, (1, num_tokens))
    ours = np.asarray(forward_logits(loaded.config, loaded.params, jax.numpy.asarray(tokens)))[0]
    del loaded
    return _parity(ours, _hf_logits(hf_folder, tokens, dtype)[0])


def _parity(ours: np.ndarray, theirs: np.ndarray) -> Parity:
    """Compares logits [T, V] of both models; a few rows at a time, for large vocabularies."""
    largest, total, kl, same = 0.0, 0.0, 0.0, 0
    for start in range(0, len(ours), _ROWS):
        rows = slice(start, start + _ROWS)
        q, p = (logits[rows].astype(np.float64) for logits in (ours, theirs))
        difference = np.abs(q - p)
        largest = max(largest, float(difference.max()))
        total += float(difference.sum())
        same += int(np.sum(q.argmax(axis=-1) == p.argmax(axis=-1)))
        log_q, log_p = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (q, p))
        kl += float(np.sum(np.exp(log_p) * (log_p - log_q)))
    count = len(ours)
    return Parity(count, largest, total / ours.size, kl / count, same / count)


def _hf_logits(folder: Path, tokens: np.ndarray, dtype: str) -> np.ndarray:
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    try:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), local_files_only=True, **NO_CODE
        )
        with torch.inference_mode():
            return model.eval()(torch.tensor(tokens)).logits.float().numpy()
    except Exception as error:  # transformers raises most kinds
        raise ConversionError(
            f"HF transformers cannot run {folder} ({type(error).__name__}: {first_line(error)}): "
            "get a good copy of it, or another version of transformers"
        ) from error


def _available_memory() -> int:
    """Bytes of main memory that this process could use."""
    free = free_host_memory_bytes()
    # Where nothing says so: all of it.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if free is None else free
