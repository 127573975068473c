"""`inspect` and `--dry-run`: what a conversion would do, told without weights."""

import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import convert
from convert.__main__ import main
from convert.options import ConversionOptions
from convert.plan import dry_run, inspect
from convert.sources.safetensors import SafetensorsSource, read_safetensors_header
from s3d_jax.errors import CheckpointError, ConfigError, ConversionError
from s3d_jax.storage import native as checkpoint
from s3d_jax.storage.trees import flatten
from tests.convert.hf_folder import FIELDS, random_tensors, write_folder

TIED = FIELDS | {"tie_word_embeddings": True}
HEAD, ROTARY = "lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"


def tied_folder(folder: Path, shards: int = 1) -> Path:
    """Writes a folder with two tensors that a model with tied embeddings does not need."""
    tensors = random_tensors(TIED)
    tensors[HEAD] = tensors["model.embed_tokens.weight"].copy()
    tensors[ROTARY] = np.ones(5, np.float32)
    return write_folder(folder, tensors, TIED, shards)


def multimodal_folder(folder: Path, model: str, head: str) -> Path:
    """A Gemma 3 with images and a tied head, in two shards; its text tensors begin with `model`."""
    text = {name: n for name, n in FIELDS.items() if not name.startswith(("arch", "model", "hid"))}
    text |= {"hidden_size": 24, "tie_word_embeddings": True, "model_type": "gemma3_text"}
    fields = {"model_type": "gemma3", "text_config": text, "vision_config": {}}
    tensors = {
        name.replace("language_model.model.", model): tensor
        for name, tensor in random_tensors(fields).items()
    }
    tensors[head] = tensors[f"{model}embed_tokens.weight"].copy()
    tensors["vision_tower.embeddings.weight"] = np.ones(5, np.float32)
    return write_folder(folder, tensors, fields, shards=2)


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The tensors of safetensors files whose data is read."""
    names: list[str] = []
    read = SafetensorsSource.read

    def recorded(self, name, out, *rows):
        names.append(name)
        read(self, name, out, *rows)

    monkeypatch.setattr(SafetensorsSource, "read", recorded)
    return names


# --- inspect --------------------------------------------------------------------------------------


def test_every_tensor_goes_where_inspect_says(tmp_path, reads):
    fields = FIELDS | {"attention_bias": True, "mlp_bias": True}
    tensors = random_tensors(fields)
    folder = write_folder(tmp_path / "hf", tensors, fields, shards=2)
    target, entries = inspect(folder)
    assert not reads
    assert {entry.name for entry in entries} == tensors.keys()
    convert.convert(folder, tmp_path / "native", parity=False, progress=False)
    native = flatten(checkpoint.load(tmp_path / "native").params)
    assert {entry.native for entry in entries} == native.keys()
    for entry in entries:
        place = eval(f"np.s_{entry.slice or '[...]'}")
        piece = np.asarray(native[entry.native])[place]
        expected = tensors[entry.name]
        np.testing.assert_array_equal(piece, expected)
        assert (entry.dtype, entry.shape) == ("float32", expected.shape)
        assert entry.name in read_safetensors_header(folder / entry.file)
        assert not entry.reason and not entry.is_fault
    assert target.num_params == sum(x.size for x in tensors.values())


def test_inspect_says_why_a_tensor_is_not_needed(tmp_path, capsys):
    folder = tied_folder(tmp_path / "hf")
    reasons = {e.name: e.reason for e in inspect(folder)[1] if e.native is None}
    assert reasons == {
        HEAD: "the embeddings are tied: the head is the embedding table",
        ROTARY: "rotary tables follow from the config",
    }
    assert main(["inspect", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["tensor", "dtype", "shape", "file", "becomes"]
    line = next(line for line in lines if line.startswith(ROTARY))
    assert line.split("  ")[-1] == "not needed: rotary tables follow from the config"
    query = next(line for line in lines if "layers.1.self_attn.k_proj" in line)
    assert "[20, 24]" in query and query.endswith("layers_1/attention/qkv/weight[40:60]")
    assert lines[-1].endswith("2 are not needed, 0 at fault")


def test_inspect_shows_faults_and_returns_1(tmp_path, capsys):
    tensors = random_tensors()
    down, norm = "model.layers.1.mlp.down_proj.weight", "model.norm.weight"
    tensors[down] = tensors[down].T.copy()
    tensors["\x1b[2J"] = np.ones(3, np.int8)
    del tensors[norm]
    folder = write_folder(tmp_path / "hf", tensors)
    assert main(["inspect", str(folder)]) == 1
    text = capsys.readouterr().out
    assert "FAULT: shape [40, 24], the config asks for [24, 40]" in text
    assert "FAULT: unknown" in text and "FAULT: missing" in text and "\x1b" not in text
    assert main(["inspect", str(folder), "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["num_faults"] == 3 and facts["model_type"] == "llama"
    missing = next(x for x in facts["tensors"] if x["name"] == norm)
    assert missing == {
        **{"name": norm, "dtype": None, "shape": None, "file": None},
        **{"native": "final_norm/scale", "slice": "", "reason": "missing", "is_fault": True},
    }
    assert main(["inspect", str(tmp_path / "nowhere")]) == 2
    assert "there is no such folder" in capsys.readouterr().err


def test_inspect_lists_a_llama2c_file(data_dir, capsys):
    assert main(["inspect", str(data_dir / "llama2c" / "stories260K.bin")]) == 0
    assert "layers_4/mlp/gate_up/weight[172:344]" in capsys.readouterr().out


# --- from config and index alone ------------------------------------------------------------------


def bare(data_dir: Path, folder: Path, config: str, index: str) -> Path:
    """Writes a folder without weights."""
    folder.mkdir()
    fields = (data_dir / "configs" / f"{config}.config.json").read_text()
    (folder / "config.json").write_text(fields)
    kind = index.split(".", 1)[1]
    names = (data_dir / "weight_index" / f"{index}.json").read_text()
    (folder / f"{kind}.json").write_text(names)
    return folder


@pytest.mark.parametrize(
    "config, index, num_params, num_files",
    [
        (
            "Phi-3-mini-4k-instruct",
            "Phi-3-mini-4k-derived-merge.model.safetensors.index",
            3_821_079_552,
            2,
        ),
        (
            "Llama-2-7b-chat-hf",
            "Llama-2-7b-chat-hf.pytorch_model.bin.index",
            6_738_415_616,
            7,
        ),
    ],
)
def test_real_models_without_their_weights(
    data_dir, tmp_path, capsys, monkeypatch, config, index, num_params, num_files
):
    folder = bare(data_dir, tmp_path / "hf", config, index)
    monkeypatch.setattr("s3d_jax.storage.staging.free_space", lambda out: 10**11)
    planned = dry_run(folder, tmp_path / "out")
    assert planned.num_written == planned.num_read == 2 * num_params
    assert len(planned.absent) == num_files and set(planned.files.values()) == {None}
    assert 0.6e9 < planned.memory < 2e9
    assert main(["--dry-run", str(folder), str(tmp_path / "out")]) == 0
    assert "not here: what it holds is taken from config.json" in capsys.readouterr().out
    target, entries = inspect(folder)
    assert target.num_params == num_params and target.config.dtype == "bfloat16"
    assert not any(entry.is_fault for entry in entries)
    assert {entry.dtype for entry in entries if entry.native} == {"bfloat16"}
    assert os.listdir(tmp_path) == ["hf"]
    with pytest.raises(ConversionError, match="no such file"):
        convert.convert(folder, tmp_path / "out")


def test_some_shards_may_be_there(tmp_path):
    folder = tied_folder(tmp_path / "hf", shards=3)
    whole = dry_run(folder, tmp_path / "out")
    (folder / "model-00002-of-00003.safetensors").unlink()
    part = dry_run(folder, tmp_path / "out")
    assert [file.name for file in part.absent] == ["model-00002-of-00003.safetensors"]
    assert (part.num_read, part.num_written) == (whole.num_read, whole.num_written)
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())
    names["weight_map"]["extra"] = "model-00002-of-00003.safetensors"
    index.write_text(json.dumps(names))
    with pytest.raises(ConversionError, match="extra: unknown"):
        dry_run(folder, tmp_path / "out")
    extra = next(entry for entry in inspect(folder)[1] if entry.name == "extra")
    assert extra.is_fault and extra.dtype is None and extra.shape is None


# --- dry runs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model, head",
    [
        ("language_model.model.", "language_model.lm_head.weight"),
        ("model.language_model.", "lm_head.weight"),
    ],
)
def test_the_parts_of_a_multimodal_model(tmp_path, reads, model, head):
    """The files and the index alone tell the same, in either spelling."""
    folder = multimodal_folder(tmp_path / "hf", model, head)
    unneeded = {
        head: "the embeddings are tied: the head is the embedding table",
        "vision_tower.embeddings.weight": "images are not supported",
    }
    for _ in range(2):
        planned = dry_run(folder, tmp_path / "out")
        assert planned.unneeded == unneeded and planned.model_type == "gemma3"
        _, entries = inspect(folder)
        assert {e.name: e.reason for e in entries if e.native is None} == unneeded
        assert sum(e.name.startswith(model) for e in entries) == len(entries) - 2
        if (folder / "model-00001-of-00002.safetensors").exists():
            report = convert.convert(folder, tmp_path / "native", parity=False, progress=False)
            assert report.unneeded == unneeded
            assert set(reads) == {e.name for e in entries} - {"vision_tower.embeddings.weight"}
            for file in folder.glob("*.safetensors"):
                file.unlink()


def test_a_head_of_its_own_is_noticed_in_a_multimodal_model(tmp_path):
    head = "language_model.lm_head.weight"
    folder = multimodal_folder(tmp_path / "hf", "language_model.model.", head)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        save_file({n: x + (n == head) for n, x in tensors.items()}, file)
    with pytest.raises(ConversionError, match=r"lm_head\.weight: differs from the embeddings"):
        convert.convert(folder, tmp_path / "native", parity=False, progress=False)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_dry_run_says_what_the_conversion_does(tmp_path, reads, capsys, dtype):
    folder = tied_folder(tmp_path / "hf", shards=2)
    before = sorted(tmp_path.rglob("*"))
    planned = dry_run(folder, tmp_path / "out", ConversionOptions(dtype=dtype))
    assert not reads
    option = ["--dtype", dtype] if dtype else []
    assert main(["--dry-run", str(folder), str(tmp_path / "out"), *option]) == 0
    text = capsys.readouterr().out
    assert "nothing was written" in text
    assert "1 tensor: the embeddings are tied" in text and "1 tensor: rotary tables" in text
    assert f"to be written in {planned.config.dtype}" in text
    assert sorted(tmp_path.rglob("*")) == before and not reads

    report = convert.convert(folder, tmp_path / "out", dtype=dtype, parity=False, progress=False)
    assert (planned.num_params, planned.num_written) == (report.num_params, report.num_bytes)
    assert planned.config == report.config
    assert planned.files == {f: f.stat().st_size for f in sorted(folder.glob("*.safetensors"))}
    assert set(planned.unneeded) == {HEAD, ROTARY}
    assert planned.num_read == 4 * report.num_params


def test_what_is_not_needed_is_not_read(tmp_path, reads):
    """Except for the head, which is compared with the embeddings that replace it."""
    target, _ = inspect(tied_folder(tmp_path / "hf"))
    convert.convert(tmp_path / "hf", tmp_path / "out", parity=False, progress=False)
    assert set(reads) == target.shapes.keys() | {HEAD}
    assert len(reads) == len(target.shapes) + 2  # the two that are compared


def test_a_dry_run_refuses_what_the_conversion_would(tmp_path, monkeypatch, capsys):
    folder = write_folder(tmp_path / "hf", random_tensors(dtype=ml_dtypes.bfloat16))
    full = write_folder(tmp_path / "full")
    with pytest.raises(CheckpointError, match="--overwrite"):
        dry_run(folder, full)
    dry_run(folder, full, ConversionOptions(overwrite=True))
    with pytest.raises(CheckpointError, match="what is being read"):
        dry_run(folder, folder, ConversionOptions(overwrite=True))
    with pytest.raises(ConfigError, match="dtype must be one of"):
        ConversionOptions(dtype="int8")
    with pytest.raises(ConversionError, match="no tokenizer files"):
        dry_run(folder, tmp_path / "out", ConversionOptions(tokenizer=tmp_path))
    monkeypatch.setattr("s3d_jax.storage.staging.free_space", lambda out: 1000)
    assert main(["--dry-run", str(folder), str(tmp_path / "deep" / "out")]) == 2
    assert "free some space" in capsys.readouterr().err
    assert not (tmp_path / "deep").exists()
