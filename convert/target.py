"""What a source is converted to: the model, its native arrays, and the checks before any write."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from convert.families import Table, native_shape, pieces
from convert.options import ConversionOptions
from convert.sources import base
from convert.sources.base import FLOATS, UNKNOWN, Source
from convert.sources.gguf.tensors import GgufSource
from convert.sources.open import NATIVE, Origin, open_origin
from convert.sources.wrappers import is_from_peft
from s3d_jax.errors import ConversionError
from s3d_jax.nn.transformer import weight_bytes
from s3d_jax.settings.model import DTYPES, ModelConfig
from s3d_jax.storage.arrays import Overflow
from s3d_jax.storage.staging import check_apart
from s3d_jax.storage.trees import bullets, flatten, top_level_key, unflatten
from s3d_jax.weights.blocks import Blocks
from s3d_jax.weights.formats import weight_format
from s3d_jax.weights.trees import MATRICES, store_tree

_MAX_LINES = 1000  # of a list of faulty tensors
_ReadGroup = Callable[[str, Table], dict[str, Any]]
_CACHED = 1 << 18  # elements checked at a time, few enough to stay in the processor's cache


@dataclasses.dataclass(frozen=True)
class ConversionTarget:
    """What an origin is converted to.

    Attributes:
        origin: what is converted.
        config: the model, with the dtype and the quantization to be written.
    """

    origin: Origin
    config: ModelConfig

    @classmethod
    def of(
        cls, origin: Origin, dtype: str | None = None, quantization: str | None = None
    ) -> "ConversionTarget":
        """The model in `dtype`, or in the type that it is stored in; quantised if asked for.

        Raises:
            ConfigError: the model cannot be quantised so.
            ConversionError: blocks are asked for, and the origin has none that can be kept.
        """
        config = origin.config
        blocks = _block_kinds(origin) if quantization == "blocks" else None
        changes = dict(dtype=dtype or config.dtype, quantization=quantization, blocks=blocks)
        return cls(origin, config.replace(**changes))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors that the model needs, under the source's names."""
        return {part.name: part.shape for parts in self.origin.table.values() for part in parts}

    @property
    def num_params(self) -> int:
        """Parameters of the model; tied embeddings count once."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def num_float_bytes(self) -> int:
        """Bytes of the weights before they are quantised."""
        return self.num_params * FLOATS[self.config.dtype].itemsize

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights that are written."""
        return weight_bytes(self.config)

    @property
    def num_stored(self) -> int:
        """The numbers in all stored tensors, needed or not: HF transformers loads all of them."""
        return sum(math.prod(tensor.shape) for tensor in self.origin.source.tensors.values())

    @property
    def stored_dtypes(self) -> tuple[str, ...]:
        """The types in which the tensors that the model needs are stored."""
        return tuple(sorted({self.origin.source.tensors[name].dtype for name in self.shapes}))

    @property
    def unneeded(self) -> dict[str, str]:
        """The tensors that are not read, and why; of a source without problems."""
        needed, names = self.shapes, self.origin.names
        tied = "the embeddings are tied: the head is the embedding table"
        return {
            name: tied if names and name == names.head else self.origin.why_ignored(name)
            for name in self.origin.source.tensors
            if name not in needed
        }

    def problems(self) -> dict[str, str]:
        """What is wrong with each tensor at fault, as far as it shows without reading any."""
        source, wanted, names = self.origin.source, self.shapes, self.origin.names
        ignored, tensors = self.origin.why_ignored, source.tensors
        problems = {name: fault for name, fault in source.faults.items() if not ignored(name)}
        problems |= {n: "missing" for n in wanted if n not in tensors and n not in problems}
        for name, tensor in tensors.items():
            if name in problems or ignored(name):
                continue
            # Tied embeddings make the head unneeded, not unknown.
            if name not in wanted and not (names and name == names.head):
                problems[name] = "of an adapter (PEFT)" if is_from_peft(name) else "unknown"
            elif name in wanted and tensor.shape != wanted[name]:
                shape, expected = list(tensor.shape), list(wanted[name])
                problems[name] = f"shape {shape}, the config asks for {expected}"
            elif tensor.values is None and tensor.dtype != UNKNOWN:
                problems[name] = (
                    f"{base.STORED_AS} {tensor.dtype}, and supported are {', '.join(DTYPES)}"
                )
        return problems

    def check(self, *, reading: bool) -> None:
        """Compares the stored tensors with what the model needs.

        Args:
            reading: also compare an output head with the embeddings that it is tied to.

        Raises:
            ConversionError: lists every missing, unknown, duplicate, mis-shaped and unreadable one.
        """
        problems, names, source = self.problems(), self.origin.names, self.origin.source
        if reading and names and names.head not in self.shapes:
            head, embeddings = names.head, names.embeddings
            readable = {head, embeddings} <= source.tensors.keys() - problems.keys()
            if readable and not _equal(source, head, embeddings):
                problems[head] = (
                    "differs from the embeddings, and tie_word_embeddings is true: set it to false "
                    "in a copy of config.json if the head is one of its own"
                )
        if any(is_from_peft(name) for name in problems):
            raise ConversionError(
                "the weights hold an adapter that is not merged (names such as "
                f"{next(filter(is_from_peft, problems)):.200}): load them with peft, merge by "
                "model.merge_and_unload(), then save_pretrained, and convert that folder"
            )
        if problems:
            lines = [f"{name:.200}: {problem}" for name, problem in problems.items()]
            fault = (
                f"the weights are not those of the config, which has {len(self.shapes)} tensors "
                f"({len(lines)} faults): get config.json and weights of one model"
            )
            if all(problem.startswith(base.STORED_AS) for problem in problems.values()):
                fault = (
                    f"{len(lines)} of {len(source.tensors)} tensors are of a type that cannot be "
                    "read: get the model in another type"
                )
            raise ConversionError(f"{fault}\n" + bullets(lines, limit=_MAX_LINES))

    @property
    def groups(self) -> dict[str, Table]:
        """The table, divided by the top-level groups of the parameter tree."""
        groups: dict[str, Table] = {}
        for path, parts in self.origin.table.items():
            groups.setdefault(top_level_key(path), {})[path] = parts
        return groups

    def read_groups(self, bar: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        """Reads the groups of the parameter tree one by one, in the model's float type.

        Args:
            bar: a progress bar that counts bytes.

        Raises:
            ConversionError: a tensor cannot be read, or holds infinities or NaN.
            Overflow: values of some tensors overflow in the float type; after the last group.
        """
        return self._read(bar, lambda group, table, read: read(group, table))

    def stored_groups(self, bar: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        """As `read_groups`, with matrices in the model's weight formats, as they are written.

        Raises:
            ConversionError, Overflow: as `read_groups`.
            ValueError: a format cannot represent a number of a matrix.
        """
        return self._read(bar, functools.partial(self._stored_group, bar))

    def _read(
        self, bar: Any, make: Callable[[str, Table, _ReadGroup], dict[str, Any]]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        overflowing: list[str] = []
        read = functools.partial(self._read_group, bar=bar, overflowing=overflowing)
        for group, table in self.groups.items():
            yield group, make(group, table, read)
        if overflowing:
            raise Overflow(overflowing, FLOATS[self.config.dtype])

    def _stored_group(self, bar: Any, group: str, table: Table, read: _ReadGroup) -> dict[str, Any]:
        if self.config.blocks is None:
            return store_tree(self.config, read(group, table), group)
        source, arrays = self.origin.source, dict[str, np.ndarray]()
        assert isinstance(source, GgufSource)  # _block_kinds found blocks
        floats = dict(table)
        for path in table:
            module, _, name = path.rpartition("/")
            if isinstance(kind := weight_format(self.config, module), Blocks) and name in MATRICES:
                parts = [self._held(source, kind, part.name) for part in floats.pop(path)]
                bar.update(
                    math.prod(native_shape(table[path])) * FLOATS[self.config.dtype].itemsize
                )
                for part, pieces in zip(kind.parts(name), zip(*parts, strict=True), strict=True):
                    arrays[f"{module}/{part}"] = np.concatenate(pieces)
        tree = flatten(read(group, floats), group) if floats else {}
        return unflatten(tree | arrays)[group]

    @staticmethod
    def _held(source: GgufSource, kind: Blocks, name: str) -> tuple[np.ndarray, ...]:
        try:
            return kind.hold(*source.read_blocks(name))
        except ValueError as error:
            raise ConversionError(
                f"{name}: {error}: convert to int8 or a float type instead"
            ) from error

    def _read_group(
        self, group: str, table: Table, bar: Any, overflowing: list[str]
    ) -> dict[str, Any]:
        source, arrays = self.origin.source, {}
        for path, parts in table.items():
            array = np.empty(native_shape(parts), FLOATS[self.config.dtype])
            for part, piece in pieces(parts, array):
                try:
                    source.read(part.name, piece)
                except Overflow as error:  # go on, to name all of them; nothing will be kept
                    overflowing += error.names
                    piece[...] = 0
                if not _is_finite(piece):
                    raise ConversionError(
                        f"{part.name} in {source.tensors[part.name].file} holds infinities or NaN: "
                        f"it is damaged; {base.AGAIN}"
                    )
                bar.update(piece.nbytes)
            arrays[path] = array
        return unflatten(arrays)[group]


def _block_kinds(origin: Origin) -> tuple[str, ...]:
    """`ModelConfig.blocks` of the model in a GGUF file: the least kind that holds each matrix."""
    source, kinds = origin.source, list[str]()
    if not isinstance(source, GgufSource):
        raise ConversionError(
            f"{origin.name} is no GGUF file, and only these hold blocks that can be kept: use "
            "--quantize int4 or int8"
        )
    for path, parts in origin.table.items():
        module, _, name = path.rpartition("/")
        if name not in MATRICES:
            continue
        names = [part.name for part in parts if part.name in source.tensors]  # else `check` tells
        found = [source.block_kind(name) for name in names]
        blocks = [kind for kind in found if kind is not None]
        if blocks and len(blocks) < len(found):
            raise ConversionError(
                f"{', '.join(names)} are one matrix here, and some of them are floats and some are "
                "blocks: convert to int8 or a float type instead"
            )
        if blocks:
            kinds.append(f"{module} {functools.reduce(Blocks.joined, blocks)}")
    if not kinds:
        raise ConversionError(f"{origin.name} holds floats and no blocks: leave --quantize out")
    return tuple(kinds)


def open_target(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: ConversionOptions,
    *,
    outline: bool = False,
) -> ConversionTarget:
    """Opens what is to be converted, and checks that it is not what would be written.

    Args:
        source, out, options: as for `convert.convert`.
        outline: do without weights that are not here.

    Raises:
        ConfigError, ConversionError, CheckpointError: as `convert.convert`.
    """
    origin = open_origin(
        source,
        revision=options.revision,
        tokenizer=options.tokenizer,
        ignore_fields=options.ignore_fields,
        outline=outline,
    )
    if origin.format == NATIVE and options.dtype is None and options.quantization is None:
        raise ConversionError(
            f"{source} is a native checkpoint already: load it as it is, or say what to make of it "
            "(--quantize int8, --dtype ...)"
        )
    tokenizer = origin.tokenizer.path if origin.tokenizer else None
    # Its files too: they may be links to another folder.
    check_apart(out, origin.path, tokenizer, *origin.files)
    return ConversionTarget.of(origin, options.dtype, options.quantization)


def is_rounded(stored: tuple[str, ...], config: ModelConfig) -> bool:
    """Whether casting to the model's type, or quantising, loses bits."""
    dtype = config.dtype
    if config.quantization == "blocks":  # which are kept; what is float may be cast
        return dtype != "float32" and not {x for x in stored if x in FLOATS} <= {dtype}
    return config.quantization is not None or (dtype != "float32" and set(stored) != {dtype})


def _equal(source: Source, a: str, b: str) -> bool:
    """Whether two matrices hold the same numbers; some rows are in memory at a time."""
    first, second = source.tensors[a], source.tensors[b]
    if first.shape != second.shape:
        return False
    rows, columns = first.shape
    step = max(1, base.CHUNK // max(1, columns))
    for start in range(0, rows, step):
        shape = (min(step, rows - start), columns)
        x, y = (np.empty(shape, tensor.values) for tensor in (first, second))
        source.read(a, x, start)
        source.read(b, y, start)
        if not np.array_equal(x, y):
            return False
    return True


def _is_finite(array: np.ndarray) -> bool:
    """Tests the bits, in a fifth of the time of numpy's function for bfloat16."""
    unsigned = f"u{array.dtype.itemsize}"
    infinity = np.array(np.inf, array.dtype).view(unsigned)
    bits = array.reshape(-1).view(unsigned)
    magnitude = np.array(np.iinfo(unsigned).max >> 1, unsigned)
    return all(
        np.max(bits[start : start + _CACHED] & magnitude) < infinity
        for start in range(0, bits.size, _CACHED)
    )
