"""Torch's .bin checkpoints give what safetensors give, and never execute anything."""

import json
import os
import pickle

import numpy as np
import pytest

import convert
from convert import torch_bin
from s3d_jax import checkpoint
from s3d_jax.errors import ConversionError
from tests.convert.hf_folder import FIELDS, random_tensors

torch = pytest.importorskip("torch", reason=".bin files need torch: pip install torch==2.13.0")


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


def arrays_of(folder, out):
    convert.convert(folder, out, parity=False, progress=False)
    return {k: np.asarray(v) for k, v in checkpoint.flatten(checkpoint.load(out).params).items()}


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


class Attack:
    """What unpickling would run."""

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
