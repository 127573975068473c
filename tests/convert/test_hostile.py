"""Broken and hostile sources: each is refused quickly, with advice, and nothing is written."""

import contextlib
import json
import os
import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import convert
from convert.plan import inspect
from convert.sources.hf_folder import open_weights
from convert.sources.open import open_origin
from convert.target import ConversionTarget
from s3d_jax.errors import ConversionError, S3DError
from tests.convert.hf_folder import FIELDS, random_tensors, write_folder
from tests.convert.refusal import refused

Damage = Callable[[Path], None]
NORM, DOWN = "model.norm.weight", "model.layers.1.mlp.down_proj.weight"
ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


# --- config.json ----------------------------------------------------------------------------------

HUGE = 10**400  # past the largest float


def linear(factor: Any) -> dict[str, Any]:
    return {"rope_type": "linear", "factor": factor}


def llama3(original: Any) -> dict[str, Any]:
    bands = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {"rope_type": "llama3", **bands, "original_max_position_embeddings": original}


SETTINGS: list[tuple[str, Any]] = [
    *(("hidden_size", value) for value in (-24, 0, 2**31, HUGE, float("nan"), True, [24], {})),
    *(("num_hidden_layers", value) for value in (-3, 0, 10**9)),
    *(("vocab_size", value) for value in (-37, 2**31 - 1, 1e9)),
    *(("intermediate_size", value) for value in (-1, 2**31 - 1)),
    *(("num_attention_heads", value) for value in (0, -4, 10**6)),
    *(("num_key_value_heads", value) for value in (0, -2)),
    *(("head_dim", value) for value in (0, -10, 10**30, HUGE, "10")),
    *(("rms_norm_eps", value) for value in (-1e-5, 0, float("inf"), HUGE)),
    *(("rope_theta", value) for value in (-1e4, 0, float("inf"), HUGE, 0.5)),
    *(("max_position_embeddings", value) for value in (-1, 0, 2**31)),
    *(("rope_scaling", linear(value)) for value in (-2.0, 0, float("inf"), HUGE)),
    *(("rope_scaling", llama3(value)) for value in (-8192, 0, 1.5, HUGE)),
    *(("eos_token_id", value) for value in (-1, 10**12, [[]], {"a": 1})),
    ("model_type", ["llama"]),
    ("x" * 10_000, "y" * 10_000),
    ("\x1b[2J", 1),
]


@pytest.mark.parametrize(
    "name, value", SETTINGS, ids=[f"{name:.30}={value!r:.20}" for name, value in SETTINGS]
)
def test_a_setting(tmp_path, name, value):
    folder = write_folder(tmp_path / "hf")
    (folder / "config.json").write_text(json.dumps(FIELDS | {name: value}))
    shown = name if name.isprintable() else repr(name)[1:-1]
    what = {"rope_theta": "theta"}.get(name, shown[:50])
    if value in (2**31 - 1, 10**6):  # possible, but not with these weights
        what = "the weights are not those of the config"
    refused(folder, tmp_path, what)


def test_many_unknown_settings(tmp_path):
    folder = write_folder(tmp_path / "hf")
    unknown = {f"unknown_{i}": 1 for i in range(100_000)}
    (folder / "config.json").write_text(json.dumps(FIELDS | unknown))
    refused(folder, tmp_path, "unknown_0 = 1", "and 99980 more")


LONGROPE = {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "head_dim": None}
LONGROPE |= {"hidden_size": 40, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"short_factor": [1.0] * 100_000}, "100000 short_factors"),
        ({"long_factor": [1.0] * 4 + [-1.0]}, "long_factor must be a number above 0"),
        ({"long_factor": [1.0] * 4 + [HUGE]}, "long_factor must be a number above 0"),
        ({"long_factor": 3}, "config.json: rope_scaling: long_factor must be a list"),
        ({"original_max_position_embeddings": 1}, "original_max_position_embeddings"),
        ({"original_max_position_embeddings": -64}, "original_max_position_embeddings"),
        ({"factor": HUGE}, "factor must be a number above 0"),
    ],
)
def test_a_setting_of_longrope(tmp_path, change, message):
    rope = {"type": "longrope", "short_factor": [1.0] * 5, "long_factor": [2.0] * 5}
    fields = FIELDS | LONGROPE | {"rope_scaling": rope | change}
    if original := change.get("original_max_position_embeddings"):
        fields |= {"original_max_position_embeddings": original}
    folder = write_folder(tmp_path / "hf")
    (folder / "config.json").write_text(json.dumps(fields))
    refused(folder, tmp_path, message)


def nested(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


CONFIG_TEXTS: dict[str, bytes] = {
    "empty": b"",
    "cut": json.dumps(FIELDS).encode()[:-20],
    "a list": b"[1, 2]",
    "null": b"null",
    "no UTF-8": b'{"model_type": "\xff"}',
    "UTF-16": json.dumps(FIELDS).encode("utf-16"),
    "binary": bytes(range(256)) * 10,
    "deep nesting": nested(100_000).encode(),
    "endless digits": b'{"hidden_size": ' + b"9" * 10_000 + b"}",
    "a field twice": json.dumps(FIELDS).encode()[:-1] + b', "hidden_size": 48}',
}


@pytest.mark.parametrize("case", CONFIG_TEXTS)
def test_a_damaged_config(tmp_path, case):
    folder = write_folder(tmp_path / "hf")
    (folder / "config.json").write_bytes(CONFIG_TEXTS[case])
    refused(folder, tmp_path, "config.json")


def replaced(name: str, make: Damage) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def sparse(size: int) -> Damage:
    def make(path: Path) -> None:
        path.touch()
        os.truncate(path, size)

    return make


NO_FILES: dict[str, Damage] = {
    "nothing": lambda path: None,
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a gigabyte of nothing": sparse(10**9),
}


@pytest.mark.parametrize("case", NO_FILES)
@pytest.mark.parametrize("name", ["config.json", INDEX, FIRST])
def test_no_file(tmp_path, name, case):
    folder = write_folder(tmp_path / "hf", shards=2)
    replaced(name, NO_FILES[case])(folder)
    lost = name == INDEX and case != "a gigabyte of nothing"
    refused(folder, tmp_path, "holds no weights" if lost else name)


# --- the index ------------------------------------------------------------------------------------


def pointing_at(file: Any) -> Damage:
    def damage(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"][DOWN] = file
        (folder / INDEX).write_text(json.dumps(index))

    return damage


def index_text(text: str) -> Damage:
    return lambda folder: (folder / INDEX).write_text(text) and None


def twice_in_the_index(folder: Path) -> None:
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.replace(f'"{DOWN}"', f'"{NORM}": "{FIRST}", "{DOWN}"'))


INDEXES: dict[str, tuple[Damage, str]] = {
    "above": (pointing_at("../elsewhere.safetensors"), "points outside of the folder"),
    "far above": (pointing_at("../" * 30 + "etc/passwd"), "points outside of the folder"),
    "absolute": (pointing_at("/etc/passwd"), "points outside of the folder"),
    "below": (pointing_at("sub/x.safetensors"), "points outside of the folder"),
    "itself": (pointing_at("."), "points outside of the folder"),
    "its parent": (pointing_at(".."), "points outside of the folder"),
    "back into the folder": (pointing_at(f"../hf/{FIRST}"), "points outside of the folder"),
    "home": (pointing_at("~/x.safetensors"), "points outside of the folder"),
    "no name": (pointing_at(""), "no .safetensors file"),
    "a number": (pointing_at(7), "no .safetensors file"),
    "null": (pointing_at(None), "no .safetensors file"),
    "a pickle": (pointing_at("x.bin"), "no .safetensors file"),
    "a long name": (pointing_at("x" * 5000 + ".safetensors"), "no such file"),
    "a zero byte": (pointing_at("x\0.safetensors"), "no such file"),
    "an escape": (pointing_at("\x1b[2J.safetensors"), "\\x1b[2J.safetensors: no such file"),
    "a tensor twice": (twice_in_the_index, f"'{NORM}' occurs twice"),
    "no object": (index_text("[]"), "must hold a JSON object"),
    "no map": (index_text("{}"), "weight_map is missing or empty"),
    "map no object": (index_text('{"weight_map": ["x"]}'), "weight_map is missing or empty"),
    "cut": (index_text('{"weight_map": {"x": "y'), "is not valid JSON"),
    "deep nesting": (index_text(nested(100_000)), "is not valid JSON"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_a_hostile_index(tmp_path, case):
    folder = write_folder(tmp_path / "hf", shards=2)
    save_file({DOWN: random_tensors()[DOWN]}, tmp_path / "elsewhere.safetensors")
    damage, message = INDEXES[case]
    damage(folder)
    refused(folder, tmp_path, INDEX, message)
    with contextlib.suppress(S3DError):  # it needs no shards, and may raise no other error
        inspect(folder)


def test_links_are_followed_as_the_hub_cache_has_them(tmp_path):
    """A link is safe, an index is not: whoever makes links can write to the folder anyway."""
    blobs = write_folder(tmp_path / "blobs", shards=2)
    folder = tmp_path / "snapshots" / "1"
    folder.mkdir(parents=True)
    for i, file in enumerate(sorted(blobs.iterdir())):
        file.rename(blobs / str(i))
        (folder / file.name).symlink_to(Path("..", "..", "blobs", str(i)))
    convert.convert(folder, tmp_path / "native", parity=False, progress=False)
    (blobs / "1").write_bytes((blobs / "1").read_bytes()[:-1])
    refused(folder, tmp_path, FIRST, "truncated")


# --- safetensors ----------------------------------------------------------------------------------


def tensors(**changes: Any) -> Damage:
    """Damages tensors: a function changes one, None removes one, an array adds one."""
    names = {"norm": NORM, "down": DOWN}

    def damage(folder: Path) -> None:
        loaded = load_file(folder / ONE)
        for short, change in changes.items():
            name = names.get(short, short)
            old = loaded.pop(name, None)
            if change is not None:
                loaded[name] = change(old) if callable(change) else change
        save_file(loaded, folder / ONE)

    return damage


def cut(count: int) -> Damage:
    def damage(folder: Path) -> None:
        data = (folder / ONE).read_bytes()
        (folder / ONE).write_bytes(data[:count])

    return damage


def patched(old: bytes, new: bytes) -> Damage:
    def damage(folder: Path) -> None:
        data = (folder / ONE).read_bytes()
        assert old in data and len(old) == len(new)
        (folder / ONE).write_bytes(data.replace(old, new, 1))

    return damage


def header(entries: dict[str, Any], data: int = 0) -> Damage:
    """A file of these entries and some zeros."""

    def damage(folder: Path) -> None:
        text = json.dumps(entries).encode()
        (folder / ONE).write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))

    return damage


def entry(shape: Any, begin: int, end: int, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def with_bit_flipped(value: float) -> Damage:
    """Flips the highest exponent bit of a scale between 1 and 2: an infinity, or NaN."""

    def flip(old: np.ndarray) -> np.ndarray:
        new = np.full_like(old, 1.5)
        new[7] = value
        new.view(np.uint32)[7] ^= 1 << 30
        return new

    return tensors(norm=flip)


def header_length(length: int) -> Damage:
    def damage(folder: Path) -> None:
        data = (folder / ONE).read_bytes()
        (folder / ONE).write_bytes(length.to_bytes(8, "little") + data[8:])

    return damage


SAFETENSORS: dict[str, tuple[Damage, str]] = {
    "empty": (cut(0), f"{ONE} is truncated"),
    "a few bytes": (cut(7), f"{ONE} is truncated"),
    "header cut": (cut(300), f"{ONE} is truncated"),
    "data cut": (cut(-1), f"{ONE} is truncated"),
    "half": (cut(20_000), f"{ONE} is truncated"),
    "header of 2^63 bytes": (header_length(2**63), f"{ONE} is truncated"),
    "header of 2^64 - 1 bytes": (header_length(2**64 - 1), f"{ONE} is truncated"),
    "header of 10 bytes": (header_length(10), f"{ONE} has a damaged header"),
    "header of no bytes": (header_length(0), f"{ONE} has a damaged header"),
    "no fields": (header({"x": []}), f"{ONE} has a damaged header"),
    "absurd shape": (header({NORM: entry([2**62] * 64, 0, 4)}, 4), "damaged header"),
    "endless shape": (header({NORM: entry([2] * 1_000_000, 0, 4)}, 4), "damaged header"),
    "size past 64 bits": (header({NORM: entry([2**70], 0, 4)}, 4), "damaged header"),
    "size of a thousand digits": (header({NORM: entry([HUGE], 0, 4)}, 4), "damaged header"),
    "offsets past 64 bits": (header({NORM: entry([1], 2**70, 2**70 + 4)}, 4), "damaged header"),
    "negative offsets": (header({NORM: entry([1], -4, 0)}, 4), "damaged header"),
    "endless name": (header({"x" * 10**6: entry([9], 0, 4)}, 4), "damaged header"),
    "endless dtype": (header({NORM: entry([9], 0, 4, "F" * 10**6)}, 4), ""),
    "dtype flipped": (patched(b'"F32"', b'"F22"'), "stored as F22"),
    "dtype narrowed": (patched(b'"F32"', b'"F16"'), "damaged header"),
    "name flipped": (patched(NORM.encode(), b"mOdel.norm.weight"), f"{NORM}: missing"),
    "name made one that is there": (
        patched(b"layers.0.mlp.up_proj", b"layers.1.mlp.up_proj"), "occurs twice",
    ),
    "shape flipped": (patched(b"[37,24]", b"[36,24]"), "damaged header"),
    "shape transposed": (patched(b"[37,24]", b"[24,37]"), "shape [24, 37], the config asks for"),
    "brace flipped": (patched(b"{", b"["), "damaged header"),
    "infinity": (with_bit_flipped(1.0), f"{NORM} in"),
    "NaN": (with_bit_flipped(1.25), "holds infinities or NaN"),
    "float64": (tensors(norm=lambda old: old.astype(np.float64)), "stored as F64"),
    "int8": (tensors(down=lambda old: old.astype(np.int8)), "stored as I8"),
    "bool": (tensors(norm=lambda old: old > 0), "stored as BOOL"),
    "8 bit floats": (tensors(norm=lambda old: old.astype(ml_dtypes.float8_e4m3fn)), "stored as F8"),
    "transposed": (tensors(down=lambda old: old.T.copy()), f"{DOWN}: shape [40, 24]"),
    "flat": (tensors(down=lambda old: old.reshape(-1)), f"{DOWN}: shape [960]"),
    "a number": (tensors(norm=np.array(1.0, np.float32)), f"{NORM}: shape []"),
    "no rows": (tensors(down=lambda old: old[:0]), f"{DOWN}: shape [0, 40]"),
    "one dimension more": (tensors(norm=lambda old: old[None]), f"{NORM}: shape [1, 24]"),
    "missing": (tensors(norm=None), f"{NORM}: missing"),
    "extra": (tensors(extra=np.zeros(3, np.float32)), "extra: unknown"),
    "a layer more": (
        tensors(**{"model.layers.3.mlp.up_proj.weight": np.zeros((40, 24), np.float32)}),
        "model.layers.3.mlp.up_proj.weight: unknown",
    ),
    "steering the terminal": (tensors(**{"\x1b[2Jx": np.zeros(3, np.float32)}), "\\x1b[2Jx"),
    "nothing in it": (header({}), "missing"),
    "100,000 tensors": (
        header({f"x{i}": entry([0], 0, 0) for i in range(100_000)}), "missing"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SAFETENSORS)
def test_hostile_safetensors(tmp_path, case):
    folder = write_folder(tmp_path / "hf")
    damage, message = SAFETENSORS[case]
    damage(folder)
    if case == "100,000 tensors":
        with pytest.raises(ConversionError, match=r"and \d+ more"):
            convert.convert(folder, tmp_path / "out", parity=False, progress=False)
    else:
        refused(folder, tmp_path, message)


def both_shards_alike(folder: Path) -> None:
    (folder / SECOND).write_bytes((folder / FIRST).read_bytes())


def shards_swapped(folder: Path) -> None:
    (folder / FIRST).rename(folder / "x")
    (folder / SECOND).rename(folder / FIRST)
    (folder / "x").rename(folder / SECOND)


def a_shard_of_another_model(folder: Path) -> None:
    save_file({"x": np.zeros(3, np.float32)}, folder / SECOND)


@pytest.mark.parametrize(
    "damage, message",
    [
        (both_shards_alike, f"in more than one file: {FIRST}, {SECOND}"),
        (a_shard_of_another_model, f"missing, and the index says that it is in {SECOND}"),
    ],
)
def test_hostile_shards(tmp_path, damage, message):
    folder = write_folder(tmp_path / "hf", shards=2)
    damage(folder)
    refused(folder, tmp_path, message)


def test_more_than_the_disk_holds(tmp_path):
    """The sparse file is consistent and takes no room; the output would not fit."""
    fields = FIELDS | {"vocab_size": 2**31 - 1}
    rows, columns = fields["vocab_size"], fields["hidden_size"]
    entries, end = {}, 0
    for name, x in random_tensors().items():
        shape = (rows, columns) if x.shape == (37, 24) else x.shape
        begin, end = end, end + 4 * int(np.prod(shape, dtype=object))
        entries[name] = entry(shape, begin, end)
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    header(entries)(folder)
    try:
        os.truncate(folder / ONE, (folder / ONE).stat().st_size + end)
    except OSError:
        pytest.skip("this file system has no sparse files of that size")
    refused(folder, tmp_path, "it needs 412.3 GB, and the disk has", "free some space")


@pytest.mark.parametrize("file", [ONE, "config.json"])
def test_random_flips_are_refused_or_harmless(tmp_path, file):
    """Flips bits of the weights' header, or of config.json; only our own errors may be raised."""
    folder = write_folder(tmp_path / "hf")
    good = (folder / file).read_bytes()
    end = 8 + int.from_bytes(good[:8], "little") if file == ONE else len(good)
    before = open_weights(folder).tensors
    rng = random.Random(0)
    for _ in range(400):
        data = bytearray(good)
        data[rng.randrange(end)] ^= 1 << rng.randrange(8)
        (folder / file).write_bytes(data)
        try:
            origin = open_origin(folder)
            ConversionTarget.of(origin).check(reading=True)
        except S3DError:
            continue
        assert origin.source.tensors == before


# --- llama2.c -------------------------------------------------------------------------------------

HEADERS = {
    "nothing": [],
    "cut": [64, 172, 5],
    "negative": [-64, 172, 5, 8, 4, 512, 512],
    "no heads": [64, 172, 5, 0, 4, 512, 512],
    "endless layers": [64, 172, 2**31 - 1, 8, 4, 512, 512],
    "all at the limit": [2**31 - 1] * 7,
    "no data": [64, 172, 5, 8, 4, 512, 512],
    "the newer format": [0x616B3432, 1, 5, 8, 4, 512, 512],
}


@pytest.mark.parametrize("case", HEADERS)
def test_hostile_llama2c_files(tmp_path, case):
    np.array(HEADERS[case], "<i4").tofile(tmp_path / "x.bin")
    with pytest.raises(S3DError, match=r"x\.bin is "):
        convert.convert(tmp_path / "x.bin", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


# --- native checkpoints, which exports read -------------------------------------------------------


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("native")
    convert.convert(write_folder(folder / "hf"), folder / "native", parity=False, progress=False)
    return folder / "native"


def setting(**changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        fields = json.loads((folder / "config.json").read_text())
        fields["model"] |= changes
        (folder / "config.json").write_text(json.dumps(fields))

    return damage


NATIVES: dict[str, tuple[Damage, str]] = {
    "vocab_size": (setting(vocab_size=10**30), "vocab_size must be at least 1 and at most"),
    "num_layers": (setting(num_layers=10**6), "num_layers must be at least 1 and at most 4096"),
    "head_dim": (setting(head_dim=2**31 - 2), "head_dim must be at least 1 and at most 65536"),
    "sliding_window": (setting(sliding_window=[HUGE] * 3), "sliding_window entries"),
    "another width": (setting(hidden_size=2**31 - 1), "does not fit its own config"),
    "nested config": (lambda folder: text(folder / "config.json"), "config.json is not valid JSON"),
    "nested index": (lambda folder: text(folder / "weights.json"), "weights.json is not valid"),
}


def text(path: Path) -> None:
    path.write_text(nested(100_000))


@pytest.mark.parametrize("case", NATIVES)
def test_hostile_native_checkpoints(tmp_path, native, case):
    shutil.copytree(native, tmp_path / "native")
    damage, message = NATIVES[case]
    damage(tmp_path / "native")
    start = time.process_time()
    with pytest.raises(S3DError, match=re.escape(message)) as caught:
        convert.export(tmp_path / "native", tmp_path / "out", progress=False)
    assert time.process_time() - start < 5 and len(str(caught.value)) < 10_000
    assert not list(tmp_path.glob("out*"))
