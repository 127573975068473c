"""What a conversion would do, told without weights: for `--dry-run` and `inspect`."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from convert.families import Part, native_shape
from convert.options import ConversionOptions
from convert.sources.base import CHUNK, FLOATS, UNKNOWN, is_file
from convert.sources.open import NATIVE, open_origin
from convert.target import ConversionTarget, open_target
from s3d_jax.drafters.stored import read_draft
from s3d_jax.settings.model import ModelConfig
from s3d_jax.storage.staging import check_replaceable, check_space, free_space

_LIBRARIES = 200_000_000  # bytes of python with jax and orbax, measured
_CAST = 16  # bytes per number that is being cast: stored, cast, and both in float32


@dataclasses.dataclass(frozen=True)
class DryRun:
    """What a conversion would read and write.

    Attributes:
        name, model_type, config: the model; the config's dtype is the one to be written.
        num_params: its parameters; tied embeddings count once.
        files: the files of weights, with their sizes in bytes, or None for unknown sizes.
        remote: the files that would be downloaded from the hub.
        absent: the files that are neither here nor on the hub.
        num_read: bytes of tensors to be read.
        unneeded: tensors that would not be read, and why.
        tokenizer: names of the tokenizer's files.
        num_written: bytes of weights to be written.
        num_free: bytes that the disk has free.
        memory: peak of the resident memory above the interpreter's own, in bytes, roughly.
        drafts: names of the trained drafts that come along.
        ignored_fields: fields of config.json that are passed without being understood.
        wrappers: prefixes that are left out of the names of tensors, and where they come from.
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
    drafts: tuple[str, ...]
    ignored_fields: tuple[str, ...]
    wrappers: tuple[str, ...]


def dry_run(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: ConversionOptions = ConversionOptions(),  # noqa: B008 (frozen)
) -> DryRun:
    """Tells what `convert.convert` would do with the same arguments; writes nothing.

    Takes config.json, the index, and the headers of the files that are here. Of a model on the
    hub, config, index and tokenizer are fetched into the hub's cache.

    Raises:
        ConfigError, ConversionError, CheckpointError: as `convert.convert`, as far as the errors
            show without the weights.
    """
    check_replaceable(out, options.overwrite)
    target = open_target(source, out, options, outline=True)
    target.check(reading=False)
    origin, tensors = target.origin, target.origin.source.tensors
    for name in origin.drafts:
        read_draft(origin.path, name, target.config, weights=False)
    check_space(out, target.num_bytes)
    away = [file for file in origin.files if origin.format != NATIVE and not is_file(file)]
    return DryRun(
        name=origin.name,
        model_type=origin.model_type,
        config=target.config,
        num_params=target.num_params,
        files={
            file: origin.remote.get(file.name) if file in away else _size_on_disk(file)
            for file in origin.files
        },
        remote=tuple(file for file in away if file.name in origin.remote),
        absent=tuple(file for file in away if file.name not in origin.remote),
        num_read=sum(tensors[name].num_bytes for name in target.shapes),
        unneeded=target.unneeded,
        tokenizer=origin.tokenizer.file_names if origin.tokenizer else (),
        num_written=target.num_bytes,
        num_free=free_space(out),
        memory=_peak_memory(target),
        drafts=origin.drafts,
        ignored_fields=origin.ignored_fields,
        wrappers=origin.wrappers,
    )


def _size_on_disk(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _peak_memory(target: ConversionTarget) -> int:
    """Two groups, one of which is being written; and what is between the file and a group."""
    largest_group = max(
        sum(math.prod(native_shape(parts)) for parts in table.values())
        for table in target.groups.values()
    )
    arrays = 2 * FLOATS[target.config.dtype].itemsize * largest_group
    if target.origin.format == NATIVE:  # whose arrays are read whole before they are cast
        arrays += max(tensor.num_bytes for tensor in target.origin.source.tensors.values())
    is_cast = target.stored_dtypes != (target.config.dtype,)
    return _LIBRARIES + arrays + is_cast * _CAST * CHUNK


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """One tensor of a source, and what becomes of it.

    Attributes:
        name: its name in the source.
        dtype, shape: as stored; None if they are not known.
        file: name of the file that holds it, or None if there is none.
        native: path of the native array that it goes into, or None.
        slice: its place in that array, in numpy's notation; "" if it is the whole array.
        reason: why it is not needed, or what is wrong with it; "" otherwise.
        is_fault: whether `reason` keeps the source from being converted.
    """

    name: str
    dtype: str | None
    shape: tuple[int, ...] | None
    file: str | None
    native: str | None
    slice: str
    reason: str
    is_fault: bool


def inspect(
    source: str | os.PathLike[str],
    revision: str | None = None,
    ignore_fields: Sequence[str] = (),
) -> tuple[ConversionTarget, tuple[TensorEntry, ...]]:
    """Lists the tensors of a source, in the order of the native arrays; missing ones too.

    Reads what `dry_run` reads, and accepts tensors that are at fault.

    Raises:
        ConfigError: config.json has settings that are wrong, unknown, or not supported.
        ConversionError: files are missing or damaged.
    """
    target = ConversionTarget.of(
        open_origin(source, revision=revision, ignore_fields=ignore_fields, outline=True)
    )
    tensors, problems = target.origin.source.tensors, target.problems()
    reasons = target.unneeded | problems
    places = {
        part.name: (path, place)
        for path, parts in target.origin.table.items()
        for part, place in _places(parts)
    }
    entries = []
    for name in dict.fromkeys([*places, *tensors, *problems]):
        tensor = tensors.get(name)
        known = tensor if tensor and tensor.dtype != UNKNOWN else None
        native, place = places.get(name, (None, ""))
        entries.append(
            TensorEntry(
                name=name,
                dtype=known.dtype if known else None,
                shape=known.shape if known else None,
                file=tensor.file.name if tensor else None,
                native=native,
                slice=place,
                reason=reasons.get(name, ""),
                is_fault=name in problems,
            )
        )
    return target, tuple(entries)


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
