"""HF checkpoints to native ones and back: the command `s3d-convert`, and the functions below.

    convert.convert("path/to/hf_folder", "models/mine")
    convert.verify("models/mine", "path/to/hf_folder").agrees
    convert.export("models/mine", "path/to/new_hf_folder")

What they need is imported when they are called, so that `import convert` costs nothing.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convert.to_native import Report
    from convert.verification import Verification

__all__ = ["convert", "export", "verify"]


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    quantization: str | None = None,
    text: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    parity: bool = True,
    progress: bool = True,
) -> "Report":
    """Writes a native checkpoint folder from other people's weights.

    Works tensor by tensor: two layers (or the embedding table, or the output head; one is read
    while the other is written) and a copy of the largest tensor are in memory. Of torch's `.bin`
    files in the format before torch 1.6, which cannot be mapped, one whole file is in memory beside
    that. Nothing is written before all names, shapes and settings have been checked, and `out`
    appears when it is complete or not at all.

    A native checkpoint is taken, too, to be written in another dtype or quantised; its trained
    drafts come along.

    Where the tokenizer is a SentencePiece model alone (tokenizer.model), and sentencepiece is
    installed, a tokenizer.json is made of it. A tokenizer that cannot be read is no error: the
    report's `tokenizer_problem` says what to do.

    Args:
        source: a HF folder, the id of a model on the HF hub, a llama2.c `.bin` file, or a native
            checkpoint.
        out: the folder to write.
        dtype: "float32", "bfloat16" or "float16" to cast to; None keeps what is stored.
        quantization: "int8" for linear layers, embeddings and head in int8, with one scale per
            output; the rest, and what is computed between them, is of the dtype.
        text: a .txt or .jsonl file, to measure on what quantisation costs; None takes stories and
            dialogues of the package.
        tokenizer: a folder to take the tokenizer from, where `source` has none.
        revision: branch, tag or commit on the hub; a native checkpoint has none.
        overwrite: replace an existing checkpoint folder, and all that it holds.
        parity: compare with HF transformers at the end, where torch is there and memory allows;
            and quantised weights with those they were made from.
        progress: show a bar on a terminal.

    Returns:
        What was converted, with the parity measured.

    Raises:
        ConfigError: config.json has settings that are wrong, unknown, or not supported.
        ConversionError: the weights are damaged or do not fit (lists all faults at once), or a
            native checkpoint cannot become what is asked for.
        CheckpointError: `out` exists or cannot be written.
        InputError: `text` cannot be read.
    """
    from convert import to_native
    from convert.quantization import read_text
    from convert.recast import is_native, recast
    from s3d_jax.errors import ConfigError
    from s3d_jax.settings.model import DTYPES, QUANTIZATIONS

    # All that can be said at once, before anything is downloaded.
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is unknown; known are {DTYPES}")
    if quantization not in (None, *QUANTIZATIONS):
        raise ConfigError(
            f"quantization {quantization!r} is unknown; known is {tuple(QUANTIZATIONS)}"
        )
    if text is not None and quantization is None:
        raise ConfigError("a text is to measure on what quantization costs, and none is asked for")
    options: Any = dict(
        dtype=dtype,
        quantization=quantization,
        words=read_text(text),
        tokenizer=tokenizer,
        revision=revision,
        overwrite=overwrite,
        parity=parity,
        progress=progress,
    )
    if is_native(source):
        return recast(source, out, **options)
    return to_native.convert(source, out, **options)


def export(
    native: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Writes a HF folder (safetensors) from a native checkpoint.

    Float weights are the same bit for bit. Those of an int8 checkpoint are written in its dtype:
    int8 times scale, which a dtype of 16 bits rounds once more.

    Args:
        native: a native checkpoint folder.
        out: the folder to write.
        max_shard_size: bytes per safetensors file, or a text such as "500MB"; a larger tensor gets
            a file of its own.
        overwrite: replace an existing checkpoint folder, and all that it holds.
        progress: show a bar on a terminal.

    Returns:
        The folder.

    Raises:
        ConfigError: no HF model family can express the model, or `max_shard_size` is no size.
        CheckpointError: `native` is damaged, or `out` exists or cannot be written.
    """
    from convert.to_hf import export as run

    return run(native, out, max_shard_size=max_shard_size, overwrite=overwrite, progress=progress)


def verify(
    native: str | os.PathLike[str],
    source: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    num_tokens: int = 640,
    max_kl: float | None = None,
    revision: str | None = None,
) -> "Verification":
    """Compares a native checkpoint with its original, run by HF transformers (needs torch).

    Both get the same random tokens. One model is in memory at a time.

    Args:
        native: a native checkpoint folder.
        source: the HF folder or the id on the hub that it was converted from.
        dtype: of the computation; "bfloat16" and "float16" need half the memory of "float32", and
            round both models, each in its way.
        num_tokens: length of the sequence. Short ones do not see a wrong rotary embedding.
        max_kl: KL divergence, in nats, up to which the two count as the same. None is 1e-6 where
            weights and computation are exact, and 1e-2 where 16 bits round either.
        revision: branch, tag or commit on the hub.

    Returns:
        The differences, and whether the two count as the same.

    Raises:
        ConversionError: torch is missing, the memory does not suffice, `source` is damaged or
            cannot be run, or the two are different models.
        CheckpointError: `native` is damaged.
        ConfigError: an argument, or a setting of `source`, is wrong or not supported.
    """
    from convert.verification import verify as run

    return run(native, source, dtype=dtype, num_tokens=num_tokens, max_kl=max_kl, revision=revision)
