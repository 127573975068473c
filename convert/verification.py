"""Whether a native checkpoint computes what its HF original does. See `convert.verify`."""

import dataclasses
import os
from pathlib import Path

from convert.parity import LENGTH, Parity, compare, obstacle
from convert.to_native import (
    Model,
    check_tensors,
    is_rounded,
    num_stored,
    open_origin,
    stored_dtypes,
)
from s3d_jax.errors import ConfigError, ConversionError
from s3d_jax.settings.model import DTYPES
from s3d_jax.storage.native import read_header

# KL divergences in nats. Where the weights are the same, float32 leaves some 1e-9; 16 bits lose
# more, and a wrong model is beyond either.
_EXACT, _ROUNDED = 1e-6, 1e-2


@dataclasses.dataclass(frozen=True)
class Verification:
    """A parity, and what is made of it.

    Attributes:
        parity: what was measured.
        dtype: of the computation, in both models.
        stored_dtypes, native_dtype: of the weights of either.
        max_kl: the KL divergence up to which the two count as the same, in nats.
    """

    parity: Parity
    dtype: str
    stored_dtypes: tuple[str, ...]
    native_dtype: str
    max_kl: float

    @property
    def agrees(self) -> bool:
        return self.parity.kl <= self.max_kl  # False for NaN as well


def verify(
    native: str | os.PathLike[str],
    source: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    num_tokens: int = LENGTH,
    max_kl: float | None = None,
    revision: str | None = None,
) -> Verification:
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is unknown; known are {DTYPES}")
    if num_tokens < 1:
        raise ConfigError(f"the number of tokens must be at least 1, got {num_tokens}")
    header = read_header(native)
    origin = open_origin(source, revision)
    if origin.format != "huggingface":
        raise ConversionError(f"{source} is no HF checkpoint, and nothing else can be compared")
    model = Model.of(origin, None)
    check_tensors(model, origin.source)
    if model.config.vocab_size != header.config.vocab_size:
        raise ConversionError(
            f"{native} has a vocabulary of {header.config.vocab_size} tokens, and {source} one of "
            f"{model.config.vocab_size}: choose the checkpoint that it was converted from"
        )
    num_params = num_stored(origin.source)
    if reason := obstacle(num_params, model.config.vocab_size, dtype, num_tokens):
        raise ConversionError(f"{native} and {source} cannot be compared: {reason}")
    parity = compare(origin.path, Path(native), dtype=dtype, num_tokens=num_tokens)
    stored = stored_dtypes(model, origin.source)
    rounds = dtype != "float32" or is_rounded(stored, header.config)
    limit = (_ROUNDED if rounds else _EXACT) if max_kl is None else max_kl
    return Verification(parity, dtype, stored, header.config.precision, limit)
