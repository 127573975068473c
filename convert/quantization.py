"""What quantised weights cost: perplexity and logits against the float weights before."""

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from convert.parity import attempt, lacking_memory, logits_bytes
from convert.sources.base import FLOATS
from s3d_jax.machine import default_device
from s3d_jax.settings.model import ModelConfig
from s3d_jax.storage.tokenizer import has_vocabulary, read_tokenizer
from s3d_jax.texts.documents import read_texts
from s3d_jax.texts.files import read_jsonl
from s3d_jax.texts.suites import HELD_OUT

_ROW = 256  # tokens that see each other
_ROWS = 8


@dataclasses.dataclass(frozen=True)
class QuantizationLoss:
    """How far a quantised model is from the float model, on the same tokens.

    Attributes:
        num_tokens: how many.
        perplexity: of the float and of the quantised model; None without a tokenizer, because then
            the tokens are random.
        kl: KL divergence of the next token's distribution from the float model's, in nats, mean
            over the positions.
        greedy_agreement: share of the positions with the same most likely token.
        acceptable_kl: what a conversion warns above; five times what llama.cpp's q8_0 costs in
            SmolLM2-135M.
    """

    acceptable_kl: ClassVar[float] = 0.02

    num_tokens: int
    perplexity: tuple[float, float] | None
    kl: float
    greedy_agreement: float


def measure_loss(
    groups: Iterable[tuple[str, Mapping[str, Any]]],
    config: ModelConfig,
    native: Path,
    calibration_text: str,
) -> tuple[QuantizationLoss | None, str]:
    """Compares a quantised checkpoint with the float weights.

    Args:
        groups: the float model's parameter tree, group by group.
        config: of the quantised model.
        native: the quantised checkpoint.
        calibration_text: the text to run both on.

    Returns:
        The loss, and ""; or None, and the reason why it was not measured.
    """
    return attempt(lambda: _measure(groups, config, native, calibration_text))


def _measure(
    groups: Iterable[tuple[str, Mapping[str, Any]]],
    config: ModelConfig,
    native: Path,
    calibration_text: str,
) -> tuple[QuantizationLoss | None, str]:
    import jax

    from s3d_jax.nn.transformer import forward_logits, num_params
    from s3d_jax.storage import native as checkpoint

    default_device()
    ids = _tokens(native, config.vocab_size, calibration_text)
    if ids.shape[1] < 2:
        return None, "the text is too short"
    unquantized = config.unquantized()
    weights = FLOATS[config.dtype].itemsize * num_params(unquantized)
    if reason := lacking_memory(weights + logits_bytes(ids.size, config.vocab_size)):
        return None, reason

    def log_probabilities(config: ModelConfig, params: Any) -> list[np.ndarray]:
        logits = (np.asarray(forward_logits(config, params, row[None]))[0] for row in ids)
        return [x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in logits]

    params = {name: jax.device_put(dict(tree)) for name, tree in groups}
    p = log_probabilities(unquantized, params)
    del params
    stored = checkpoint.load(native)
    q = log_probabilities(stored.config, stored.params)
    return _loss(p, q, ids, has_vocabulary(native)), ""


def _loss(
    p: list[np.ndarray], q: list[np.ndarray], ids: np.ndarray, is_text: bool
) -> QuantizationLoss:
    """Compares the log probabilities of both models, [T, V] for each row of ids [R, T]."""
    kl = np.mean([np.mean(np.sum(np.exp(a) * (a - b), axis=-1)) for a, b in zip(p, q, strict=True)])
    same = np.mean([np.mean(a.argmax(-1) == b.argmax(-1)) for a, b in zip(p, q, strict=True)])

    def perplexity(rows: list[np.ndarray]) -> float:
        positions = np.arange(ids.shape[1] - 1)
        return math.exp(-np.mean([x[positions, row[1:]] for x, row in zip(rows, ids, strict=True)]))

    return QuantizationLoss(
        num_tokens=ids.size,
        perplexity=(perplexity(p), perplexity(q)) if is_text else None,
        kl=float(kl),
        greedy_agreement=float(same),
    )


def _tokens(native: Path, vocab_size: int, calibration_text: str) -> np.ndarray:
    """Rows of ids, int32 [R, T]: the text's if the checkpoint has a tokenizer, else random."""
    if not has_vocabulary(native):
        return np.random.default_rng(0).integers(0, vocab_size, (_ROWS, _ROW), np.int32)
    ids = np.asarray(read_tokenizer(native).encode(calibration_text, verbose=False), np.int32)
    ids = ids[: _ROWS * _ROW]
    row = max(1, min(_ROW, len(ids)))
    return ids[: len(ids) // row * row].reshape(-1, row)


def read_calibration_text(text: str | os.PathLike[str] | None) -> str:
    """The texts of a .txt or .jsonl file; without one, stories and dialogues of the package.

    Stories and dialogues alternate, because only the first tokens are used.

    Raises:
        InputError: it cannot be read.
    """
    if text is not None:
        return "\n".join(read_texts([text]))
    stories = (fields["prompt"] for _, fields in read_jsonl(HELD_OUT / "stories.jsonl"))
    dialogues = (
        "\n".join(message["content"] for message in fields["messages"])
        for _, fields in read_jsonl(HELD_OUT / "dialogues.jsonl")
    )
    return "\n".join(text for pair in zip(stories, dialogues, strict=True) for text in pair)
