"""Torch's .bin checkpoints give the same as safetensors, and never execute anything."""

import json
import os
import pickle
import weakref
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import convert
from convert.plan import dry_run, inspect
from convert.sources import torch_bin
from convert.sources.hf_folder import open_weights
from s3d_jax.errors import ConversionError
from s3d_jax.storage import native as checkpoint
from s3d_jax.storage.trees import flatten
from tests.conftest import need
from tests.convert.hf_folder import FIELDS, random_tensors, write_folder

torch = need("torch")


def write_bin(folder, state: dict, shards: int = 1, **options):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(FIELDS))
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin", **options)
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        names = list(state)[i::shards]
        torch.save({name: state[name] for name in names}, folder / file, **options)
        weight_map |= dict.fromkeys(names, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def arrays_of(folder, out, **options):
    convert.convert(folder, out, parity=False, progress=False, **options)
    return {k: np.asarray(v) for k, v in flatten(checkpoint.load(out).params).items()}


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_as_safetensors(tmp_path, dtype, shards, old_format):
    from safetensors.torch import save_file

    kind = getattr(torch, dtype)
    state = {name: torch.tensor(x).to(kind) for name, x in random_tensors().items()}
    # Not contiguous in memory, as in checkpoints that were merged or transposed.
    name = "model.layers.0.mlp.down_proj.weight"
    state[name] = state[name].T.contiguous().T
    options = {"_use_new_zipfile_serialization": False} if old_format else {}
    ours = arrays_of(write_bin(tmp_path / "bin", state, shards, **options), tmp_path / "a")
    (tmp_path / "safe").mkdir()
    (tmp_path / "safe" / "config.json").write_text(json.dumps(FIELDS))
    contiguous = {n: t.contiguous() for n, t in state.items()}
    save_file(contiguous, tmp_path / "safe" / "model.safetensors")
    theirs = arrays_of(tmp_path / "safe", tmp_path / "b")
    assert ours.keys() == theirs.keys()
    for path, array in theirs.items():
        assert array.dtype.name == dtype
        assert ours[path].tobytes() == array.tobytes(), path


DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_reads_and_casts(tmp_path, stored, target):
    """The parameter requires gradients, as in dumps of a model in training."""
    values = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    tensor = torch.nn.Parameter(torch.tensor(values).to(getattr(torch, stored)))
    torch.save({"a": tensor}, tmp_path / "pytorch_model.bin")
    out = np.empty((7, 5), DTYPES[target])
    open_weights(tmp_path).read("a", out)
    np.testing.assert_array_equal(out, values.astype(DTYPES[stored]).astype(DTYPES[target]))


def test_dtype_on_the_way(tmp_path):
    state = {name: torch.tensor(x) for name, x in random_tensors().items()}
    folder = write_bin(tmp_path / "bin", state, 2)
    arrays = arrays_of(folder, tmp_path / "out", dtype="bfloat16")
    assert {x.dtype.name for x in arrays.values()} == {"bfloat16"}
    expected = random_tensors(dtype=ml_dtypes.bfloat16)["model.embed_tokens.weight"]
    np.testing.assert_array_equal(arrays["embed/embedding"], expected)


def test_plans_are_those_of_safetensors(tmp_path):
    tensors = random_tensors()
    state = {name: torch.tensor(x) for name, x in tensors.items()}
    folder = write_bin(tmp_path / "bin", state, 2)
    target, entries = inspect(folder)
    other, others = inspect(write_folder(tmp_path / "safe", tensors, shards=2))
    assert target.config == other.config
    assert [replace(e, file="") for e in entries] == [replace(e, file="") for e in others]
    assert {e.file for e in entries} == {file.name for file in folder.glob("*.bin")}
    one, two = (dry_run(tmp_path / name, tmp_path / "out") for name in ("bin", "safe"))
    assert one.num_read == two.num_read and one.memory == two.memory
    assert all(size > one.num_read / 3 for size in one.files.values())


def test_one_file_is_in_memory_at_a_time(tmp_path, monkeypatch):
    """Files of the old format cannot be mapped: a whole one is in memory."""
    state = {name: torch.tensor(x) for name, x in random_tensors().items()}
    folder = write_bin(tmp_path / "bin", state, 3, _use_new_zipfile_serialization=False)
    alive: list[weakref.ref] = []
    loaded = []

    def load(path):
        assert not [x for x in alive if x() is not None], "the file before is still in memory"
        tensors = original(path)
        alive[:] = [weakref.ref(x) for x in tensors.values()]
        loaded.append(path.name)
        return tensors

    original = torch_bin.load
    monkeypatch.setattr(torch_bin, "load", load)
    source = open_weights(folder)
    for name in random_tensors():
        source.read(name, np.empty(source.tensors[name].shape, np.float32))
    assert len(loaded) > 6


def test_faults_are_listed_as_those_of_safetensors(tmp_path):
    state = {name: torch.tensor(x) for name, x in random_tensors().items()}
    folder = write_bin(tmp_path / "bin", state, 2)
    first, second = sorted(folder.glob("*.bin"))
    tensors = torch.load(first)
    twice, lost = list(state)[1], list(state)[2]
    tensors[twice] = state[twice]
    del tensors[lost]
    torch.save(tensors, first)
    with pytest.raises(ConversionError) as caught:
        arrays_of(folder, tmp_path / "out")
    assert f"{twice}: in more than one file: {first.name}, {second.name}" in str(caught.value)
    assert f"{lost}: missing, and the index says that it is in {first.name}" in str(caught.value)


def test_rows(tmp_path):
    values = torch.arange(35.0).reshape(5, 7).T  # not contiguous
    torch.save({"a": values}, tmp_path / "pytorch_model.bin")
    out = np.empty((3, 5), np.float16)
    open_weights(tmp_path).read("a", out, 2)
    np.testing.assert_array_equal(out, values[2:5].numpy())


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "x.bin"])
def test_a_file_alone_is_no_source(tmp_path, name, old_format):
    torch.save({}, tmp_path / name, _use_new_zipfile_serialization=not old_format)
    with pytest.raises(ConversionError, match="give the HF folder it lies in"):
        convert.convert(tmp_path / name, tmp_path / "out")


class Attack:
    """A call that unpickling would run."""

    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (str(self.victim),)


@pytest.mark.parametrize("how", ["torch.save", "torch.save old", "pickle"])
def test_code_in_a_pickle_never_runs(tmp_path, how):
    victim = tmp_path / "executed"
    state = {name: torch.tensor(x) for name, x in random_tensors().items()}
    folder = write_bin(tmp_path / "bin", state)
    attack = {**state, "x": Attack(victim)}
    if how == "pickle":
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(attack))
    else:
        new = how == "torch.save"
        torch.save(attack, folder / "pytorch_model.bin", _use_new_zipfile_serialization=new)
    with pytest.raises(ConversionError, match=r"pytorch_model\.bin .*could execute code"):
        arrays_of(folder, tmp_path / "out")
    assert not victim.exists() and not (tmp_path / "out").exists()
    pickle.loads(pickle.dumps(Attack(victim)))  # the attack itself works
    assert victim.exists()


def test_damage_and_strange_content(tmp_path, monkeypatch):
    state = {name: torch.tensor(x) for name, x in random_tensors().items()}
    folder = write_bin(tmp_path / "bin", state)
    file = folder / "pytorch_model.bin"
    good = file.read_bytes()
    for size in (0, 10, len(good) // 2, len(good) - 30):
        file.write_bytes(good[:size])
        with pytest.raises(ConversionError, match=r"pytorch_model\.bin"):
            arrays_of(folder, tmp_path / "out")
    for content in ([torch.zeros(2)], {"epoch": 3}, {"model": state}):
        torch.save(content, file)
        with pytest.raises(ConversionError, match="must hold a dict of tensors"):
            arrays_of(folder, tmp_path / "out")
    torch.save({**state, "model.norm.weight": torch.zeros(24, dtype=torch.int64)}, file)
    with pytest.raises(ConversionError, match=r"model\.norm\.weight: stored as int64"):
        arrays_of(folder, tmp_path / "out")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(ConversionError, match=r"pip install 's3d-jax\[torch\]'"):
        torch_bin.load(file)


def test_a_missing_torch_fails_in_ci_and_skips_elsewhere(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    monkeypatch.setenv("CI", "1")
    with pytest.raises(pytest.fail.Exception):
        need("torch")
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception):
        need("torch")
    script = (Path(__file__).parents[2] / ".ci" / "run").read_text()
    assert "export CI=1" in script
