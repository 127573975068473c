"""Other people's weights -> the native checkpoint. See `convert.convert`."""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from convert import hf, hub, llama2c
from convert.families import Family, Table, family_of, native_shape, pieces
from convert.parity import Parity, measure_parity
from s3d_jax.checkpoint import (
    FORMAT,
    CheckpointWriter,
    bullets,
    checkpoint_writer,
    tokenizer_files,
    unflatten,
)
from s3d_jax.config import DTYPES, ModelConfig
from s3d_jax.errors import ConfigError, ConversionError
from s3d_jax.staging import check_apart

_COMPARED_AT_ONCE = 1 << 24  # elements
_BLOCK = 64  # rows that are transposed at a time, so that the columns written stay in the cache


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a conversion starts from, whatever its format.

    Attributes:
        name: as the user knows it; goes into the checkpoint's provenance.
        format: "huggingface" or "llama2.c".
        fields: HF's config.json.
        generation_config: HF's generation_config.json, or what config.json says of it.
        source: the tensors, under their HF names.
        tokenizer_files: to be copied.
        folder: the HF folder on disk, or None.
    """

    name: str
    format: str
    fields: dict[str, Any]
    generation_config: dict[str, Any]
    source: hf.Source
    tokenizer_files: tuple[Path, ...]
    folder: Path | None


@dataclasses.dataclass(frozen=True)
class Report:
    """What was converted.

    Attributes:
        out: the native folder.
        config: the model.
        num_params: its parameters; tied embeddings count once.
        num_bytes: bytes of weights written.
        tokenizer: whether a tokenizer came along.
        parity: agreement with HF transformers, or None.
        parity_skipped: why `parity` is None, or "".
    """

    out: Path
    config: ModelConfig
    num_params: int
    num_bytes: int
    tokenizer: bool
    parity: Parity | None
    parity_skipped: str


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: str | None,
    tokenizer: str | os.PathLike[str] | None,
    revision: str | None,
    overwrite: bool,
    parity: bool,
    progress: bool,
) -> Report:
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is unknown; known are {DTYPES}")
    origin = open_origin(source, revision)
    check_apart(out, origin.folder, tokenizer)
    if tokenizer is not None:
        files = tokenizer_files(tokenizer)
        if not files:
            raise ConversionError(f"{tokenizer} holds no tokenizer files")
        origin = dataclasses.replace(origin, tokenizer_files=files)
    family = family_of(origin.fields)
    config = family.config(origin.fields)
    config = config.replace(dtype=dtype or _stored_dtype(origin))
    _check_eos(origin.generation_config, config)
    table = family.table(config)
    check_tensors(table, family, origin.source)

    num_params = sum(int(np.prod(p.shape)) for parts in table.values() for p in parts)
    num_bytes = num_params * hf.DTYPES[config.dtype].itemsize
    provenance = {"name": origin.name, "format": origin.format, "config": origin.fields}
    with (
        checkpoint_writer(
            out,
            config,
            source=provenance,
            generation_config=origin.generation_config,
            overwrite=overwrite,
            needs=num_bytes,
        ) as writer,
        tqdm(
            total=num_bytes,
            desc="converting",
            unit="B",
            unit_scale=True,
            disable=None if progress else True,  # None: only on a terminal
            leave=False,
        ) as bar,
    ):
        for group, tables in _by_group(table).items():
            _write_group(writer, group, tables, origin.source, config.dtype, bar)
        for file in origin.tokenizer_files:
            writer.add_file(file)

    measured, skipped = None, "not asked for"
    if parity:
        with tqdm(
            desc="comparing with HF transformers",
            bar_format="{desc} ...",
            disable=None if progress else True,
            leave=False,
        ):
            measured, skipped = measure_parity(origin.folder, Path(out), num_params)
    return Report(
        out=Path(out),
        config=config,
        num_params=num_params,
        num_bytes=num_bytes,
        tokenizer=bool(origin.tokenizer_files),
        parity=measured,
        parity_skipped=skipped,
    )


def open_origin(source: str | os.PathLike[str], revision: str | None = None) -> Origin:
    """Finds out what `source` is, and opens it; downloads from the hub if it is an id.

    Raises:
        ConversionError: there is no such thing, or it is damaged.
    """
    path = Path(source)
    if path.is_file():
        if path.suffix != ".bin":
            raise ConversionError(
                f"{path} is a file: give the HF folder it lies in (or a llama2.c .bin file)"
            )
        fields, tensors = llama2c.open_file(path)
        special = dict(llama2c.SPECIAL_TOKENS)
        return Origin(path.name, "llama2.c", fields, special, tensors, (), None)
    name = str(source)
    if path.is_dir():
        folder, name = path, path.resolve().name
    else:
        folder = hub.download(name, revision)
    fields = hf.read_json(folder / "config.json")
    if fields.get("format") == FORMAT:
        raise ConversionError(f"{folder} is a native checkpoint already: load it as it is")
    return Origin(
        name=name,
        format="huggingface",
        fields=fields,
        generation_config=_generation_config(folder, fields),
        source=hf.open_source(folder),
        tokenizer_files=tokenizer_files(folder),
        folder=folder,
    )


def _generation_config(folder: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """With the special tokens of config.json where generation_config.json names none."""
    path = folder / "generation_config.json"
    generation = hf.read_json(path) if path.is_file() else {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if generation.get(name) is None and fields.get(name) is not None:
            generation[name] = fields[name]
    return generation


def _check_eos(generation_config: Mapping[str, Any], config: ModelConfig) -> None:
    ids = generation_config.get("eos_token_id")
    for i in ids if isinstance(ids, list) else [] if ids is None else [ids]:
        if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < config.vocab_size:
            raise ConfigError(
                f"eos_token_id {i!r:.80} is no token of the vocabulary (0 to "
                f"{config.vocab_size - 1}): correct it in a copy of the folder"
            )


def _stored_dtype(origin: Origin) -> str:
    """That of the tensors if they agree, else what config.json says, else float32."""
    stored = {t.dtype for t in origin.source.tensors.values()} & set(DTYPES)
    if len(stored) == 1:
        return stored.pop()
    named = origin.fields.get("dtype") or origin.fields.get("torch_dtype")
    return named if named in DTYPES else "float32"


def check_tensors(table: Table, family: Family, source: hf.Source) -> None:
    """Compares the stored tensors with what the model needs.

    Raises:
        ConversionError: lists every missing, unknown, mis-shaped and unreadable one.
    """
    wanted = {part.name: part.shape for parts in table.values() for part in parts}
    ignored = re.compile("|".join(family.ignored_tensors) or "(?!)")
    problems = [f"{name}: missing" for name in wanted if name not in source.tensors]
    for name, tensor in source.tensors.items():
        if name in wanted:
            if tensor.shape != wanted[name]:
                problems.append(
                    f"{name}: shape {list(tensor.shape)}, the config asks for {list(wanted[name])}"
                )
            if tensor.dtype not in DTYPES:
                problems.append(
                    f"{name}: stored as {tensor.dtype}, and supported are {', '.join(DTYPES)}"
                )
        elif name == "lm_head.weight":  # the table has none: the embeddings are tied
            if not _equal(source, name, "model.embed_tokens.weight"):
                problems.append(
                    f"{name}: differs from the embeddings, and tie_word_embeddings is true: set it "
                    "to false in a copy of config.json if the head is one of its own"
                )
        elif not ignored.fullmatch(name):
            problems.append(f"{name}: unknown")
    if problems:
        raise ConversionError(
            f"the weights are not those of the config ({len(problems)} of "
            f"{len(wanted)} tensors):\n{bullets(problems)}"
        )


def _equal(source: hf.Source, a: str, b: str) -> bool:
    """Whether two tensors hold the same numbers."""
    first, second = source.tensors[a], source.tensors.get(b)
    if second is None or first.shape != second.shape:
        return False
    if not {first.dtype, second.dtype} <= set(DTYPES):
        return False
    x, y = (np.empty(first.shape, hf.DTYPES[t.dtype]) for t in (first, second))
    source.read(a, x)
    source.read(b, y)
    x, y = x.reshape(-1), y.reshape(-1)
    pieces = (slice(i, i + _COMPARED_AT_ONCE) for i in range(0, x.size, _COMPARED_AT_ONCE))
    return all(np.array_equal(x[piece], y[piece]) for piece in pieces)


def _by_group(table: Table) -> dict[str, Table]:
    groups: dict[str, Table] = {}
    for path, parts in table.items():
        groups.setdefault(path.partition("/")[0], {})[path] = parts
    return groups


def _write_group(
    writer: CheckpointWriter,
    group: str,
    table: Table,
    source: hf.Source,
    dtype: str,
    bar: Any,
) -> None:
    """Reads each tensor into its piece of the native array."""
    arrays = {}
    for path, parts in table.items():
        array = np.empty(native_shape(parts), hf.DTYPES[dtype])
        for part, piece in pieces(parts, array):
            if part.transposed:
                tensor = np.empty(part.shape, array.dtype)
                source.read(part.name, tensor)
                for start in range(0, len(tensor), _BLOCK):
                    block = slice(start, start + _BLOCK)
                    piece[block] = tensor[block]
            else:
                source.read(part.name, piece)
            bar.update(piece.nbytes)
        arrays[path] = array
    writer.write_group(group, unflatten(arrays)[group])
