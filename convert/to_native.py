"""Other people's weights -> the native checkpoint. See `convert.convert`."""

import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from convert import hf, hub, llama2c
from convert.families import Family, Names, Table, family_of, native_shape, pieces
from convert.outline import UNKNOWN, named_dtype, open_outline
from convert.parity import Parity, measure_parity
from convert.quantization import Loss, measure_loss
from convert.tokenizer import write_tokenizer
from s3d_jax.errors import ConfigError, ConversionError
from s3d_jax.nn.transformer import weight_bytes
from s3d_jax.settings.model import DTYPES, ModelConfig
from s3d_jax.storage.native import FORMAT, CheckpointWriter, checkpoint_writer
from s3d_jax.storage.staging import check_apart
from s3d_jax.storage.tokenizer import has_vocabulary
from s3d_jax.storage.trees import bullets, unflatten
from s3d_jax.weights.formats import weight_format
from s3d_jax.weights.trees import store_tree

NOT_ASKED = "not asked for"
_TORCH_MAGIC = (b"PK\x03\x04", b"\x80\x02\x8a\x0a")  # zip, and the pickle of torch before 1.6
_MAX_LINES = 1000  # of a list of faulty tensors
_CACHED = 1 << 18  # elements that are looked through at a time, for the same reason


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a conversion starts from, whatever its format.

    Attributes:
        name: as the user knows it; goes into the checkpoint's provenance.
        format: "huggingface" or "llama2.c".
        fields: HF's config.json.
        generation_config: HF's generation_config.json, or what config.json says of it.
        source: the tensors, under their HF names.
        path: the HF folder on disk, or the llama2.c file.
        tokenizer: the folder to take the tokenizer from, or None.
        remote: of an outline, names of the files that are still on the hub, and their bytes.
    """

    name: str
    format: str
    fields: dict[str, Any]
    generation_config: dict[str, Any]
    source: hf.Source
    path: Path
    tokenizer: Path | None
    remote: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Model:
    """What an origin is converted to.

    Attributes:
        family: its kind.
        config: the model, with the dtype to be written.
        names: where the origin has its tensors. The head is of no use where the embeddings are
            tied, but if it is there they must be equal.
        table: its arrays in a float type, and the tensors that make them up.
    """

    family: Family
    config: ModelConfig
    names: Names
    table: Table

    @classmethod
    def of(cls, origin: Origin, dtype: str | None, quantization: str | None = None) -> "Model":
        """The model in `dtype`, or in the one that it is stored in; quantised, if asked for.

        Raises:
            ConfigError: a setting, `dtype` or `quantization` is wrong or not supported.
        """
        family = family_of(origin.fields)
        config = family.config(origin.fields)
        config = config.replace(dtype=dtype or _stored_dtype(origin), quantization=quantization)
        _check_eos(origin.generation_config, config)
        tensors = origin.source.tensors
        return cls(family, config, family.names_in(tensors), family.table(config, tensors))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors that it needs, under their HF names."""
        return {part.name: part.shape for parts in self.table.values() for part in parts}

    @property
    def num_params(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def num_float_bytes(self) -> int:
        """Bytes of its weights before they are quantised, if they are."""
        return self.num_params * hf.DTYPES[self.config.dtype].itemsize

    @property
    def num_bytes(self) -> int:
        """Bytes of its weights."""
        return weight_bytes(self.config)


@dataclasses.dataclass(frozen=True)
class Report:
    """What was converted.

    Attributes:
        out: the native folder.
        config: the model.
        num_params: its parameters; tied embeddings count once.
        num_bytes: bytes of weights written.
        stored_dtypes: what the source's tensors are stored as; where these are not the config's
            dtype, they were cast.
        unneeded: tensors of the source that were not read, and why.
        tokenizer: whether a tokenizer came along that can be read.
        tokenizer_problem: why it cannot be read and what to do about it, or "".
        parity: agreement with HF transformers, or None.
        parity_skipped: why `parity` is None, or "".
        loss: what quantisation cost, or None.
        loss_skipped: why `loss` is None, or "".
        drafts: names of trained drafts that came along.
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
    loss: Loss | None = None
    loss_skipped: str = ""
    drafts: tuple[str, ...] = ()

    @property
    def is_rounded(self) -> bool:
        """Whether casting or quantising the weights lost bits."""
        return is_rounded(self.stored_dtypes, self.config)


def convert(
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
    origin = open_origin(source, revision, tokenizer)
    weight_files = {tensor.file for tensor in origin.source.tensors.values()}
    check_apart(out, origin.path, origin.tokenizer, *weight_files)  # files: they may be links
    model = Model.of(origin, dtype, quantization)
    check_tensors(model, origin.source)
    problem = _write(origin, model, out, overwrite=overwrite, progress=progress)

    measured, skipped, loss, loss_skipped = None, NOT_ASKED, None, NOT_ASKED
    if parity:
        measured, skipped = _measure(origin, Path(out), model, progress=progress)
        if quantization:
            groups = _float_groups(model, origin.source)
            loss, loss_skipped = measure_loss(groups, model.config, Path(out), words)
    return Report(
        out=Path(out),
        config=model.config,
        num_params=model.num_params,
        num_bytes=model.num_bytes,
        stored_dtypes=stored_dtypes(model, origin.source),
        unneeded=unneeded(model, origin.source),
        tokenizer=bool(origin.tokenizer and has_vocabulary(origin.tokenizer) and not problem),
        tokenizer_problem=problem,
        parity=measured,
        parity_skipped=skipped,
        loss=loss,
        loss_skipped=loss_skipped,
    )


def open_origin(
    source: str | os.PathLike[str],
    revision: str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    *,
    outline: bool = False,
) -> Origin:
    """Finds out what `source` is, and opens it; downloads from the hub if it is an id.

    Args:
        source, revision, tokenizer: as for `convert.convert`.
        outline: do without the weights where they are not here.

    Raises:
        ConversionError: there is no such thing, or it is damaged.
        ConfigError: an outline's config.json is wrong or not supported.
    """
    own = None if tokenizer is None else tokenizer_folder(tokenizer)
    path = Path(source)
    if path.is_file():
        if path.suffix != ".bin" or _is_torch_file(path):
            raise ConversionError(
                f"{path} is a file, and no llama2.c file: give the HF folder it lies in"
            )
        fields, tensors = llama2c.open_file(path)
        special = dict(llama2c.SPECIAL_TOKENS)
        return Origin(path.name, "llama2.c", fields, special, tensors, path, own)
    name, remote = str(source), dict[str, int]()
    if path.is_dir():
        folder, name = path, path.resolve().name
    elif outline:
        folder, remote = hub.outline(name, revision)
    else:
        folder = hub.download(name, revision)
    fields = _read_fields(folder)
    return Origin(
        name=name,
        format="huggingface",
        fields=fields,
        generation_config=_generation_config(folder, fields),
        source=open_outline(folder, remote, fields) if outline else hf.open_source(folder),
        path=folder,
        tokenizer=own or folder,
        remote=remote,
    )


def _read_fields(folder: Path) -> dict[str, Any]:
    fields = hf.read_json(folder / "config.json")
    if fields.get("format") == FORMAT:
        raise ConversionError(
            f"{folder} is a native checkpoint already, and what it was converted from is needed: "
            "s3d and s3d_jax.load take it as it is"
        )
    return fields


def tokenizer_folder(folder: str | os.PathLike[str]) -> Path:
    if not has_vocabulary(folder):
        raise ConversionError(
            f"{folder} holds no tokenizer files (tokenizer.json, tokenizer.model or vocab.json)"
        )
    return Path(folder)


def _is_torch_file(path: Path) -> bool:
    """Whether it is one of torch's, which end in .bin as well."""
    if path.name.startswith("pytorch_model"):
        return True
    try:
        with open(path, "rb") as file:
            return file.read(4) in _TORCH_MAGIC
    except OSError as error:
        raise ConversionError(f"cannot read {path}: {error.strerror}") from error


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
    return stored.pop() if len(stored) == 1 else named_dtype(origin.fields)


def stored_dtypes(model: Model, source: hf.Source) -> tuple[str, ...]:
    """What the tensors that the model needs are stored as."""
    return tuple(sorted({source.tensors[name].dtype for name in model.shapes}))


def num_stored(source: hf.Source) -> int:
    """The numbers in all of its tensors, needed or not: what HF transformers takes into memory."""
    return sum(math.prod(tensor.shape) for tensor in source.tensors.values())


def is_rounded(stored: tuple[str, ...], config: ModelConfig) -> bool:
    """Whether casting to the model's type, or quantising, loses bits."""
    dtype = config.dtype
    return config.quantization is not None or (dtype != "float32" and set(stored) != {dtype})


def check_tensors(model: Model, source: hf.Source) -> None:
    """Compares the stored tensors with what the model needs.

    Raises:
        ConversionError: lists every missing, unknown, duplicate, mis-shaped and unreadable one.
    """
    problems = tensor_problems(model, source)
    head, embeddings = model.names.head, model.names.embeddings
    readable = {head, embeddings} <= source.tensors.keys() - problems.keys()
    if head not in model.shapes and readable and not _equal(source, head, embeddings):
        problems[head] = (
            "differs from the embeddings, and tie_word_embeddings is true: set it to false in a "
            "copy of config.json if the head is one of its own"
        )
    raise_problems(problems, model)


def unneeded(model: Model, source: hf.Source) -> dict[str, str]:
    """The tensors that are not read, and why; of a source without problems."""
    needed, head = model.shapes, model.names.head
    tied = "the embeddings are tied: the head is the embedding table"
    return {
        name: tied if name == head else model.family.why_ignored(name)
        for name in source.tensors
        if name not in needed
    }


def raise_problems(problems: Mapping[str, str], model: Model) -> None:
    """Raises ConversionError if there are problems of tensors."""
    if problems:
        lines = [f"{name:.200}: {problem}" for name, problem in problems.items()]
        raise ConversionError(
            f"the weights are not those of the config, which has {len(model.shapes)} tensors "
            f"({len(lines)} faults): get config.json and weights of one model\n"
            + bullets(lines, limit=_MAX_LINES)
        )


def tensor_problems(model: Model, source: hf.Source) -> dict[str, str]:
    """What can be said without reading them; for each tensor at fault, what is wrong with it."""
    wanted, tensors, ignored = model.shapes, source.tensors, model.family.why_ignored
    problems = {name: fault for name, fault in source.faults.items() if not ignored(name)}
    problems |= {n: "missing" for n in wanted if n not in tensors and n not in problems}
    for name, tensor in tensors.items():
        if name in problems or ignored(name):
            continue
        if name not in wanted and name != model.names.head:  # tied embeddings, or it is wanted
            problems[name] = "unknown"
        elif name in wanted and tensor.shape != wanted[name]:
            problems[name] = f"shape {list(tensor.shape)}, the config asks for {list(wanted[name])}"
        elif tensor.dtype not in (*DTYPES, UNKNOWN):
            problems[name] = f"stored as {tensor.dtype}, and supported are {', '.join(DTYPES)}"
    return problems


def _equal(source: hf.Source, a: str, b: str) -> bool:
    """Whether two matrices hold the same numbers; some rows are in memory at a time."""
    first, second = source.tensors[a], source.tensors[b]
    if first.shape != second.shape:
        return False
    rows, columns = first.shape
    step = max(1, hf.CHUNK // max(1, columns))
    for start in range(0, rows, step):
        shape = (min(step, rows - start), columns)
        x, y = (np.empty(shape, hf.DTYPES[tensor.dtype]) for tensor in (first, second))
        source.read(a, x, start)
        source.read(b, y, start)
        if not np.array_equal(x, y):
            return False
    return True


def _write(
    origin: Origin,
    model: Model,
    out: str | os.PathLike[str],
    *,
    overwrite: bool,
    progress: bool,
) -> str:
    """Writes the checkpoint folder; returns why its tokenizer cannot be read, or ""."""
    with (
        checkpoint_writer(
            out,
            model.config,
            source={"name": origin.name, "format": origin.format, "config": origin.fields},
            generation_config=origin.generation_config,
            overwrite=overwrite,
            needs=model.num_bytes,
        ) as writer,
        progress_bar(
            "converting", model.num_params * hf.DTYPES[model.config.dtype].itemsize, progress
        ) as bar,
    ):
        write_groups(writer, _float_groups(model, origin.source, bar))
        return write_tokenizer(origin.tokenizer, writer) if origin.tokenizer else ""


def progress_bar(what: str, total: int, progress: bool) -> Any:
    return tqdm(
        total=total,
        desc=what,
        unit="B",
        unit_scale=True,
        disable=None if progress else True,  # None: only on a terminal
        leave=False,
    )


def write_groups(writer: CheckpointWriter, groups: Iterable[tuple[str, dict[str, Any]]]) -> None:
    """Writes the groups of a float model in the weight format of the writer's model."""
    weights = weight_format(writer.config)
    with ThreadPoolExecutor(1) as background:  # writes a group while the next one is read
        written = background.submit(lambda: None)
        for name, tree in groups:
            tree = store_tree(weights, tree)
            written.result()
            written = background.submit(writer.write_group, name, tree)
        written.result()


def _measure(
    origin: Origin, out: Path, model: Model, *, progress: bool
) -> tuple[Parity | None, str]:
    with tqdm(
        desc="comparing with HF transformers",
        bar_format="{desc} ...",
        disable=None if progress else True,
        leave=False,
    ):
        hf_folder = origin.path if origin.format == "huggingface" else None
        num_params = num_stored(origin.source)
        return measure_parity(hf_folder, out, num_params, model.config.vocab_size)


def by_group(table: Table) -> dict[str, Table]:
    """The table by the top-level groups of the parameter tree."""
    groups: dict[str, Table] = {}
    for path, parts in table.items():
        groups.setdefault(path.partition("/")[0], {})[path] = parts
    return groups


def _float_groups(
    model: Model, source: hf.Source, bar: Any = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The groups of the parameter tree in the model's float type, read one by one."""
    dtype = hf.DTYPES[model.config.dtype]
    for group, table in by_group(model.table).items():
        yield group, _read_group(group, table, source, dtype, bar)


def _read_group(
    group: str, table: Table, source: hf.Source, dtype: np.dtype, bar: Any
) -> dict[str, Any]:
    """Reads each tensor into its piece of the native array."""
    arrays = {}
    for path, parts in table.items():
        array = np.empty(native_shape(parts), dtype)
        for part, piece in pieces(parts, array):
            source.read(part.name, piece)
            if not is_finite(piece):
                raise ConversionError(
                    f"{part.name} in {source.tensors[part.name].file} holds infinities or NaN: "
                    "it is damaged; get a good copy of the file, and convert again"
                )
            if bar is not None:
                bar.update(piece.nbytes)
        arrays[path] = array
    return unflatten(arrays)[group]


def is_finite(array: np.ndarray) -> bool:
    """By the bits, which takes a fifth of the time of numpy's function for bfloat16."""
    unsigned = f"u{array.dtype.itemsize}"
    infinity = np.array(np.inf, array.dtype).view(unsigned)
    bits = array.reshape(-1).view(unsigned)
    magnitude = np.array(np.iinfo(unsigned).max >> 1, unsigned)
    return all(
        np.max(bits[start : start + _CACHED] & magnitude) < infinity
        for start in range(0, bits.size, _CACHED)
    )
