"""Agreement of a converted checkpoint with HF transformers."""

import contextlib
import dataclasses
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from convert.passage import PASSAGE
from convert.sources.base import FLOATS, first_line
from convert.sources.open import HF, Origin
from s3d_jax.errors import ConversionError, InputError
from s3d_jax.jax_settings import under_usual_jax_settings
from s3d_jax.machine import free_host_memory_bytes
from s3d_jax.storage.tokenizer import NO_CODE, has_vocabulary, read_tokenizer

# Long enough to see a wrong rotation, which a short prompt cannot.
LENGTH = 640
_ROWS = 32  # positions that are compared at a time
_OVERHEAD = 1 << 30  # bytes of memory in addition to weights and logits: libraries, activations

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Parity:
    """How far a model is from HF's on one sequence.

    Attributes:
        num_tokens: length of the sequence.
        max_difference, mean_difference: of two logits, absolute.
        kl: KL divergence of the next token's distribution from HF's, in nats, mean over positions.
        greedy_agreement: share of the positions with the same most likely token.
        is_text: whether the sequence is text, or random tokens.
        dtype, reference: the types in which the model and HF's computed.
        hf_rounding: the same of HF's own model in `dtype`, from itself in `reference`; None where
            the two are one type, so that nothing was rounded.
    """

    num_tokens: int
    max_difference: float
    mean_difference: float
    kl: float
    greedy_agreement: float
    is_text: bool = False
    dtype: str = "float32"
    reference: str = "float32"
    hf_rounding: "Parity | None" = None


def measure_parity(
    origin: Origin, native: Path, num_params: int, dtype: str = "float32"
) -> tuple[Parity | None, str]:
    """Compares a conversion with its original, if that is possible.

    Args:
        origin: the original.
        native: the converted one.
        num_params: numbers in the original, to see whether they fit into memory.
        dtype: in which the converted one computes.

    Returns:
        The agreement, and ""; or None, and the reason why it was not measured.
    """
    if origin.family is None:
        return None, f"the source is a {origin.format}"
    if origin.wrappers:
        return None, f"it does not read {' and '.join(origin.wrappers)}"
    if reason := obstacle(num_params, origin.config.vocab_size, "float32", LENGTH):
        return None, reason
    return attempt(lambda: (compare(origin, native, dtype=dtype), ""))


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

    One model is in memory at a time, then the logits of all.
    """
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed (pip install 's3d-jax[torch]')"
    weights = FLOATS[dtype].itemsize * num_params
    reason = lacking_memory(weights + logits_bytes(num_tokens, vocab_size))
    half = "; s3d-convert verify --dtype bfloat16 needs half" if dtype == "float32" else ""
    return reason and reason + half


def logits_bytes(num_tokens: int, vocab_size: int) -> int:
    """Bytes that a comparison needs in addition to the weights: logits of three models."""
    return 3 * 4 * num_tokens * vocab_size + _OVERHEAD


def lacking_memory(needed: int) -> str:
    """Says that so many bytes of memory are not free; "" if they are."""
    if needed <= (free := _available_memory()):
        return ""
    return f"it needs {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"


@under_usual_jax_settings
def compare(
    origin: Origin,
    native: Path,
    *,
    dtype: str = "float32",
    reference: str = "float32",
    num_tokens: int = LENGTH,
) -> Parity:
    """Runs both models, one after the other, over the same tokens.

    The tokens are a text's where the native checkpoint has a tokenizer, else random.

    Args:
        origin: the original, of a family of HF.
        native: a native checkpoint of the same vocabulary.
        dtype: of weights and activations of the native one.
        reference: of HF's; where it is another type, HF's model runs in `dtype` too.
        num_tokens: length of the sequence.

    Raises:
        CheckpointError: `native` cannot be loaded.
        ConversionError: HF transformers cannot load or run `origin`.
    """
    import jax

    from s3d_jax.nn.transformer import forward_logits
    from s3d_jax.storage import native as checkpoint

    loaded = checkpoint.load(native, dtype)
    tokens, is_text = _tokens(native, loaded.config.vocab_size, num_tokens)
    ours = np.asarray(forward_logits(loaded.config, loaded.params, jax.numpy.asarray(tokens)))[0]
    del loaded
    theirs = _hf_logits(origin, tokens, reference)[0]
    facts: dict[str, Any] = {"is_text": is_text, "dtype": dtype, "reference": reference}
    rounding = None
    if dtype != reference:
        rounded = _hf_logits(origin, tokens, dtype)[0]
        rounding = dataclasses.replace(_parity(rounded, theirs), **facts)
    return dataclasses.replace(_parity(ours, theirs), **facts, hf_rounding=rounding)


def _tokens(native: Path, vocab_size: int, num_tokens: int) -> tuple[np.ndarray, bool]:
    """One row of ids [1, T], and whether they are a text's: repeated where it is too short."""
    if has_vocabulary(native):
        with contextlib.suppress(InputError):  # the conversion says why it cannot be read
            ids = read_tokenizer(native).encode(PASSAGE, verbose=False)
            if ids and max(ids) < vocab_size:
                return np.resize(np.asarray(ids, np.int64), (1, num_tokens)), True
    return np.random.default_rng(0).integers(0, vocab_size, (1, num_tokens)), False


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


def _hf_logits(origin: Origin, tokens: np.ndarray, dtype: str) -> np.ndarray:
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    try:
        model = _hf_model(origin, getattr(torch, dtype))
        with torch.inference_mode():
            return model.eval()(torch.tensor(tokens)).logits.float().numpy()
    except Exception as error:  # transformers raises most kinds
        raise ConversionError(
            f"HF transformers cannot run {origin.path} ({type(error).__name__}: "
            f"{first_line(error)}): get a good copy of it, or another version of transformers"
        ) from error


def _hf_model(origin: Origin, dtype: Any) -> Any:
    """HF's model of a folder, or of the settings and tensors that were found in another format.

    (transformers has a reader of GGUF files, which drops settings: factors of the rotation, soft
    caps, windows, biases.)
    """
    import torch
    import transformers

    if origin.format == HF:
        return transformers.AutoModelForCausalLM.from_pretrained(
            origin.path, dtype=dtype, local_files_only=True, **NO_CODE
        )
    # A family's default padding token may be outside of a small vocabulary.
    fields = {"pad_token_id": None, **origin.provenance["config"]}
    config = transformers.CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
    state = {}
    for name in {part.name for parts in origin.table.values() for part in parts}:
        values = np.empty(origin.source.tensors[name].shape, np.float32)
        origin.source.read(name, values)
        state[name] = torch.from_numpy(values).to(dtype)
    kind = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return kind.from_pretrained(None, config=config, state_dict=state, dtype=dtype)


def _available_memory() -> int:
    """Bytes of main memory that this process could use."""
    free = free_host_memory_bytes()
    # Where nothing says so: all of it.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if free is None else free
