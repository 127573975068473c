"""A native checkpoint in another type, or quantised, with its drafts. See `convert.convert`."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convert.hf import DTYPES, read_json
from convert.quantization import measure_loss
from convert.to_native import (
    NOT_ASKED,
    Report,
    is_finite,
    progress_bar,
    tokenizer_folder,
    write_groups,
)
from convert.tokenizer import write_tokenizer
from s3d_jax.drafters.stored import draft_names, read_draft, write_draft
from s3d_jax.errors import ConversionError
from s3d_jax.nn.transformer import num_params, weight_bytes
from s3d_jax.settings.model import ModelConfig
from s3d_jax.storage.arrays import cast
from s3d_jax.storage.native import FORMAT, Header, checkpoint_writer, read_group, read_header
from s3d_jax.storage.staging import check_apart
from s3d_jax.storage.tokenizer import has_vocabulary
from s3d_jax.storage.trees import flatten, unflatten


def is_native(source: str | os.PathLike[str]) -> bool:
    """Whether it is a folder that says that it is a native checkpoint."""
    try:
        return read_json(Path(source) / "config.json").get("format") == FORMAT
    except ConversionError:
        return False


def opened(
    source: str | os.PathLike[str],
    dtype: str | None,
    quantization: str | None,
    revision: str | None,
) -> tuple[Header, ModelConfig]:
    """A native checkpoint's header, and the model that is to be made of it.

    Raises:
        ConversionError: it is quantised already, nothing is asked for, or a revision is.
        CheckpointError: its header is damaged.
    """
    header = read_header(source)
    if revision is not None:
        raise ConversionError(
            f"{source} is a native checkpoint on disk, which has no revision {revision!r}: leave "
            "--revision out"
        )
    if header.config.quantization:
        raise ConversionError(
            f"{source} is in {header.config.quantization}, which is rounded already: convert what "
            "it was made from; or, to have these weights in a float type, write a HF folder "
            "(s3d-convert export) and convert that"
        )
    if dtype is None and quantization is None:
        raise ConversionError(
            f"{source} is a native checkpoint already: load it as it is, or say what to make of it "
            "(--quantize int8, --dtype ...)"
        )
    config = header.config
    return header, config.replace(dtype=dtype or config.dtype, quantization=quantization)


def recast(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: str | None,
    quantization: str | None,
    words: str,
    tokenizer: str | os.PathLike[str] | None,
    revision: str | None,
    overwrite: bool,
    parity: bool,
    progress: bool,
) -> Report:
    header, config = opened(source, dtype, quantization, revision)
    own = None if tokenizer is None else tokenizer_folder(tokenizer)
    check_apart(out, source, own)
    float_type = DTYPES[config.dtype]
    drafts = [read_draft(source, name, config) for name in draft_names(source)]
    num_parameters = num_params(config)

    def groups(bar: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        for name in header.groups:
            arrays = {}
            for path, x in flatten(read_group(header, name), name).items():
                if not is_finite(x):
                    raise ConversionError(
                        f"{path} in {source} holds infinities or NaN: convert or train the model "
                        "again"
                    )
                arrays[path] = cast(x, float_type, path)
                bar.update(arrays[path].nbytes)
            yield name, unflatten(arrays)[name]

    total = num_parameters * float_type.itemsize
    with (
        checkpoint_writer(
            out,
            config,
            source=header.source,
            generation_config=header.generation_config,
            overwrite=overwrite,
            needs=weight_bytes(config),
        ) as writer,
        progress_bar("converting", total, progress) as bar,
    ):
        write_groups(writer, groups(bar))
        problem = write_tokenizer(own or Path(source), writer)
        for draft in drafts:
            assert draft.params is not None
            folder = writer.folder / "drafts" / draft.name
            write_draft(folder, config, draft.config, draft.params, draft.training)
    loss, loss_skipped = None, NOT_ASKED
    if quantization and parity:
        with progress_bar("measuring", total, progress) as bar:
            loss, loss_skipped = measure_loss(groups(bar), config, Path(out), words)
    return Report(
        out=Path(out),
        config=config,
        num_params=num_parameters,
        num_bytes=weight_bytes(config),
        stored_dtypes=(header.config.dtype,),
        tokenizer=has_vocabulary(own or source) and not problem,
        tokenizer_problem=problem,
        parity=None,
        parity_skipped="the source is a native checkpoint",
        unneeded={},
        loss=loss,
        loss_skipped=loss_skipped,
        drafts=tuple(draft.name for draft in drafts),
    )
