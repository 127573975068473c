"""Other people's weights, or a native checkpoint's, -> a native checkpoint."""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from convert.options import ConversionOptions, Dtype, Quantization
from convert.parity import Parity, measure_parity
from convert.progress import notice, progress_bar
from convert.quantization import QuantizationLoss, measure_loss, read_calibration_text
from convert.target import is_rounded, open_target
from s3d_jax.drafters.stored import read_draft, write_draft
from s3d_jax.jax_settings import under_usual_jax_settings
from s3d_jax.settings.model import ModelConfig
from s3d_jax.storage.native import CheckpointWriter, checkpoint_writer

_NOT_ASKED = "not asked for"


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """What was converted.

    Attributes:
        out: the native folder.
        config: the model.
        num_params: its parameters; tied embeddings count once.
        num_bytes: bytes of weights written.
        stored_dtypes: the types in which the source's tensors are stored. Tensors of another type
            than the config's were cast.
        unneeded: tensors of the source that were not read, and why.
        tokenizer: whether a tokenizer came along that can be read.
        tokenizer_problem: why it cannot be read and what to do about it, or "".
        parity: agreement with HF transformers, or None.
        parity_skipped: why `parity` is None, or "".
        loss: what quantisation cost, or None.
        loss_skipped: why `loss` is None, or "".
        drafts: names of trained drafts that came along.
        ignored_fields: fields of config.json that were passed without being understood.
        wrappers: what wrapped the model when it was saved, such as "_orig_mod. (torch.compile)":
            prefixes that were left out of the names of tensors.
    """

    out: Path
    config: ModelConfig
    num_params: int
    num_bytes: int
    stored_dtypes: tuple[str, ...]
    unneeded: Mapping[str, str]
    tokenizer: bool
    tokenizer_problem: str
    parity: Parity | None
    parity_skipped: str
    loss: QuantizationLoss | None
    loss_skipped: str
    drafts: tuple[str, ...]
    ignored_fields: tuple[str, ...]
    wrappers: tuple[str, ...]

    @property
    def is_rounded(self) -> bool:
        """Whether casting or quantising the weights lost bits."""
        return is_rounded(self.stored_dtypes, self.config)


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: Dtype | None = None,
    quantization: Quantization | None = None,
    text: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    ignore_fields: str | Sequence[str] = (),
    overwrite: bool = False,
    parity: bool = True,
    progress: bool = True,
) -> ConversionReport:
    """Writes a native checkpoint folder from other people's weights.

    Works tensor by tensor. In memory are two layers (or the embedding table, or the output head;
    one is read while the other is written) and a copy of the largest tensor. Torch's `.bin` files
    in the format before torch 1.6 cannot be mapped: one whole file is in memory in addition.
    Nothing is written before all names, shapes and settings have been checked. `out` appears when
    it is complete, or not at all.

    A native checkpoint can be converted too, to another dtype, to int8 or to int4. Its trained
    drafts come along.

    A tokenizer that is a SentencePiece model alone (tokenizer.model) becomes a tokenizer.json, if
    sentencepiece is installed. A tokenizer that cannot be read is no error: the report's
    `tokenizer_problem` says what to do.

    Args:
        source: a HF folder, the id of a model on the HF hub, a GGUF file, a llama2.c `.bin` file,
            or a native checkpoint.
        out: the folder to write.
        dtype: "float32", "bfloat16" or "float16" to cast to; None keeps the stored type.
        quantization: "int8" stores linear layers, embeddings and head in int8, rotated, with one
            scale per output; "int8-plain" does not rotate; "int4" stores linear layers in 4.25 bits
            and the others in int8; "blocks" keeps the blocks of a GGUF file. The rest, and
            activations, are in the dtype.
        text: a .txt or .jsonl file to measure the loss of quantization on; None takes stories and
            dialogues of the package.
        tokenizer: a folder to take the tokenizer from, if `source` has none.
        revision: branch, tag or commit on the hub.
        ignore_fields: names of fields of config.json that are not understood, and that you know to
            have no effect on what the model computes. The checkpoint records them.
        overwrite: replace an existing checkpoint folder, and all that it holds.
        parity: compare with HF transformers at the end, if torch is installed and memory allows;
            compare quantised weights with the weights they were made from.
        progress: show a bar on a terminal.

    Returns:
        What was converted, and the measured parity.

    Raises:
        ConfigError: an option is wrong, or config.json has settings that are wrong, unknown, or not
            supported.
        ConversionError: the weights are damaged or do not fit (lists all faults at once), or a
            native checkpoint cannot become what is asked for.
        CheckpointError: `out` exists or cannot be written.
        InputError: `text` cannot be read.
    """
    options = ConversionOptions(
        dtype=dtype,
        quantization=quantization,
        text=text,
        tokenizer=tokenizer,
        revision=revision,
        ignore_fields=(ignore_fields,) if isinstance(ignore_fields, str) else tuple(ignore_fields),
        overwrite=overwrite,
        parity=parity,
        progress=progress,
    )
    return write_native(source, out, options)


@under_usual_jax_settings
def write_native(
    source: str | os.PathLike[str], out: str | os.PathLike[str], options: ConversionOptions
) -> ConversionReport:
    """Does what `convert` does, and raises what it raises."""
    # Read first, so that an unreadable text is reported before anything is downloaded.
    calibration_text = read_calibration_text(options.text) if options.quantization else ""
    target = open_target(source, out, options)
    target.check(reading=True)
    origin, config = target.origin, target.config
    drafts = [read_draft(origin.path, name, config) for name in origin.drafts]
    with (
        checkpoint_writer(
            out,
            config,
            source=origin.provenance,
            generation_config=origin.generation_config,
            overwrite=options.overwrite,
            needs=target.num_bytes,
        ) as writer,
        progress_bar("converting", target.num_float_bytes, options.progress) as bar,
    ):
        _write_groups(writer, target.stored_groups(bar))
        problem = origin.tokenizer.write(writer) if origin.tokenizer else ""
        for draft in drafts:
            assert draft.params is not None  # read_draft read the weights
            folder = writer.folder / "drafts" / draft.name
            write_draft(folder, config, draft.config, draft.params, draft.training)

    parity, parity_skipped, loss, loss_skipped = None, _NOT_ASKED, None, _NOT_ASKED
    if options.parity:
        with notice("comparing with HF transformers", options.progress):
            # Where the cast rounded the weights, HF's model rounded so stands next to ours.
            is_cast = config.quantization is None and is_rounded(target.stored_dtypes, config)
            parity, parity_skipped = measure_parity(
                origin, Path(out), target.num_stored, config.dtype if is_cast else "float32"
            )
        if options.quantization:
            with progress_bar("measuring", target.num_float_bytes, options.progress) as bar:
                groups = target.read_groups(bar)
                loss, loss_skipped = measure_loss(groups, config, Path(out), calibration_text)
    return ConversionReport(
        out=Path(out),
        config=config,
        num_params=target.num_params,
        num_bytes=target.num_bytes,
        stored_dtypes=target.stored_dtypes,
        unneeded=target.unneeded,
        tokenizer=bool(origin.tokenizer and origin.tokenizer.is_complete and not problem),
        tokenizer_problem=problem,
        parity=parity,
        parity_skipped=parity_skipped,
        loss=loss,
        loss_skipped=loss_skipped,
        drafts=origin.drafts,
        ignored_fields=origin.ignored_fields,
        wrappers=origin.wrappers,
    )


def _write_groups(writer: CheckpointWriter, groups: Iterable[tuple[str, dict[str, Any]]]) -> None:
    """Writes the groups of a model, as they are stored."""
    with ThreadPoolExecutor(1) as background:  # writes a group while the next one is read
        written = background.submit(lambda: None)
        for name, tree in groups:
            written.result()
            written = background.submit(writer.write_group, name, tree)
        written.result()
