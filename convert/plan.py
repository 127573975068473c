"""What a conversion would do, without reading or writing weights: for `--dry-run` and `inspect`."""

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert import hf
from convert.families import Part, native_shape
from convert.outline import UNKNOWN
from convert.recast import is_native, opened
from convert.to_native import (
    Model,
    by_group,
    open_origin,
    raise_problems,
    tensor_problems,
    tokenizer_folder,
    unneeded,
)
from s3d_jax.drafters.stored import draft_names, read_draft
from s3d_jax.nn.transformer import num_params, weight_bytes
from s3d_jax.settings.model import ModelConfig
from s3d_jax.storage.staging import check_apart, check_replaceable, check_space, free_space
from s3d_jax.storage.tokenizer import tokenizer_files
from s3d_jax.storage.trees import top_level_key

_LIBRARIES = 200_000_000  # bytes of python with jax and orbax, measured
_CAST = 16  # bytes for each of the numbers cast at a time: stored, cast, and both in float32


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a conversion would read and write.

    Attributes:
        name, model_type, config: the model; the config's dtype is the one to be written.
        num_params: its parameters; tied embeddings count once.
        files: the files of weights, with their bytes, or None where these are not known.
        remote: those of `files` that are to be fetched from the hub.
        absent: those of `files` that are neither here nor on the hub.
        num_read: bytes of tensors to be read.
        unneeded: tensors that are not read, and why.
        tokenizer: names of the tokenizer's files.
        drafts: names of the trained drafts that come along.
        num_written: bytes of weights to be written.
        num_free: bytes that the disk has free.
        memory: peak of the resident memory above the interpreter's own, in bytes, roughly.
    """

    name: str
    model_type: str
    config: ModelConfig
    num_params: int
    files: dict[Path, int | None]
    remote: tuple[Path, ...]
    absent: tuple[Path, ...]
    num_read: int
    unneeded: Mapping[str, str]
    tokenizer: tuple[str, ...]
    num_written: int
    num_free: int
    memory: int
    drafts: tuple[str, ...] = ()


def plan(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    quantization: str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    overwrite: bool = False,
) -> Plan:
    """Plans what `convert.convert` would do with the same arguments; writes nothing.

    Takes config.json, the index, and the headers of the files that are here. Of a model on the
    hub, config, index and tokenizer are fetched into the hub's cache.

    Raises:
        ConfigError, ConversionError, CheckpointError: those of `convert.convert`, as far as they
            can be told without the weights.
    """
    check_replaceable(out, overwrite)
    if is_native(source):
        return _plan_native(source, out, dtype, quantization, tokenizer, revision)
    origin = open_origin(source, revision, tokenizer, outline=True)
    tensors = origin.source.tensors
    files = sorted({tensor.file for tensor in tensors.values()})
    check_apart(out, origin.path, origin.tokenizer, *files)
    model = Model.of(origin, dtype, quantization)
    raise_problems(tensor_problems(model, origin.source), model)
    check_space(out, model.num_bytes)
    away = [file for file in files if not hf.is_file(file)]
    needed = model.shapes
    return Plan(
        name=origin.name,
        model_type=model.family.model_type,
        config=model.config,
        num_params=model.num_params,
        files={
            file: origin.remote.get(file.name) if file in away else file.stat().st_size
            for file in files
        },
        remote=tuple(file for file in away if file.name in origin.remote),
        absent=tuple(file for file in away if file.name not in origin.remote),
        num_read=sum(
            math.prod(tensor.shape) * hf.DTYPES[tensor.dtype].itemsize
            for name, tensor in tensors.items()
            if name in needed
        ),
        unneeded=unneeded(model, origin.source),
        tokenizer=tuple(p.name for p in tokenizer_files(origin.tokenizer))
        if origin.tokenizer
        else (),
        num_written=model.num_bytes,
        num_free=free_space(out),
        memory=_peak_memory(model, tensors),
    )


def _plan_native(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    dtype: str | None,
    quantization: str | None,
    tokenizer: str | os.PathLike[str] | None,
    revision: str | None,
) -> Plan:
    header, config = opened(source, dtype, quantization, revision)
    own = None if tokenizer is None else tokenizer_folder(tokenizer)
    check_apart(out, source, own)
    drafts = [read_draft(source, name, config, weights=False) for name in draft_names(source)]
    check_space(out, weight_bytes(config))
    weights = header.path / "weights"
    size = sum(file.stat().st_size for file in weights.rglob("*") if file.is_file())
    largest_group = max(
        sum(math.prod(x.shape) for path, x in header.arrays.items() if top_level_key(path) == name)
        for name in header.groups
    )
    itemsizes = [hf.DTYPES[c.dtype].itemsize for c in (header.config, config)]
    return Plan(
        name=header.path.resolve().name,
        model_type="native checkpoint",
        config=config,
        num_params=num_params(config),
        files={weights: size},
        remote=(),
        absent=(),
        num_read=weight_bytes(header.config),
        unneeded={},
        tokenizer=tuple(p.name for p in tokenizer_files(own or header.path)),
        num_written=weight_bytes(config),
        num_free=free_space(out),
        memory=_LIBRARIES + sum(itemsizes) * largest_group,
        drafts=tuple(draft.name for draft in drafts),
    )


def _peak_memory(model: Model, tensors: Mapping[str, hf.Tensor]) -> int:
    """Two groups, one being written."""
    largest_group = max(
        sum(math.prod(native_shape(parts)) for parts in table.values())
        for table in by_group(model.table).values()
    )
    arrays = 2 * hf.DTYPES[model.config.dtype].itemsize * largest_group
    is_cast = any(tensors[name].dtype != model.config.dtype for name in model.shapes)
    return _LIBRARIES + arrays + is_cast * _CAST * hf.CHUNK


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a source, and what becomes of it.

    Attributes:
        name: HF's name.
        dtype, shape: as stored; None where they are not known.
        file: name of the file that holds it, or None where there is none.
        native: path of the native array that it goes into, or None.
        slice: its place in that array, in numpy's notation; "" where it is the whole array.
        reason: why it is not needed, or what is wrong with it; "" otherwise.
        is_fault: whether `reason` keeps the source from being converted.
    """

    name: str
    dtype: str | None
    shape: tuple[int, ...] | None
    file: str | None
    native: str | None = None
    slice: str = ""
    reason: str = ""
    is_fault: bool = False


def inspect(
    source: str | os.PathLike[str], revision: str | None = None
) -> tuple[Model, tuple[Entry, ...]]:
    """Lists the tensors of a source, in the order of the native arrays; missing ones too.

    Takes what `plan` takes, and does not mind tensors that are at fault.

    Raises:
        ConfigError: config.json has settings that are wrong, unknown, or not supported.
        ConversionError: files are missing or damaged.
    """
    origin = open_origin(source, revision, outline=True)
    model = Model.of(origin, None)
    tensors = origin.source.tensors
    problems = tensor_problems(model, origin.source)
    reasons = unneeded(model, origin.source) | problems
    places = {
        part.name: (path, place)
        for path, parts in model.table.items()
        for part, place in _places(parts)
    }
    entries = []
    for name in dict.fromkeys([*places, *tensors, *problems]):
        known: dict[str, Any] = dict(dtype=None, shape=None, file=None)
        if (tensor := tensors.get(name)) is not None:
            known["file"] = tensor.file.name
            if tensor.dtype != UNKNOWN:
                known |= dict(dtype=tensor.dtype, shape=tensor.shape)
        native, place = places.get(name, (None, ""))
        reason, is_fault = reasons.get(name, ""), name in problems
        entries.append(
            Entry(name, **known, native=native, slice=place, reason=reason, is_fault=is_fault)
        )
    return model, tuple(entries)


def _places(parts: tuple[Part, ...]) -> list[tuple[Part, str]]:
    """Each part with its slice of the native array."""
    if len(parts) == 1:
        return [(parts[0], "")]
    places, start = [], 0
    for part in parts:
        end = start + part.shape[0]
        places.append((part, f"[{start}:{end}]"))
        start = end
    return places
