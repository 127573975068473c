"""Safetensors: read and written as the safetensors library does, and damage is named."""

import json
import math

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import convert
from convert.sources.hf_folder import open_weights
from convert.sources.safetensors import (
    SafetensorsSource,
    SafetensorsWriter,
    read_safetensors_header,
)
from s3d_jax.errors import CheckpointError, ConversionError
from tests.convert.hf_folder import random_tensors, write_folder

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def read(source, name: str, dtype) -> np.ndarray:
    out = np.empty(source.tensors[name].shape, dtype)
    source.read(name, out)
    return out


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_reads_and_casts(tmp_path, stored, target):
    values = np.random.default_rng(0).normal(size=(7, 5)).astype(DTYPES[stored])
    save_file({"a": values, "b": values[0], "empty": values[:0]}, tmp_path / "model.safetensors")
    source = open_weights(tmp_path)
    assert source.tensors["a"].dtype == stored and source.tensors["a"].shape == (7, 5)
    for name, expected in (("a", values), ("b", values[0]), ("empty", values[:0])):
        np.testing.assert_array_equal(
            read(source, name, DTYPES[target]), expected.astype(DTYPES[target])
        )


def test_casting_never_overflows_in_silence(tmp_path):
    save_file({"big": np.array([1.0, 7e4], np.float32)}, tmp_path / "model.safetensors")
    source = open_weights(tmp_path)
    assert read(source, "big", ml_dtypes.bfloat16)[1] == ml_dtypes.bfloat16(7e4)
    with pytest.raises(CheckpointError, match=r"big .*float16: use --dtype float32"):
        read(source, "big", np.float16)
    save_file({"inf": np.array([np.inf, np.nan], np.float32)}, tmp_path / "model.safetensors")
    assert not np.isfinite(
        read(open_weights(tmp_path), "inf", np.float16)
    ).any()  # not finite before either


@pytest.mark.parametrize("dtype", DTYPES)
def test_writes_what_the_library_reads(tmp_path, dtype):
    rng = np.random.default_rng(0)
    arrays = {n: rng.normal(size=s).astype(DTYPES[dtype]) for n, s in (("b", (3, 4)), ("a", (5,)))}
    writer = SafetensorsWriter(tmp_path / "x", {n: (dtype, a.shape) for n, a in arrays.items()})
    for name, array in arrays.items():
        writer.write(name, array)
    writer.close()
    loaded = load_file(tmp_path / "x")
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[name], array)


def test_shards_give_the_same_tensors(tmp_path):
    tensors = random_tensors()
    one = open_weights(write_folder(tmp_path / "one", tensors))
    many = open_weights(write_folder(tmp_path / "many", tensors, shards=4))
    assert one.tensors.keys() == many.tensors.keys() == tensors.keys()
    for name in tensors:
        np.testing.assert_array_equal(read(one, name, np.float32), read(many, name, np.float32))


@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors"])
def test_an_index_cannot_point_outside(tmp_path, file):
    folder = write_folder(tmp_path / "hf", shards=2)
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "outside.safetensors")
    (folder / "sub").mkdir()
    save_file({"x": np.zeros(1, np.float32)}, folder / "sub" / "x.safetensors")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["x"] = file
    path.write_text(json.dumps(index))
    with pytest.raises(ConversionError, match="outside"):
        open_weights(folder)


def test_faults_of_all_shards_are_in_one_message(tmp_path):
    folder = write_folder(tmp_path / "hf", shards=3)
    (folder / "model-00001-of-00003.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"model-00001-of-00003\.safetensors: no such file"):
        open_weights(folder)
    second = folder / "model-00002-of-00003.safetensors"
    (folder / "model-00001-of-00003.safetensors").write_bytes(second.read_bytes()[:9])
    third = folder / "model-00003-of-00003.safetensors"
    third.write_bytes(third.read_bytes()[:-4])
    with pytest.raises(ConversionError) as caught:
        open_weights(folder)
    assert "model-00001-of-00003.safetensors is truncated" in str(caught.value)
    assert "model-00003-of-00003.safetensors is truncated" in str(caught.value)
    third.unlink()
    second.unlink()
    with pytest.raises(ConversionError) as caught:
        open_weights(folder)
    assert str(caught.value).count("no such file") == 2


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_rows(tmp_path, dtype):
    values = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    save_file({"x": values[:2], "a": values}, tmp_path / "model.safetensors")
    out = np.empty((3, 5), dtype)
    open_weights(tmp_path).read("a", out, 2)
    np.testing.assert_array_equal(out, values[2:5].astype(dtype))


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}'])
def test_a_damaged_index(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ConversionError, match=r"model.safetensors.index.json"):
        open_weights(tmp_path)


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(ConversionError, match="holds no weights"):
        open_weights(tmp_path)


def file_of(header, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


GOOD = file_of({"x": entry([2, 3], 0, 24), "y": entry([1], 24, 28)}, bytes(28))
X = json.dumps(entry([1], 0, 4)).encode()
DAMAGED = {
    "empty": b"",
    "shorter than a header's length": GOOD[:5],
    "header cut": GOOD[:40],
    "data cut": GOOD[:-1],
    "trailing data": GOOD + b"x",
    "absurd header length": (2**63).to_bytes(8, "little") + GOOD[8:],
    "no JSON": file_of(b"{x}"),
    "no UTF-8": file_of(b'{"\xff": 1}'),
    "deep nesting": file_of(b"[" * 200_000),
    "an array": file_of([]),
    "a name twice": file_of(b'{"x":%b,"x":%b}' % (X, X), bytes(4)),
    "entry without fields": file_of({"x": {}}),
    "entry no object": file_of({"x": 3}),
    "negative shape": file_of({"x": entry([-2, -3], 0, 24)}, bytes(24)),
    "huge shape": file_of({"x": entry([2**40, 2**40], 0, 24)}, bytes(24)),
    "fractional shape": file_of({"x": entry([1.5], 0, 6)}, bytes(6)),
    "shape no list": file_of({"x": entry("ab", 0, 8)}, bytes(8)),
    "offsets backwards": file_of({"x": entry([0], 4, 0)}, bytes(4)),
    "offsets after the end": file_of({"x": entry([6], 8, 32)}, bytes(24)),
    "offsets against the shape": file_of({"x": entry([5], 0, 24)}, bytes(24)),
    "overlap": file_of({"x": entry([2], 0, 8), "y": entry([2], 4, 12)}, bytes(12)),
    "hole": file_of({"x": entry([1], 0, 4), "y": entry([1], 8, 12)}, bytes(12)),
    "dtype no text": file_of({"x": entry([1], 0, 4, dtype=[3])}, bytes(4) + b"x"),
}  # fmt: skip


def test_the_undamaged_file_is_read(tmp_path):
    (tmp_path / "good").write_bytes(GOOD)
    assert {n: t.shape for n, t in read_safetensors_header(tmp_path / "good").items()} == {
        "x": (2, 3),
        "y": (1,),
    }


@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_is_noticed_before_reading(tmp_path, damage):
    (tmp_path / "model.safetensors").write_bytes(DAMAGED[damage])
    with pytest.raises(ConversionError, match=r"model\.safetensors"):
        open_weights(tmp_path)


def test_a_file_cut_while_it_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"x": np.ones(1000, np.float32)}, path)
    source = SafetensorsSource([path])
    path.write_bytes(path.read_bytes()[:-100])
    for dtype in (np.float32, np.float16):
        with pytest.raises(ConversionError, match="in the middle of x"):
            read(source, "x", dtype)
    path.unlink()
    with pytest.raises(ConversionError, match="cannot read"):
        read(source, "x", np.float32)


def test_sizes_are_exact(tmp_path):
    """Neither padding of the header nor odd shapes shift the data."""
    for shape in ((1,), (3, 5, 7), ()):
        array = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
        writer = SafetensorsWriter(tmp_path / "x", {"x": ("float32", shape)})
        writer.write("x", array)
        writer.close()
        np.testing.assert_array_equal(load_file(tmp_path / "x")["x"], array)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_conversion_names_every_tensor_that_overflows(tmp_path, quantization):
    tensors = random_tensors()
    names = [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 2)]
    for name in names:
        tensors[name][0, 0] = 7e4
    folder = write_folder(tmp_path / "hf", tensors)
    options = dict(quantization=quantization, parity=False, progress=False)
    with pytest.raises(CheckpointError, match=r"2 arrays .*float16.* or bfloat16") as info:
        convert.convert(folder, tmp_path / "out", dtype="float16", **options)
    assert all(name in str(info.value) for name in names)
    assert not (tmp_path / "out").exists()
