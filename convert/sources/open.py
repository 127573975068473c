"""Finds out what a source is, by its content, and opens it."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from convert.families import Family, Names, Part, Table, family_of
from convert.sources import hub, llama2c
from convert.sources.base import Source, read_hf_json
from convert.sources.gguf.metadata import is_gguf_file
from convert.sources.gguf.open import open_gguf
from convert.sources.hf_folder import is_safetensors, open_weights
from convert.sources.native import open_native
from convert.sources.outline import Outline, named_dtype, open_outline
from convert.sources.torch_bin import is_torch_file
from convert.sources.wrappers import Unwrapped
from convert.tokenizer import TokenizerFolder, TokenizerSource, given_tokenizer
from s3d_jax.drafters.stored import draft_names
from s3d_jax.errors import ConfigError, ConversionError
from s3d_jax.settings.model import DTYPES, ModelConfig
from s3d_jax.settings.records import is_integer
from s3d_jax.storage.adapters import adapter_problem
from s3d_jax.storage.native import FORMAT

HF, LLAMA2C, GGUF, NATIVE = "huggingface", "llama2.c", "GGUF", "native checkpoint"

_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a conversion starts from, whatever its format.

    Attributes:
        name: as the user knows it.
        format: HF, LLAMA2C, GGUF or NATIVE.
        config: the model, in the dtype that its tensors are stored in.
        table: its native arrays, and the tensors that make them up.
        source: the tensors.
        path: the folder or file on disk.
        provenance: what the checkpoint remembers of where its weights came from (JSON).
        generation_config: HF's generation_config.json, or what config.json says of it.
        tokenizer: where the tokenizer is taken from, or None.
        family: the kind of HF model; None for a native checkpoint.
        remote: of an outline, names and sizes of the files that are still on the hub.
        drafts: names of the trained drafts that come along.
        wrappers: what wrapped a HF model when it was saved, in words: the names of its tensors had
            prefixes that they have not here.
    """

    name: str
    format: str
    config: ModelConfig
    table: Table
    source: Source
    path: Path
    provenance: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    tokenizer: TokenizerSource | None
    family: Family | None = None
    remote: Mapping[str, int] = dataclasses.field(default_factory=dict)
    drafts: tuple[str, ...] = ()
    wrappers: tuple[str, ...] = ()

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return sorted({tensor.file for tensor in self.source.tensors.values()})

    @property
    def ignored_fields(self) -> tuple[str, ...]:
        """Fields of HF's config.json that the user passed without their being understood."""
        return tuple(self.provenance.get("ignored_fields", ()))

    @property
    def model_type(self) -> str:
        """HF's name of the family; the format if there is no family."""
        return self.family.model_type if self.family else self.format

    @property
    def names(self) -> Names | None:
        """Where HF's tensors are; None for a native checkpoint."""
        return self.family.names_in(self.source.tensors) if self.family else None

    def why_ignored(self, tensor: str) -> str:
        """Why a tensor is no part of the model; "" if it should be one."""
        return self.family.why_ignored(tensor) if self.family else ""


def open_origin(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    ignore_fields: Sequence[str] = (),
    outline: bool = False,
) -> Origin:
    """Finds out what `source` is, and opens it; downloads a model whose id on the hub it is.

    Args:
        source, revision, tokenizer, ignore_fields: as for `convert.convert`.
        outline: do without weights that are not here.

    Raises:
        ConversionError: there is no such source, it has no such revision, or it is damaged.
        CheckpointError: it is a damaged native checkpoint.
        ConfigError: config.json has settings that are wrong, unknown, or not supported.
    """
    own = None if tokenizer is None else given_tokenizer(tokenizer)
    path, name, remote = Path(source), str(source), dict[str, int]()
    if revision is not None and path.exists():
        raise ConversionError(
            f"{source} is on disk, and has no revision {revision!r}: leave --revision out"
        )
    if path.is_file():
        _refuse_to_ignore(ignore_fields, name)
        return _open_file(path, own)
    if path.is_dir():
        folder, name = path, path.resolve().name
    elif outline:
        folder, remote = hub.outline(name, revision)
    else:
        folder = hub.download(name, revision)
    if problem := adapter_problem(folder, "" if path.is_dir() else name):
        raise ConversionError(problem)
    fields = read_hf_json(folder / "config.json")
    if fields.get("format") == FORMAT:
        _refuse_to_ignore(ignore_fields, name)
        return _open_native(folder, name, own)
    family = family_of(fields)
    weights: Unwrapped | Outline = (
        open_outline(folder, remote, family, fields, ignore_fields)
        if outline
        else open_weights(folder)
    )
    generation = _generation_config(folder, fields)
    origin = _describe(name, HF, folder, fields, generation, weights, own, ignore_fields)
    return dataclasses.replace(
        origin,
        tokenizer=own or TokenizerFolder(folder),
        remote=remote,
        wrappers=weights.wrappers,
    )


def _refuse_to_ignore(fields: Sequence[str], name: str) -> None:
    if fields:
        raise ConversionError(
            f"--ignore-field is for the config.json of a HF model, and {name} is none: leave it out"
        )


def _open_file(path: Path, tokenizer: TokenizerSource | None) -> Origin:
    if is_torch_file(path) or is_safetensors(path):
        raise ConversionError(
            f"{path} is neither a GGUF nor a llama2.c file: give the HF folder it lies in"
        )
    if is_gguf_file(path):
        fields, tensors, found = open_gguf(path, with_tokenizer=tokenizer is None)
        generation = {name: fields[name] for name in _SPECIAL_TOKENS if name in fields}
        return _describe(path.name, GGUF, path, fields, generation, tensors, tokenizer or found)
    fields, weights = llama2c.open_file(path)
    special = dict(llama2c.SPECIAL_TOKENS)
    return _describe(path.name, LLAMA2C, path, fields, special, weights, tokenizer)


def _open_native(folder: Path, name: str, tokenizer: TokenizerSource | None) -> Origin:
    header, weights = open_native(folder)
    return Origin(
        name=name,
        format=NATIVE,
        config=header.config,
        table={path: (Part(path, record.shape),) for path, record in header.arrays.items()},
        source=weights,
        path=folder,
        provenance=header.source,
        generation_config=header.generation_config,
        tokenizer=tokenizer or TokenizerFolder(folder),
        drafts=draft_names(folder),
    )


def _describe(
    name: str,
    form: str,
    path: Path,
    fields: dict[str, Any],
    generation_config: dict[str, Any],
    source: Source,
    tokenizer: TokenizerSource | None,
    ignored: Sequence[str] = (),
) -> Origin:
    """The origin that HF's config.json describes.

    Raises:
        ConfigError: a setting is wrong, unknown, or not supported.
    """
    family = family_of(fields)
    config = family.config(fields, ignored).replace(dtype=_stored_dtype(source, fields))
    _check_eos(generation_config, config)
    return Origin(
        name=name,
        format=form,
        config=config,
        table=family.table(config, source.tensors),
        source=source,
        path=path,
        provenance={"name": name, "format": form, "config": fields}
        | ({"ignored_fields": list(ignored)} if ignored else {}),
        generation_config=generation_config,
        tokenizer=tokenizer,
        family=family,
    )


def _stored_dtype(source: Source, fields: Mapping[str, Any]) -> str:
    """The dtype of the tensors if they agree, else what config.json says, else float32."""
    stored = {tensor.dtype for tensor in source.tensors.values()} & set(DTYPES)
    return stored.pop() if len(stored) == 1 else named_dtype(fields)


def _generation_config(folder: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Reads generation_config.json; config.json names the special tokens that it does not."""
    path = folder / "generation_config.json"
    generation = read_hf_json(path) if path.is_file() else {}
    for name in _SPECIAL_TOKENS:
        if generation.get(name) is None and fields.get(name) is not None:
            generation[name] = fields[name]
    return generation


def _check_eos(generation_config: Mapping[str, Any], config: ModelConfig) -> None:
    ids = generation_config.get("eos_token_id")
    for i in ids if isinstance(ids, list) else [] if ids is None else [ids]:
        if not is_integer(i) or not 0 <= i < config.vocab_size:
            raise ConfigError(
                f"eos_token_id {i!r:.80} is no token of the vocabulary (0 to "
                f"{config.vocab_size - 1}): correct it in a copy of the folder"
            )
