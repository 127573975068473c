"""Whether a native checkpoint holds and computes what its original does."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from convert.options import Dtype, VerificationOptions
from convert.parity import Parity, compare, obstacle
from convert.progress import progress_bar
from convert.sources.open import HF, open_origin
from convert.target import ConversionTarget, is_rounded
from s3d_jax.errors import ConversionError
from s3d_jax.jax_settings import under_usual_jax_settings
from s3d_jax.storage.native import Header, read_group, read_header
from s3d_jax.storage.trees import flatten

# KL divergences in nats. With the same weights, float32 leaves about 1e-9 and 16 bits leave more; a
# wrong model exceeds either limit.
_EXACT, _ROUNDED, _FOUR_BITS = 1e-6, 1e-2, 0.5


@dataclasses.dataclass(frozen=True)
class StoredDifferences:
    """Where a native checkpoint differs from the file that it was converted from.

    Attributes:
        num_arrays: the arrays of the model.
        settings: the settings that differ, with both values.
        arrays: path of each array with other bits -> the largest difference of two numbers;
            None where it is missing, or of another shape or type.
    """

    num_arrays: int
    settings: tuple[str, ...]
    arrays: Mapping[str, float | None]


@dataclasses.dataclass(frozen=True)
class Verification:
    """What was compared, and the verdict on it.

    Attributes:
        parity: agreement of the logits; None where they could not be compared.
        parity_skipped: why `parity` is None, or "".
        stored: differences of what is stored; None for a HF checkpoint, whose logits are compared.
        dtype: of the computation.
        stored_dtypes, native_dtype: of the weights, in the original and in the native checkpoint.
        max_kl: the KL divergence up to which the two count as the same, in nats.
    """

    parity: Parity | None
    parity_skipped: str
    stored: StoredDifferences | None
    dtype: str
    stored_dtypes: tuple[str, ...]
    native_dtype: str
    max_kl: float

    @property
    def agrees(self) -> bool:
        if self.stored and (self.stored.settings or self.stored.arrays):
            return False
        return self.parity is None or self.parity.kl <= self.max_kl  # False for NaN as well


def verify(
    native: str | os.PathLike[str],
    source: str | os.PathLike[str],
    *,
    dtype: Dtype = "float32",
    num_tokens: int = 640,
    max_kl: float | None = None,
    revision: str | None = None,
) -> Verification:
    """Compares a native checkpoint with its original.

    HF transformers runs the original (needs torch), and the logits are compared, over a text where
    the checkpoint has a tokenizer, else over random tokens. One model is in memory at a time.

    Of a GGUF or llama2.c file, settings and weights are compared first, bit for bit, with what the
    file's numbers become in the checkpoint's type. Where torch or memory is missing, the result
    says so and stands on that alone.

    Args:
        native: a native checkpoint folder.
        source: the HF folder, the id on the hub, or the GGUF or llama2.c file that it was
            converted from.
        dtype: of the computation. In "bfloat16" and "float16", HF's model runs in float32 and in
            that type, so that its own rounding stands next to ours; where only half the memory of
            float32 is free, HF's model runs in that type alone.
        num_tokens: length of the sequence. Short ones do not show a wrong rotary embedding.
        max_kl: KL divergence, in nats, up to which the two count as the same. None is 1e-6 if
            weights and computation are exact, and 1e-2 if 16 bits round either.
        revision: branch, tag or commit on the hub.

    Returns:
        The differences, and whether the two count as the same.

    Raises:
        ConversionError: a HF checkpoint is to be compared, and torch is missing or the memory does
            not suffice; `source` is damaged or cannot be run; or the two are different models.
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
    if origin.family is None:
        raise ConversionError(f"{source} is a {origin.format}: give what it was converted from")
    if origin.wrappers:
        raise ConversionError(
            f"HF transformers does not read the names of tensors in {source}, which begin with "
            f"{' and '.join(origin.wrappers)}: save the model inside of the wrapper, and give that"
        )
    # Of a HF folder the logits are compared, which has no blocks to keep.
    quantization = None if origin.format == HF else header.config.quantization
    target = ConversionTarget.of(origin, header.config.dtype, quantization)
    target.check(reading=True)
    vocab_size = origin.config.vocab_size
    if vocab_size != header.config.vocab_size:
        raise ConversionError(
            f"{native} has a vocabulary of {header.config.vocab_size} tokens, and {source} one of "
            f"{vocab_size}: choose the checkpoint that it was converted from"
        )
    stored = None if origin.format == HF else _stored_differences(header, target)
    parity, num_params = None, target.num_stored
    reason = obstacle(num_params, vocab_size, dtype, num_tokens)
    if reason and stored is None:
        raise ConversionError(f"{native} and {source} cannot be compared: {reason}")
    if not reason:
        fits = not obstacle(num_params, vocab_size, "float32", num_tokens)
        reference = "float32" if fits else dtype
        parity = compare(
            origin, Path(native), dtype=dtype, reference=reference, num_tokens=num_tokens
        )
    types = target.stored_dtypes
    rounds = dtype != "float32" or is_rounded(types, header.config)
    usual = _ROUNDED if rounds else _EXACT
    if header.config.quantization == "int4":
        usual = _FOUR_BITS
    limit = usual if options.max_kl is None else options.max_kl
    return Verification(parity, reason, stored, dtype, types, header.config.precision, limit)


def _stored_differences(header: Header, target: ConversionTarget) -> StoredDifferences:
    """Reads both, group by group."""
    # How sums are computed is a choice of the checkpoint's owner, and no fact of the file.
    wanted = target.config.replace(exact_sums=header.config.exact_sums)
    settings = [
        f"{name}: {value!r:.80}, and in the file {getattr(wanted, name)!r:.80}"
        for name, value in vars(header.config).items()
        if value != getattr(wanted, name)
    ]
    num_arrays, different = 0, dict[str, float | None]()
    with progress_bar("comparing", target.num_float_bytes, False) as bar:
        for name, tree in target.stored_groups(bar):
            expected = flatten(tree)
            found = flatten(read_group(header, name)) if name in header.groups else {}
            num_arrays += len(expected)
            different |= {f"{name}/{path}": None for path in found.keys() - expected.keys()}
            for path, array in expected.items():
                where = f"{name}/{path}"
                other = found.get(path)
                if other is None or other.shape != array.shape or other.dtype != array.dtype:
                    different[where] = None
                elif other.tobytes() != array.tobytes():
                    a, b = (x.astype(np.float32) for x in (array, other))
                    different[where] = float(np.max(np.abs(a - b)))
    return StoredDifferences(num_arrays, tuple(settings), different)
