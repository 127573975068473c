"""The native checkpoint folder: written and read group by group, whole or not at all.

    config.json              {"format": "s3d_jax", "version": 2, "model": {...}, "source": {...}}
    weights/<group>/         an orbax checkpoint for each top-level group of the parameter tree:
                             embed, layers_0, ..., final_norm, lm_head
    weights.json             shape and CRC-32 of each array, so that damage is noticed, and named
    generation_config.json   as in HF; only its end-of-text ids are used
    tokenizer files          as in HF

Each group can be written, and read, without the others in memory.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import re
import threading
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from s3d_jax.errors import CheckpointError, ConfigError
from s3d_jax.settings.model import ModelConfig
from s3d_jax.storage.staging import staged_folder
from s3d_jax.storage.tokenizer import has_vocabulary, tokenizer_files

if TYPE_CHECKING:
    from s3d_jax.nn.transformer import Params

FORMAT, VERSION = "s3d_jax", 2

# Fields of generation_config.json that ask for no computation: not using them needs no word.
_SILENT_GENERATION_FIELDS = frozenset(
    (
        *("eos_token_id", "bos_token_id", "pad_token_id"),
        *("transformers_version", "_from_model_config"),
        # What HF returns and how it computes it, not which tokens come.
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
        *("return_dict_in_generate", "use_cache", "cache_implementation"),
    )
)


@dataclasses.dataclass(frozen=True)
class Header:
    """What a checkpoint folder says about itself; no weights.

    Attributes:
        path: the folder.
        config: the model.
        source: where the weights came from (free form), or empty.
        generation_config: HF's generation_config.json, or empty.
        arrays: shape of each array, by its path in the parameter tree ("layers_0/mlp/down/weight").
    """

    path: Path
    config: ModelConfig
    source: dict[str, Any]
    generation_config: dict[str, Any]
    arrays: dict[str, tuple[int, ...]]
    checksums: dict[str, int] = dataclasses.field(repr=False)

    @property
    def groups(self) -> tuple[str, ...]:
        """Top-level keys of the parameter tree, in the order they were written."""
        return tuple(dict.fromkeys(_group(path) for path in self.arrays))

    @property
    def has_tokenizer(self) -> bool:
        """Whether the folder holds a tokenizer."""
        return has_vocabulary(self.path)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text; empty where the checkpoint names none."""
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
        """Fields of generation_config.json that are set and not used: sampling is the caller's."""
        fields = self.generation_config.items()
        return {k: v for k, v in fields if k not in _SILENT_GENERATION_FIELDS and v is not None}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        header: what the folder says about itself.
        config: the model; its dtype is that of `params`.
        params: nested dict of jax arrays, as `s3d_jax.model` wants it.
    """

    header: Header
    config: ModelConfig
    params: "Params"


class CheckpointWriter:
    """Writes the groups of one checkpoint; made by `checkpoint_writer`."""

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        from s3d_jax.nn.transformer import abstract_params

        self.folder = folder
        self.config = config
        self._expected = flatten(abstract_params(config))
        self._index: dict[str, dict[str, Any]] = {}

    def write_group(self, name: str, tree: Mapping[str, Any]) -> None:
        """Writes the subtree under the top-level key `name`: arrays as in `abstract_params`.

        Raises:
            CheckpointError: the arrays are not those of the model, or were written before.
        """
        arrays = {path: np.asarray(x) for path, x in flatten(tree, name).items()}
        expected = {k: v for k, v in self._expected.items() if _group(k) == name}
        problems = shape_problems(
            *({k: v.shape for k, v in tree.items()} for tree in (arrays, expected))
        )
        for path, array in arrays.items():
            if path in expected and array.dtype != expected[path].dtype:
                problems.append(f"{path}: {array.dtype}, the model has {expected[path].dtype}")
            if path in self._index:
                problems.append(f"{path}: written twice")
        if problems:
            raise CheckpointError(f"group {name!r} does not fit the model:\n{bullets(problems)}")

        save_tree(self.folder / "weights" / name, unflatten(arrays)[name])
        for path, array in arrays.items():
            self._index[path] = {"shape": list(array.shape), "crc32": crc32(array)}

    def add_file(self, source: str | os.PathLike[str]) -> None:
        """Copies a file, under its own name, into the folder (tokenizer files)."""
        try:
            data = Path(source).read_bytes()
        except OSError as error:
            raise CheckpointError(f"cannot read {source}: {error.strerror}") from error
        (self.folder / Path(source).name).write_bytes(data)

    def finish(self, source: Mapping[str, Any], generation_config: Mapping[str, Any]) -> None:
        """Writes the small files; config.json comes last, so nothing incomplete has one."""
        missing = [path for path in self._expected if path not in self._index]
        if missing:
            raise CheckpointError(f"not all of the model was written; missing:\n{bullets(missing)}")
        if generation_config:
            write_json(self.folder / "generation_config.json", generation_config)
        write_json(self.folder / "weights.json", self._index)
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

    The folder appears under its name when the block ends well, and not otherwise.

    Args:
        out: the folder to write.
        config: the model.
        source: provenance, JSON; shown by `s3d info`, and used by exports.
        generation_config: HF's generation settings, JSON.
        overwrite: replace an existing checkpoint, which lives on until the new one is complete.
        needs: bytes that will be written, to notice early that they will not fit.

    Raises:
        CheckpointError: `out` exists or cannot be written, or groups are missing at the end.
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
        params: the parameter tree, arrays as in `abstract_params`.
        tokenizer: a folder whose tokenizer files are copied.

    Returns:
        The folder.

    Raises:
        CheckpointError: as `checkpoint_writer`, or `params` does not fit `config`.
    """
    with checkpoint_writer(
        out, config, source=source, generation_config=generation_config, overwrite=overwrite
    ) as writer:
        for name, tree in params.items():
            writer.write_group(name, tree)
        for file in tokenizer_files(tokenizer) if tokenizer is not None else ():
            writer.add_file(file)
    return Path(out)


def load(
    path: str | os.PathLike[str], dtype: str | None = None, *, progress: bool = False
) -> Checkpoint:
    """Reads a checkpoint onto the default device.

    Args:
        path: a native checkpoint folder.
        dtype: "float32", "bfloat16" or "float16" to cast to; None keeps the stored one.
        progress: show a bar on a terminal where it takes more than a second.

    Raises:
        CheckpointError: the folder is missing, of another format or version, incomplete or damaged.
        ConfigError: an unknown dtype.
    """
    import jax
    from tqdm import tqdm

    header = read_header(path)
    config = header.config if dtype is None else header.config.replace(dtype=dtype)
    target = array_dtypes(config)
    params: dict[str, Any] = {}
    with tqdm(
        total=sum(math.prod(shape) * target[k].itemsize for k, shape in header.arrays.items()),
        desc="loading",
        unit="B",
        unit_scale=True,
        disable=None if progress else True,  # None: only on a terminal
        leave=False,
        delay=1,
    ) as bar:
        for name in header.groups:
            arrays = {}
            for array, x in flatten(read_group(header, name), name).items():
                arrays[array] = jax.device_put(cast(x, target[array], array))
                bar.update(arrays[array].nbytes)
            params |= unflatten(arrays)
    return Checkpoint(header, config, params)


def read_header(path: str | os.PathLike[str]) -> Header:
    """Reads everything but the weights, and checks that the folder is whole.

    Raises:
        CheckpointError: as `load`; damage inside the arrays is found by `load` alone.
    """
    folder = Path(path)
    _check_is_native(folder)
    fields = read_json(folder / "config.json")
    version = fields.get("version")
    if version != VERSION:
        raise CheckpointError(
            f"{folder} is a checkpoint of format version {version!r}, and this s3d_jax reads "
            f"version {VERSION}: update s3d_jax, or convert the model again"
        )
    try:
        config = ModelConfig.from_dict(fields.get("model", {}))
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error
    index = read_json(folder / "weights.json")
    try:
        arrays = {str(k): tuple(int(n) for n in v["shape"]) for k, v in index.items()}
        checksums = {str(k): int(v["crc32"]) for k, v in index.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / 'weights.json'} is damaged: {_AGAIN}") from error
    generation = folder / "generation_config.json"
    header = Header(
        path=folder,
        config=config,
        source=fields.get("source") or {},
        generation_config=read_json(generation) if generation.exists() else {},
        arrays=arrays,
        checksums=checksums,
    )
    _check_complete(header)
    return header


def read_group(header: Header, name: str) -> dict[str, Any]:
    """One top-level group of the parameter tree, numpy arrays.

    Raises:
        CheckpointError: an array is damaged.
    """
    paths = [path for path in header.arrays if _group(path) == name]
    dtypes = array_dtypes(header.config)
    folder = header.path / "weights" / name
    tree = restore_tree(folder, unflatten(dict.fromkeys(paths))[name])
    arrays = flatten(tree, name)
    damaged = [
        path
        for path in paths
        if path not in arrays
        or arrays[path].shape != header.arrays[path]
        or arrays[path].dtype != dtypes[path]
        or crc32(arrays[path]) != header.checksums[path]
    ]
    if damaged:
        raise CheckpointError(f"the weights in {folder} are damaged: {_AGAIN}\n{bullets(damaged)}")
    return tree


def save_tree(folder: Path, tree: Mapping[str, Any]) -> None:
    """Writes a nested dict of numpy arrays as one orbax checkpoint.

    Raises:
        OSError: it cannot be written.
    """
    import orbax.checkpoint as ocp

    try:
        with _orbax_silenced:
            _orbax_checkpointer().save(folder.absolute(), args=ocp.args.PyTreeSave(dict(tree)))
        # Names the folder it was written in; a native checkpoint is staged, and may be passed on.
        (folder / "commit_success.txt").unlink(missing_ok=True)
    except ValueError as error:  # what tensorstore makes of an OSError
        if match := re.search(r"os_error_code='(\d+)'", str(error)):
            raise OSError(int(match[1]), os.strerror(int(match[1]))) from error
        raise


def restore_tree(folder: Path, structure: Mapping[str, Any]) -> dict[str, Any]:
    """Reads what `save_tree` wrote, as numpy arrays.

    Args:
        folder: the orbax checkpoint.
        structure: a nested dict with the keys of the tree.

    Raises:
        CheckpointError: it cannot be read.
    """
    import jax
    import orbax.checkpoint as ocp

    numpy_array = ocp.RestoreArgs(restore_type=np.ndarray)
    wanted = jax.tree.map(lambda _: numpy_array, structure, is_leaf=lambda x: x is None)
    try:
        with _orbax_silenced:
            return _orbax_checkpointer().restore(
                folder.absolute(), args=ocp.args.PyTreeRestore(restore_args=wanted)
            )
    except Exception as error:  # orbax and tensorstore raise most kinds for damaged files
        raise CheckpointError(f"cannot read the weights in {folder}: {_AGAIN} ({error})") from error


def cast(values: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """`values` in another dtype.

    Raises:
        CheckpointError: a finite value becomes infinite (float16 ends at 65504).
    """
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore"):
        result = values.astype(dtype)
    if dtype.itemsize <= 2 and not np.array_equal(
        np.isfinite(result.astype(np.float32)), np.isfinite(values.astype(np.float32))
    ):
        raise CheckpointError(
            f"{name} holds values too large for {dtype.name}: use --dtype float32"
        )
    return result


@functools.cache
def array_dtypes(config: ModelConfig) -> dict[str, np.dtype]:
    """The type of each array of the parameter tree, by its path."""
    from s3d_jax.nn.transformer import abstract_params

    return {path: leaf.dtype for path, leaf in flatten(abstract_params(config)).items()}


_AGAIN = "convert the model again, or restore the folder from a copy"


def _check_is_native(folder: Path) -> None:
    if not folder.exists():
        raise CheckpointError(
            f"no checkpoint at {folder}: there is no such folder (a model on the hub is converted "
            f"first, by s3d-convert {folder} ...)"
        )
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file, and a native checkpoint is a folder")
    fields = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    if fields.get("format") == FORMAT:
        return
    if fields.keys() & {"model_type", "architectures"} or any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder} is a HF checkpoint, and a native one is needed: convert it by\n"
            f"  s3d-convert {folder} {folder.resolve().name}-s3d"
        )
    if not fields and (folder / "weights").is_dir():
        raise CheckpointError(f"{folder} is incomplete, it has no config.json: {_AGAIN}")
    raise CheckpointError(
        f"{folder} is not a native checkpoint: its config.json is missing or of another format. "
        "Native checkpoints are made by s3d-convert"
    )


def _check_complete(header: Header) -> None:
    from s3d_jax.nn.transformer import abstract_params

    expected = {path: leaf.shape for path, leaf in flatten(abstract_params(header.config)).items()}
    problems = shape_problems(header.arrays, expected)
    problems += [
        f"{name}: missing from the folder weights"
        for name in header.groups
        if not (header.path / "weights" / name).is_dir()
    ]
    if problems:
        raise CheckpointError(
            f"{header.path} is incomplete or does not fit its own config: {_AGAIN}\n"
            + bullets(problems)
        )


def shape_problems(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """One line per missing, unknown and mis-shaped array; empty if all is as expected."""
    problems = [f"{path}: missing" for path in expected if path not in found]
    problems += [f"{path}: unknown" for path in found if path not in expected]
    problems += [
        f"{path}: shape {tuple(found[path])}, expected {tuple(shape)}"
        for path, shape in expected.items()
        if path in found and tuple(found[path]) != tuple(shape)
    ]
    return problems


def bullets(lines: list[str], limit: int = 40) -> str:
    """The lines of a list in an error message; a very long list is cut, and says so."""
    more = [f"... and {len(lines) - limit} more"] if len(lines) > limit else []
    return "\n".join(f"  {line}" for line in (*lines[:limit], *more))


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of a nested dict by their path, "layers_0/mlp/down/weight"."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}/{key}" if prefix else str(key)
        leaves.update(flatten(value, path) if isinstance(value, Mapping) else {path: value})
    return leaves


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict of the given paths."""
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


def read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent} is incomplete, it has no {path.name}: {_AGAIN}"
        ) from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): {_AGAIN}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} must hold a JSON object: {_AGAIN}")
    return fields


def _group(path: str) -> str:
    return path.partition("/")[0]


def crc32(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _orbax_checkpointer() -> Any:
    import orbax.checkpoint as ocp

    # Plain uncompressed zarr files. Weights hardly compress (by 8 % in float32), and compressing
    # them doubled the time and the memory; OCDBT was slower as well.
    # Orbax copies arrays so that they may be changed while it writes; here nobody does.
    arrays = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False,
        use_zarr3=True,
        use_compression=False,
        type_handler_registry=ocp.type_handlers.create_type_handler_registry((np.ndarray, arrays)),
    )
    return ocp.Checkpointer(handler)


class _OrbaxSilenced:
    """Orbax logs the traceback of each failure from its threads; we raise the failure, once.

    One for all threads: a group may be read while another one is written.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._level = threading.Lock(), 0, 0

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._level = logging.getLogger("absl").level
                logging.getLogger("absl").setLevel(logging.CRITICAL)
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                logging.getLogger("absl").setLevel(self._level)


_orbax_silenced = _OrbaxSilenced()
