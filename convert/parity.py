"""Agreement of a converted checkpoint with HF transformers, measured in float32."""

import dataclasses
import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np

# Long enough to see a wrong rotation, which a short prompt cannot.
_LENGTH = 640


@dataclasses.dataclass(frozen=True)
class Parity:
    """How far two models differ on one sequence of random tokens.

    Attributes:
        num_tokens: length of the sequence.
        max_difference: largest absolute difference of two logits.
        greedy_agreement: share of the positions with the same most likely token.
    """

    num_tokens: int
    max_difference: float
    greedy_agreement: float


def measure_parity(
    hf_folder: Path | None, native: Path, num_params: int
) -> tuple[Parity | None, str]:
    """Runs both models, in float32, over the same random tokens.

    Args:
        hf_folder: the original, or None where there is none in HF's format.
        native: the converted one.
        num_params: their size, to see whether both fit into memory.

    Returns:
        The agreement; or None and the reason why it was not measured.
    """
    if hf_folder is None:
        return None, "the source is no HF checkpoint"
    if importlib.util.find_spec("torch") is None:
        return None, "torch is not installed (pip install 's3d-jax[torch]')"
    needed, free = 2 * 4 * num_params + (1 << 30), _available_memory()
    if needed > free:
        return None, f"it needs {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"
    try:
        return _compare(hf_folder, native), ""
    except KeyboardInterrupt:
        return None, "interrupted; the checkpoint itself is complete"
    except Exception as error:  # whatever ails HF's side, the conversion is done
        reason = str(error).strip().partition("\n")[0]
        return None, f"the comparison failed ({type(error).__name__}: {reason})"


def _compare(hf_folder: Path, native: Path) -> Parity:
    import jax

    from s3d_jax import checkpoint
    from s3d_jax.model import forward_logits

    loaded = checkpoint.load(native, "float32")
    vocab = loaded.config.vocab_size
    tokens = np.random.default_rng(0).integers(0, vocab, (1, _LENGTH))
    ours = np.asarray(forward_logits(loaded.config, loaded.params, jax.numpy.asarray(tokens)))[0]
    del loaded
    theirs = _hf_logits(hf_folder, tokens)[0]
    agreement = np.mean(np.argmax(ours, axis=-1) == np.argmax(theirs, axis=-1))
    return Parity(_LENGTH, float(np.abs(ours - theirs).max()), float(agreement))


def _hf_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    )
    with torch.inference_mode():
        return model.eval()(torch.tensor(tokens)).logits.numpy()


def _available_memory() -> int:
    """Bytes of main memory that a new program could use."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: all of it
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
