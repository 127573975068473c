"""Whether a native checkpoint computes what its HF original does."""

import dataclasses
import os
from pathlib import Path

from convert.options import Dtype, VerificationOptions
from convert.parity import Parity, compare, obstacle
from convert.sources.open import HF, open_origin
from convert.target import ConversionTarget, is_rounded
from s3d_jax.errors import ConversionError
from s3d_jax.jax_settings import under_usual_jax_settings
from s3d_jax.storage.native import read_header

# KL divergences in nats. With the same weights, float32 leaves about 1e-9 and 16 bits leave more; a
# wrong model exceeds either limit.
_EXACT, _ROUNDED = 1e-6, 1e-2


@dataclasses.dataclass(frozen=True)
class Verification:
    """A parity, and the verdict on it.

    Attributes:
        parity: what was measured.
        dtype: of the computation, in both models.
        stored_dtypes, native_dtype: of the weights, in the original and in the native checkpoint.
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
    dtype: Dtype = "float32",
    num_tokens: int = 640,
    max_kl: float | None = None,
    revision: str | None = None,
) -> Verification:
    """Compares a native checkpoint with its original, run by HF transformers (needs torch).

    Both get the same random tokens. One model is in memory at a time.

    Args:
        native: a native checkpoint folder.
        source: the HF folder or the id on the hub that it was converted from.
        dtype: of the computation. "bfloat16" and "float16" need half the memory of "float32", and
            round both models, each in its own way.
        num_tokens: length of the sequence. Short ones do not show a wrong rotary embedding.
        max_kl: KL divergence, in nats, up to which the two count as the same. None is 1e-6 if
            weights and computation are exact, and 1e-2 if 16 bits round either.
        revision: branch, tag or commit on the hub.

    Returns:
        The differences, and whether the two count as the same.

    Raises:
        ConversionError: torch is missing, the memory does not suffice, `source` is damaged or
            cannot be run, or the two are different models.
        CheckpointError: `native` is damaged.
        ConfigError: an argument, or a setting of `source`, is wrong or not supported.
    """
    options = VerificationOptions(dtype, num_tokens, max_kl, revision)
    return verify_with(native, source, options)


@under_usual_jax_settings
def verify_with(
    native: str | os.PathLike[str], source: str | os.PathLike[str], options: VerificationOptions
) -> Verification:
    """Does what `verify` does, and raises what it raises."""
    dtype, num_tokens = options.dtype, options.num_tokens
    header = read_header(native)
    ignored = header.source.get("ignored_fields", ())
    origin = open_origin(source, revision=options.revision, ignore_fields=ignored)
    if origin.format != HF:
        raise ConversionError(f"{source} is no HF checkpoint, and nothing else can be compared")
    if origin.wrappers:
        raise ConversionError(
            f"HF transformers does not read the names of tensors in {source}, which begin with "
            f"{' and '.join(origin.wrappers)}: save the model inside of the wrapper, and give that"
        )
    target = ConversionTarget.of(origin)
    target.check(reading=True)
    vocab_size = origin.config.vocab_size
    if vocab_size != header.config.vocab_size:
        raise ConversionError(
            f"{native} has a vocabulary of {header.config.vocab_size} tokens, and {source} one of "
            f"{vocab_size}: choose the checkpoint that it was converted from"
        )
    if reason := obstacle(target.num_stored, vocab_size, dtype, num_tokens):
        raise ConversionError(f"{native} and {source} cannot be compared: {reason}")
    parity = compare(origin.path, Path(native), dtype=dtype, num_tokens=num_tokens)
    stored = target.stored_dtypes
    rounds = dtype != "float32" or is_rounded(stored, header.config)
    usual = _ROUNDED if rounds else _EXACT
    limit = usual if options.max_kl is None else options.max_kl
    return Verification(parity, dtype, stored, header.config.precision, limit)
