"""Kinds of sources: how they are recognised, and what a source of a new kind may be."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import convert
from convert.__main__ import main
from convert.options import ConversionOptions
from convert.plan import dry_run, inspect
from convert.sources.base import StoredTensor, cast_into
from convert.sources.hf_folder import open_weights
from convert.sources.native import NativeSource
from convert.sources.open import HF, LLAMA2C, NATIVE, open_origin
from s3d_jax.errors import ConversionError
from s3d_jax.storage import native as checkpoint
from s3d_jax.storage.trees import flatten
from tests.conftest import need
from tests.convert.hf_folder import random_tensors, write_folder
from tests.tiny import tiny_config, tiny_params

QUIET = dict(parity=False, progress=False)


def llama2c_file(path: Path) -> Path:
    """A file of one layer: dim 2, hidden 2, 1 head, 3 tokens, length 2."""
    sizes = np.array([2, 2, 1, 1, 1, 3, 2], "<i4")
    path.write_bytes(sizes.tobytes() + bytes(4 * (3 * 2 + 4 * 2 * 2 + 3 * 2 * 2 + 3 * 2 + 2 * 2)))
    return path


def test_the_content_tells_the_kind(tmp_path):
    """Names of files do not matter."""
    assert open_origin(write_folder(tmp_path / "hf")).format == HF
    native = checkpoint.save(tmp_path / "native", tiny_config(), tiny_params(tiny_config()))
    assert open_origin(native).format == NATIVE
    for name in ("stories.bin", "stories", "stories.safetensors"):
        assert open_origin(llama2c_file(tmp_path / name)).format == LLAMA2C
    weights = (tmp_path / "hf" / "model.safetensors").read_bytes()
    (tmp_path / "renamed.bin").write_bytes(weights)
    with pytest.raises(ConversionError, match="give the HF folder it lies in"):
        open_origin(tmp_path / "renamed.bin")


def test_bin_files_may_hold_safetensors_and_no_safetensors_are_unpickled(tmp_path):
    torch = need("torch")
    tensors = random_tensors()
    folder = write_folder(tmp_path / "hf", tensors)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    source, out = open_weights(folder), np.empty(24, np.float32)
    source.read("model.norm.weight", out)
    np.testing.assert_array_equal(out, tensors["model.norm.weight"])
    torch.save({n: torch.tensor(x) for n, x in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(ConversionError, match="is truncated or no safetensors file"):
        open_weights(folder)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize(
    "wrap, words",
    [
        (lambda name: f"_orig_mod.{name}", "_orig_mod. (torch.compile)"),
        (lambda name: f"module.{name}", "module. (DataParallel)"),
        (
            lambda name: "module._orig_mod." + name.replace("layers.1.", "layers.1._orig_mod."),
            "module. (DataParallel), _orig_mod. (torch.compile)",
        ),
        (
            lambda name: f"module.base_model.model.{name}",
            "module. (DataParallel), base_model.model. (PEFT)",
        ),
    ],
)
def test_names_of_wrappers_are_left_out(tmp_path, wrap, words, shards, capsys):
    plain = write_folder(tmp_path / "plain")
    tensors = {wrap(name): tensor for name, tensor in random_tensors().items()}
    wrapped = str(write_folder(tmp_path / "wrapped", tensors, shards=shards))
    out = tmp_path / "out"
    assert main([wrapped, str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"left out of the names of tensors: {words}\n" in printed
    assert "not measured, it does not read" in printed
    convert.convert(plain, tmp_path / "from_plain", **QUIET)
    from_plain = checkpoint.read_header(tmp_path / "from_plain")
    assert checkpoint.read_header(out).arrays == from_plain.arrays
    assert main(["inspect", wrapped]) == 0
    assert f"{words}\nllama, " in capsys.readouterr().out
    if shards > 1:
        (tmp_path / "wrapped" / "model-00002-of-00002.safetensors").unlink()
    assert main(["--dry-run", wrapped, str(tmp_path / "dry")]) == 0
    assert f"leave out  {words}" in capsys.readouterr().out
    with pytest.raises(ConversionError, match="save the model inside of the wrapper"):
        convert.verify(out, write_folder(tmp_path / "again", tensors))


def test_names_that_would_clash_are_kept(tmp_path, capsys):
    """In shards, of which one is not here: a dry run says what the conversion says."""
    tensors = random_tensors()
    again = {f"module.{name}": tensors[name] for name in ("model.norm.weight", "lm_head.weight")}
    folder = write_folder(tmp_path / "hf", tensors | again, shards=2)
    source, out = str(folder), str(tmp_path / "out")
    said = []
    for arguments in ([source, out], ["--dry-run", source, out], None, ["--dry-run", source, out]):
        if arguments is None:
            (folder / "model-00002-of-00002.safetensors").unlink()
            continue
        assert main(arguments) == 2
        said.append(capsys.readouterr().err)
    assert said[0].count("unknown") == 2 and "module.lm_head.weight: unknown" in said[0]
    assert said[0] == said[1] == said[2]


@pytest.mark.parametrize(
    "change",
    [
        lambda name: name.replace("q_proj.", "q_proj.base_layer."),
        lambda name: f"base_model.model.{name}",
        lambda name: f"module.base_model.model.{name}",
    ],
)
def test_an_adapter_that_is_not_merged_is_called_one(tmp_path, change):
    tensors = {change(name): tensor for name, tensor in random_tensors().items()}
    lora = change("model.layers.0.self_attn.q_proj.lora_A.default.weight")
    folder = write_folder(tmp_path / "hf", tensors | {lora: np.zeros((2, 24), np.float32)})
    with pytest.raises(ConversionError, match=r"not merged .*merge by model\.merge_and_unload\(\)"):
        convert.convert(folder, tmp_path / "out", **QUIET)
    reasons = {entry.reason for entry in inspect(folder)[1] if entry.is_fault}
    assert reasons == {"missing", "of an adapter (PEFT)"}


ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "owner/base"}


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_next_to_a_model_is_refused(tmp_path, file, capsys):
    folder = write_folder(tmp_path / "hf")
    (folder / file).write_text(json.dumps(ADAPTER))
    source, out = str(folder), str(tmp_path / "out")
    for arguments in ([source, out], ["--dry-run", source, out], ["inspect", source]):
        assert main(arguments) == 2
        err = capsys.readouterr().err
        assert f"{folder} holds an adapter (LORA: {file}) next to a model" in err
        assert "model.merge_and_unload()" in err and "remove these files from a copy" in err


def test_an_adapter_alone_is_called_one(tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text(json.dumps(ADAPTER))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert main([str(tmp_path), str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert "adapter_model.safetensors) and no model. Merge" in err and "'owner/base'" in err


@pytest.mark.parametrize("kind", ["hf", "native", "llama2c"])
def test_what_is_on_disk_has_no_revision(tmp_path, kind):
    sources = {
        "hf": lambda: write_folder(tmp_path / "hf"),
        "native": lambda: checkpoint.save(
            tmp_path / "x", tiny_config(), tiny_params(tiny_config())
        ),
        "llama2c": lambda: llama2c_file(tmp_path / "x.bin"),
    }
    with pytest.raises(ConversionError, match=r"is on disk, and has no revision 'main'"):
        open_origin(sources[kind](), revision="main")


# --- types and tokenizers that no format of today has ---------------------------------------------


class EightBits:
    """Tensors stored as bytes and one scale each, whose values are floats."""

    def __init__(self, tensors: dict[str, np.ndarray], file: Path) -> None:
        self.bytes = {
            n: np.round(x * 100).clip(-127, 127).astype(np.int8) for n, x in tensors.items()
        }
        self.faults: dict[str, str] = {}
        self.tensors = {
            name: StoredTensor("Q8", x.shape, file, x.nbytes, np.dtype(np.float32))
            for name, x in self.bytes.items()
        }

    def value(self, name: str) -> np.ndarray:
        return self.bytes[name] * np.float32(0.01)

    def read(self, name: str, out: np.ndarray, first_row: int = 0) -> None:
        cast_into(out, self.value(name)[first_row : first_row + len(out)], name)


@dataclasses.dataclass(frozen=True)
class TokenizerInFile:
    """A tokenizer that lies in the file of the weights."""

    path: Path
    text: str
    file_names = ("tokenizer.json",)
    is_complete = True

    def write(self, writer: checkpoint.CheckpointWriter) -> str:
        (writer.folder / "tokenizer.json").write_text(self.text)
        return ""


@pytest.fixture
def whole_model_in_a_file(tmp_path, data_dir, monkeypatch):
    """A file with weights in blocks and a tokenizer, as a later format may be."""
    file = tmp_path / "model.blocks"
    file.write_bytes(b"weights and words")
    source = EightBits(random_tensors(), file)
    folder = write_folder(tmp_path / "hf")
    like = open_origin(folder)
    text = (data_dir / "checkpoints" / "stories260k" / "tokenizer.json").read_text()
    tokenizer = TokenizerInFile(file, text)
    origin = dataclasses.replace(
        like, source=source, path=file, tokenizer=tokenizer, format="blocks"
    )
    monkeypatch.setattr("convert.target.open_origin", lambda *_, **__: origin)
    return file, source, text


def test_a_source_of_another_type_with_a_tokenizer_of_its_own(tmp_path, whole_model_in_a_file):
    file, source, text = whole_model_in_a_file
    planned = dry_run(file, tmp_path / "out", ConversionOptions(dtype="float16"))
    assert planned.num_read == sum(x.nbytes for x in source.bytes.values())
    assert planned.tokenizer == ("tokenizer.json",) and planned.files == {file: file.stat().st_size}
    report = convert.convert(file, tmp_path / "out", dtype="float16", **QUIET)
    assert report.tokenizer and report.stored_dtypes == ("Q8",) and report.is_rounded
    assert (tmp_path / "out" / "tokenizer.json").read_text() == text
    arrays = flatten(checkpoint.load(tmp_path / "out").params)
    for name in ("embed_tokens", "norm"):
        path = {"embed_tokens": "embed/embedding", "norm": "final_norm/scale"}[name]
        expected = source.value(f"model.{name}.weight").astype(np.float16)
        np.testing.assert_array_equal(arrays[path], expected)


def test_what_is_read_is_not_replaced_where_a_file_holds_all(tmp_path, whole_model_in_a_file):
    file, _, _ = whole_model_in_a_file
    with pytest.raises(checkpoint.CheckpointError, match="what is being read"):
        convert.convert(file, tmp_path, overwrite=True, **QUIET)


# --- native checkpoints ---------------------------------------------------------------------------


def test_native_checkpoints_are_inspected_like_any_source(tmp_path, monkeypatch):
    config = tiny_config()
    folder = checkpoint.save(tmp_path / "native", config, tiny_params(config))
    monkeypatch.setattr(NativeSource, "read", None)
    target, entries = inspect(folder)
    assert target.origin.model_type == "native checkpoint" and target.config == config
    assert [entry.name for entry in entries] == [entry.native for entry in entries]
    assert {e.name: e.shape for e in entries} == {
        path: record.shape for path, record in checkpoint.read_header(folder).arrays.items()
    }


def test_rows_of_a_native_array(tmp_path):
    config = tiny_config()
    params = tiny_params(config)
    header = checkpoint.read_header(checkpoint.save(tmp_path / "native", config, params))
    out = np.empty((3, config.hidden_size), np.float16)
    NativeSource(header).read("embed/embedding", out, 2)
    expected = np.asarray(params["embed"]["embedding"])[2:5].astype(np.float16)
    np.testing.assert_array_equal(out, expected)
