"""The native checkpoint folder, which appears whole or not at all.

    config.json              {"format": "s3d_jax", "version": 4, "model": {...}, "source": {...}}
    weights/                 one orbax checkpoint of the parameter tree (see `arrays`)
    weights.json             shape and CRC-32 of each array, so that damage is found and named
    generation_config.json   as in HF; only its end-of-text ids are used
    tokenizer files          as in HF

It is written group by group and read array by array. A group is the subtree under one top-level
key: embed, layers_0, ..., final_norm, lm_head.
"""

import contextlib
import dataclasses
import functools
import os
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from s3d_jax.errors import CheckpointError, ConfigError
from s3d_jax.jax_settings import under_usual_jax_settings
from s3d_jax.machine import (
    check_memory,
    default_device,
    is_before_ampere,
    out_of_memory_explained,
    warn_of_the_device,
)
from s3d_jax.settings.model import ModelConfig
from s3d_jax.storage.adapters import adapter_problem
from s3d_jax.storage.arrays import (
    ArrayRecord,
    ArrayWriter,
    Overflow,
    cast,
    index_from_json,
    index_to_json,
    missing_arrays,
    read_array,
)
from s3d_jax.storage.json_files import AGAIN, read_json_object, write_json
from s3d_jax.storage.staging import staged_folder
from s3d_jax.storage.tokenizer import copy_tokenizer, has_vocabulary
from s3d_jax.storage.trees import bullets, flatten, shape_problems, top_level_key, unflatten

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh

    from s3d_jax.weights.trees import Params

FORMAT, VERSION = "s3d_jax", 4
_READABLE_VERSIONS = (2, 3, 4)

# Fields of generation_config.json that do not change the tokens: they are ignored without a word.
_SILENT_GENERATION_FIELDS = frozenset(
    [
        "eos_token_id",
        "bos_token_id",
        "pad_token_id",
        "transformers_version",
        "_from_model_config",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "output_logits",
        "return_dict_in_generate",
        "use_cache",
        "cache_implementation",
    ]
)


@dataclasses.dataclass(frozen=True)
class Header:
    """What a checkpoint folder says about itself; no weights.

    Attributes:
        path: the folder.
        config: the model.
        source: the origin of the weights (free form), or empty.
        generation_config: HF's generation_config.json, or empty.
        arrays: shape and checksum of each array, by its path in the parameter tree
            ("layers_0/mlp/down/weight").
    """

    path: Path
    config: ModelConfig
    source: dict[str, Any]
    generation_config: dict[str, Any]
    arrays: dict[str, ArrayRecord] = dataclasses.field(repr=False)

    @property
    def groups(self) -> tuple[str, ...]:
        """Top-level keys of the parameter tree, in the order in which they were written."""
        return tuple(dict.fromkeys(top_level_key(path) for path in self.arrays))

    @property
    def modules(self) -> dict[str, list[str]]:
        """Names of the arrays of each module: {"layers_0/mlp/down": ["weight"]}."""
        modules: dict[str, list[str]] = {}
        for path in self.arrays:
            module, _, name = path.rpartition("/")
            modules.setdefault(module, []).append(name)
        return modules

    @property
    def has_tokenizer(self) -> bool:
        """Whether the folder holds a tokenizer."""
        return has_vocabulary(self.path)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text; empty if the checkpoint names none."""
        ids = self.generation_config.get("eos_token_id")
        ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
        for i in ids:
            if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < self.config.vocab_size:
                raise CheckpointError(
                    f"{self.path / 'generation_config.json'}: eos_token_id {i!r} is no token of "
                    f"the vocabulary (0 to {self.config.vocab_size - 1})"
                )
        return tuple(ids)

    @property
    def generation_config_ignored(self) -> dict[str, Any]:
        """Fields of generation_config.json that are set but not used: the caller sets sampling."""
        fields = self.generation_config.items()
        return {k: v for k, v in fields if k not in _SILENT_GENERATION_FIELDS and v is not None}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        header: what the folder says about itself.
        config: the model, with the dtype of `params`.
        params: the parameter tree, a nested dict of jax arrays.
    """

    header: Header
    config: ModelConfig
    params: "Params"


class CheckpointWriter:
    """Writes the groups of one checkpoint; made by `checkpoint_writer`."""

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self.folder = folder
        self.config = config
        self._expected = _expected_arrays(config.replace(shards=1, over_data=False))
        self._arrays = ArrayWriter(folder / "weights")

    @under_usual_jax_settings
    def write_group(self, name: str, tree: Mapping[str, Any]) -> None:
        """Writes the subtree under the top-level key `name`.

        Args:
            name: the group.
            tree: arrays as in `abstract_params`. They must not change before the writer finishes.

        Raises:
            CheckpointError: the arrays do not fit the model, or were written before.
        """
        from s3d_jax.nn.sharding import as_in_files

        arrays = {
            path: as_in_files(self.config, path, np.asarray(x))
            for path, x in flatten(tree, name).items()
        }
        expected = {k: v for k, v in self._expected.items() if top_level_key(k) == name}
        problems = shape_problems(_shapes(arrays), _shapes(expected))
        for path, array in arrays.items():
            if path in expected and array.dtype != expected[path].dtype:
                problems.append(f"{path}: {array.dtype}, the model has {expected[path].dtype}")
            if path in self._arrays.index:
                problems.append(f"{path}: written twice")
        if problems:
            raise CheckpointError(f"group {name!r} does not fit the model:\n{bullets(problems)}")

        self._arrays.add(arrays)

    def add_tokenizer(self, source: str | os.PathLike[str]) -> None:
        """Copies the tokenizer files of another folder.

        Raises:
            CheckpointError: one cannot be read.
        """
        copy_tokenizer(source, self.folder)

    def finish(self, source: Mapping[str, Any], generation_config: Mapping[str, Any]) -> None:
        """Writes the small files. config.json comes last: a folder that has one is complete.

        Raises:
            CheckpointError: arrays of the model are missing.
        """
        missing = [path for path in self._expected if path not in self._arrays.index]
        if missing:
            raise CheckpointError(
                f"the model was not written completely; missing:\n{bullets(missing)}"
            )
        self._arrays.finish()
        if generation_config:
            write_json(self.folder / "generation_config.json", generation_config)
        write_json(self.folder / "weights.json", index_to_json(self._arrays.index))
        fields = {"format": FORMAT, "version": VERSION, "model": self.config.to_dict()}
        write_json(self.folder / "config.json", fields | {"source": dict(source)})


@contextlib.contextmanager
def checkpoint_writer(
    out: str | os.PathLike[str],
    config: ModelConfig,
    *,
    source: Mapping[str, Any] | None = None,
    generation_config: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    needs: int = 0,
) -> Iterator[CheckpointWriter]:
    """Writes a checkpoint folder one group at a time.

        with checkpoint_writer(out, config) as writer:
            writer.write_group("embed", {"embedding": array})
            ...

    The folder appears under its name if the block succeeds, and not otherwise.

    Args:
        out: the folder to write.
        config: the model.
        source: the origin of the weights (JSON); `s3d info` shows it, and exports use it.
        generation_config: HF's generation settings (JSON).
        overwrite: replace an existing checkpoint; the old one stays until the new one is complete.
        needs: bytes that will be written, so that a full disk is noticed before the work.

    Raises:
        CheckpointError: `out` exists or cannot be written, or groups are missing.
    """
    with staged_folder(out, overwrite=overwrite, needs=needs) as folder:
        writer = CheckpointWriter(folder, config)
        yield writer
        writer.finish(source or {}, generation_config or {})


def save(
    out: str | os.PathLike[str],
    config: ModelConfig,
    params: "Params",
    *,
    source: Mapping[str, Any] | None = None,
    generation_config: Mapping[str, Any] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a whole model.

    Args:
        out, config, source, generation_config, overwrite: as in `checkpoint_writer`.
        params: the parameter tree, with arrays as in `abstract_params`.
        tokenizer: a folder whose tokenizer files are copied.

    Returns:
        The folder.

    Raises:
        CheckpointError: as in `checkpoint_writer`, or `params` does not fit `config`.
    """
    with checkpoint_writer(
        out, config, source=source, generation_config=generation_config, overwrite=overwrite
    ) as writer:
        for name, tree in params.items():
            writer.write_group(name, tree)
        if tokenizer is not None:
            writer.add_tokenizer(tokenizer)
    return Path(out)


@under_usual_jax_settings
def load(
    path: str | os.PathLike[str],
    dtype: str | None = None,
    *,
    mesh: "Mesh | None" = None,
    over_data: bool = False,
    progress: bool = False,
) -> Checkpoint:
    """Reads a checkpoint onto the default device, or onto those of a mesh.

    On a mesh each device gets its own share of each array, and nothing else at any time. The host
    reads array by array.

    Args:
        path: a native checkpoint folder.
        dtype: "float32", "bfloat16" or "float16", to which arrays are cast; None keeps the stored
            dtype, but for bfloat16 on GPUs before Ampere, which have no fast one: float16, or
            float32 for models that overflow in it.
        mesh: from `build_mesh`; the config of the result has its `shards`.
        over_data: on a mesh, matrices are divided along `data` too, as training needs them.
        progress: show a bar on a terminal if loading takes more than a second.

    Raises:
        CheckpointError: the folder is missing, of another format or version, incomplete or damaged;
            or values overflow in the dtype (names every such array).
        ConfigError: the dtype is unknown, or the mesh does not divide the model.
        DeviceError: there is no device, or less memory free than the weights need.

    Warns:
        UserWarning: see `warn_of_the_device`.
    """
    from tqdm import tqdm

    from s3d_jax.nn.sharding import put, shape_of, share_bytes, taken_here
    from s3d_jax.weights.base import num_bytes
    from s3d_jax.weights.formats import in_memory
    from s3d_jax.weights.trees import held_tree

    header = read_header(path)
    backend = default_device().platform  # a missing one should not look like damaged weights
    if dtype is None and header.config.dtype == "bfloat16" and is_before_ampere():
        dtype = "float32" if header.config.overflows_float16 else "float16"
    stored = header.config if dtype is None else header.config.replace(dtype=dtype)
    config = in_memory(stored, backend, mesh is not None)
    dtypes = {path: leaf.dtype for path, leaf in _expected_arrays(stored).items()}
    held = {path: leaf.dtype for path, leaf in _expected_arrays(config).items()}
    params: dict[str, Any] = {}
    overflowing: list[str] = []
    total = needed = num_bytes(_expected_arrays(config))
    if mesh is not None:
        shape = shape_of(mesh)
        shape.check_divides(config)
        config = config.replace(shards=shape.model, over_data=over_data)
        share = share_bytes(mesh, config, _expected_arrays(config), over_data=over_data)
        needed = taken_here(mesh, share)
    what, advice = f"the weights of {path} in {config.precision} need", _smaller(stored)
    check_memory(needed, what, advice)
    explained = out_of_memory_explained(lambda: f"{what} {needed / 1e9:.2f} GB: {advice}")
    warn_of_the_device(config.dtype)
    if config.dtype == "float16" and config.overflows_float16:
        warnings.warn(
            f"{path} is a model of Gemma's kind, which overflows in float16: load it in float32 or "
            "bfloat16 (dtype=..., --dtype ...)",
            stacklevel=4,
        )
    with (
        explained,
        tqdm(
            total=total,
            desc="loading",
            unit="B",
            unit_scale=True,
            disable=None if progress else True,  # None: only on a terminal
            leave=False,
            delay=1,
        ) as bar,
    ):
        for module, names in header.modules.items():
            arrays: dict[str, np.ndarray] = {}
            for name in names:
                where = f"{module}/{name}"
                try:
                    arrays[name] = cast(_read(header, where), dtypes[where], where)
                except Overflow as error:  # go on, to name all of them
                    overflowing += error.names
            if overflowing:
                continue
            for name, array in held_tree(stored, config, arrays, module).items():
                where = f"{module}/{name}"
                try:
                    array = cast(array, held[where], where)
                except Overflow as error:
                    overflowing += error.names
                    break
                params[where] = put(mesh, config, where, array, over_data=over_data)
                bar.update(num_bytes(array))
    if overflowing:
        raise Overflow(overflowing, np.dtype(config.dtype))
    return Checkpoint(header, config, unflatten(params))


def _smaller(config: ModelConfig) -> str:
    """How weights take less memory than in the precision of `config`, in words."""
    ways = ["free memory"]
    if config.quantization is None:
        ways.insert(0, "convert the model to int8 (s3d-convert --quantize int8)")
    if config.quantization == "blocks":
        ways.insert(0, "convert the GGUF file to int8 (s3d-convert --quantize int8)")
    if config.dtype == "float32":
        ways.insert(0, "load them in 16 bits (dtype='bfloat16' or 'float16', --dtype)")
    return ", or ".join(ways)


def read_header(path: str | os.PathLike[str]) -> Header:
    """Reads everything except the weights, and checks that the folder is complete.

    Raises:
        CheckpointError: as in `load`, but damaged arrays are not noticed.
    """
    folder = Path(path)
    fields = _read_config(folder)
    version = fields.get("version")
    if version not in _READABLE_VERSIONS:
        raise CheckpointError(
            f"{folder} is a checkpoint of format version {version!r}, and this s3d_jax reads "
            f"versions {', '.join(map(str, _READABLE_VERSIONS))}: update s3d_jax, or convert the "
            "model again"
        )
    try:
        config = ModelConfig.from_dict(fields.get("model", {}))
        if version < 4 and config.quantization == "int8":  # the name of another format since then
            config = config.replace(quantization="int8-plain")
        _expected_arrays(config)  # which looks at the kinds of blocks
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error
    index = read_json_object(folder / "weights.json")
    try:
        arrays = index_from_json(index)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / 'weights.json'} is damaged: {AGAIN}") from error
    generation = folder / "generation_config.json"
    header = Header(
        path=folder,
        config=config,
        source=fields.get("source") or {},
        generation_config=read_json_object(generation) if generation.exists() else {},
        arrays=arrays,
    )
    _check_complete(header)
    return header


def weights_checksum(path: str | os.PathLike[str]) -> int:
    """A checksum of all weights of a checkpoint: of their shapes and checksums."""
    return zlib.crc32((Path(path) / "weights.json").read_bytes())


def read_group(header: Header, name: str) -> dict[str, Any]:
    """One top-level group of the parameter tree, as numpy arrays.

    Raises:
        CheckpointError: an array is damaged.
    """
    paths = [path for path in header.arrays if top_level_key(path) == name]
    return unflatten({path: _read(header, path) for path in paths})[name]


def _read(header: Header, path: str) -> np.ndarray:
    dtype = _expected_arrays(header.config)[path].dtype
    return read_array(header.path / "weights", path, header.arrays[path], dtype)


@functools.cache
def _expected_arrays(config: ModelConfig) -> "dict[str, jax.ShapeDtypeStruct]":
    """Shape and dtype of each array of a model, by its path."""
    from s3d_jax.nn.transformer import abstract_params

    return flatten(abstract_params(config))


def _shapes(arrays: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {path: array.shape for path, array in arrays.items()}


def _read_config(folder: Path) -> dict[str, Any]:
    """The fields of config.json, which say that the folder is a native checkpoint."""
    if not folder.exists():
        raise CheckpointError(
            f"no checkpoint at {folder}: there is no such folder (a model on the hub is converted "
            f"first, by s3d-convert {folder} ...)"
        )
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file, and a native checkpoint is a folder")
    if problem := adapter_problem(folder):
        raise CheckpointError(problem)
    fields = read_json_object(folder / "config.json") if (folder / "config.json").exists() else {}
    if fields.get("format") == FORMAT:
        return fields
    if fields.keys() & {"model_type", "architectures"} or any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder} is a HF checkpoint, and a native one is needed: convert it by\n"
            f"  s3d-convert {folder} {folder.resolve().name}-s3d"
        )
    if not fields and (folder / "weights").is_dir():
        raise CheckpointError(f"{folder} is incomplete, it has no config.json: {AGAIN}")
    raise CheckpointError(
        f"{folder} is not a native checkpoint: its config.json is missing or of another format. "
        "Native checkpoints are made by s3d-convert"
    )


def _check_complete(header: Header) -> None:
    expected = _expected_arrays(header.config)
    problems = shape_problems(_shapes(header.arrays), _shapes(expected))
    missing = missing_arrays(header.path / "weights", header.arrays)
    problems += [f"{path}: missing from the folder weights" for path in missing]
    if problems:
        raise CheckpointError(
            f"{header.path} is incomplete or does not fit its own config: {AGAIN}\n"
            + bullets(problems)
        )
