"""The weight files of a HF folder: safetensors, or torch's .bin files."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from convert.sources.base import AGAIN, is_file, read_hf_json, reading
from convert.sources.safetensors import SafetensorsSource
from convert.sources.torch_bin import TorchSource
from convert.sources.wrappers import Unwrapped
from s3d_jax.errors import ConversionError
from s3d_jax.storage.trees import bullets


def open_weights(folder: Path) -> Unwrapped:
    """The weights of a HF folder.

    Raises:
        ConversionError: there are no weights, or files are missing or damaged. One message names
            all of them. Contradictions of sound files are in the source's `faults`.
    """
    return open_files(*weight_files(folder))


def open_files(
    files: Sequence[Path], index: Mapping[str, str], others: Iterable[str] = ()
) -> Unwrapped:
    """The weights in these files, as `weight_files` gives them; raises as `open_weights`.

    `others` are names of tensors of the same model in files that are not here.

    A .bin file may hold safetensors. A file named .safetensors is never unpickled.
    """
    pickled = files[0].suffix != ".safetensors" and not is_safetensors(files[0])
    source = TorchSource(files, index) if pickled else SafetensorsSource(files, index)
    return Unwrapped(source, others)


def is_safetensors(file: Path) -> bool:
    """Whether the content begins as a safetensors file: a length, then a JSON object."""
    with reading(file), open(file, "rb") as opened:
        return opened.read(9)[8:] == b"{"


def weight_files(
    folder: Path, remote: Collection[str] | None = None
) -> tuple[list[Path], dict[str, str]]:
    """Finds the files that hold the weights.

    Args:
        folder: the HF folder.
        remote: names of files that can be fetched, if the files that the index names need not be
            there; None if they must.

    Returns:
        The files in order; and the index, which has the file name of each tensor. The index is
        empty if there is only one file.

    Raises:
        ConversionError: there are no weights, or the index names files that cannot be used.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        single = folder / f"{stem}.{suffix}"
        index = folder / f"{stem}.{suffix}.index.json"
        if single.is_file() or single.name in (remote or ()):  # transformers prefers it as well
            return [single], {}
        if index.is_file():
            return _shards(index, f".{suffix}", complete=remote is None)
    raise ConversionError(
        f"{folder} holds no weights: expected model.safetensors, model.safetensors.index.json with "
        "its shards, pytorch_model.bin, or pytorch_model.bin.index.json with its shards (of a GGUF "
        "file, give its own name)"
    )


def _shards(index: Path, suffix: str, *, complete: bool) -> tuple[list[Path], dict[str, str]]:
    weight_map = read_hf_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{index}: weight_map is missing or empty: {AGAIN}")
    weight_map = {str(tensor): str(file) for tensor, file in weight_map.items()}
    problems, files = [], []
    for name in dict.fromkeys(weight_map.values()):
        path = index.parent / name
        if name != Path(name).name or name == "..":
            problems.append(f"{name}: points outside of the folder")
        elif path.suffix != suffix:
            problems.append(f"{name}: no {suffix} file")
        elif complete and not is_file(path):
            problems.append(f"{name}: no such file")
        files.append(path)
    if problems:
        raise ConversionError(
            f"{index} names shards that cannot be used: get a good copy of it and of all its "
            f"shards, into one folder\n{bullets(problems)}"
        )
    return files, weight_map
