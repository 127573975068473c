"""The native checkpoint appears whole or not at all, and damage is noticed and named."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint
import pytest
import tensorstore

from s3d_jax.errors import CheckpointError
from s3d_jax.storage import arrays
from s3d_jax.storage import native as checkpoint
from s3d_jax.storage.staging import check_replaceable
from s3d_jax.storage.trees import flatten
from s3d_jax.weights.trees import store_tree
from tests.tiny import tiny_config, tiny_params

CONFIG = tiny_config(num_layers=2)
PARAMS = tiny_params(CONFIG)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def saved(tmp_path) -> Path:
    generation = {"eos_token_id": [2, 5], "temperature": 0.6, "bos_token_id": 1}
    source = {"name": "tiny"}
    return checkpoint.save(
        tmp_path / "model", CONFIG, PARAMS, source=source, generation_config=generation
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip_is_bit_identical(tmp_path, dtype):
    config = CONFIG.replace(dtype=dtype)
    params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    loaded = checkpoint.load(checkpoint.save(tmp_path / "model", config, params))
    assert loaded.config == config
    ours, theirs = flatten(loaded.params), flatten(params)
    assert ours.keys() == theirs.keys()
    for path in theirs:
        assert ours[path].dtype == theirs[path].dtype == dtype
        assert np.asarray(ours[path]).tobytes() == np.asarray(theirs[path]).tobytes()


def test_loading_casts_to_a_dtype(saved):
    loaded = checkpoint.load(saved, "bfloat16")
    assert loaded.config.dtype == "bfloat16" and loaded.header.config.dtype == "float32"
    embedding = loaded.params["embed"]["embedding"]
    assert embedding.dtype == "bfloat16"
    expected = PARAMS["embed"]["embedding"].astype("bfloat16")
    np.testing.assert_array_equal(np.asarray(embedding), np.asarray(expected))


def test_the_header(saved):
    header = checkpoint.read_header(saved)
    assert header.config == CONFIG and header.source == {"name": "tiny"}
    assert header.eos_token_ids == (2, 5)
    assert header.generation_config_ignored == {"temperature": 0.6}
    assert set(header.groups) == {"embed", "layers_0", "layers_1", "final_norm", "lm_head"}
    assert header.arrays["embed/embedding"].shape == (31, 24)
    assert not header.has_tokenizer
    (saved / "tokenizer_config.json").write_text("{}")
    assert not checkpoint.read_header(
        saved
    ).has_tokenizer  # settings without a vocabulary are no tokenizer
    (saved / "tokenizer.json").write_text("{}")
    assert checkpoint.read_header(saved).has_tokenizer


# --- wrong and damaged folders --------------------------------------------------------------------


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_wrong_folders(saved, tmp_path, data_dir):
    hf = data_dir / "checkpoints" / "babyllama-1m"
    (tmp_path / "empty").mkdir()
    messages = {
        tmp_path / "nowhere": "no such folder",
        saved / "config.json": "is a file",
        tmp_path / "empty": "is not a native checkpoint",
        hf: f"s3d-convert {hf} babyllama-1m-s3d",
    }
    for path, message in messages.items():
        with pytest.raises(CheckpointError, match=re.escape(message)):
            checkpoint.load(path)


def test_an_adapter_is_not_left_out_in_silence(saved, tmp_path):
    (saved / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"next to a model.*\n(.*\n)*.*merge_and_unload"):
        checkpoint.load(saved)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/model"}')
    with pytest.raises(CheckpointError, match=r"adapter .* and no model\. (.*\n)*.*'owner/model'"):
        checkpoint.read_header(tmp_path)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda d: edit(d / "config.json", version=1), "format version 1"),
        (lambda d: edit(d / "config.json", model={}), "missing fields"),
        (lambda d: edit(d / "config.json", model=3), "expected a JSON object"),
        (
            lambda d: edit(d / "config.json", model=CONFIG.replace(vocab_size=32).to_dict()),
            r"embed/embedding: shape \(31, 24\), expected \(32, 24\)",
        ),
        (lambda d: (d / "config.json").unlink(), "it has no config.json"),
        (lambda d: (d / "config.json").write_text("{"), "not valid JSON"),
        (lambda d: (d / "weights.json").unlink(), "it has no weights.json"),
        (lambda d: (d / "weights.json").write_text("[]"), "must hold a JSON object"),
        (lambda d: (d / "weights.json").write_text('{"a": {}}'), r"weights\.json is damaged"),
        (lambda d: (d / "weights.json").write_text("{}"), "embed/embedding: missing"),
        (lambda d: edit(d / "generation_config.json", eos_token_id=31), "eos_token_id 31"),
        (
            lambda d: (d / "weights" / "manifest.ocdbt").unlink(),
            "layers_1/mlp/down/weight: missing from the folder weights",
        ),
    ],
)
def test_damage_is_named_without_reading_the_weights(saved, damage, message):
    damage(saved)
    with pytest.raises(CheckpointError, match=message):
        _ = checkpoint.read_header(saved).eos_token_ids


def stored_files(folder: Path) -> list[Path]:
    """The files of the store without orbax's description of the tree."""
    files = (folder / "weights").rglob("*")
    return sorted(p for p in files if p.is_file() and p.name != "_METADATA")


def test_every_damaged_array_is_named(tmp_path):
    """One bit of each array is flipped in turn."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), PARAMS)
    saved = checkpoint.save(tmp_path / "model", CONFIG, params)
    data = max(stored_files(saved), key=lambda file: file.stat().st_size)
    good = data.read_bytes()
    assert len(flatten(params)) == 15
    for path, array in flatten(params).items():
        raw = array.tobytes()
        flipped = bytearray(good)
        flipped[good.index(raw) + rng.integers(len(raw))] ^= 1 << int(rng.integers(8))
        data.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=f"{path} in .*weights is damaged"):
            checkpoint.load(saved)
    data.write_bytes(good)
    checkpoint.load(saved)


def test_a_damaged_file_gives_an_error_or_the_right_values(saved):
    """Of every file of the store: some bits flipped, the end cut off, the file gone."""
    rng = np.random.default_rng(0)
    noticed = []
    for file in stored_files(saved):
        good = file.read_bytes()
        for damage in [*range(40), "end", "gone"]:
            flipped = bytearray(good)
            flipped[rng.integers(len(good))] ^= 1 << int(rng.integers(8))
            file.write_bytes(good[:-3] if damage == "end" else flipped)
            if damage == "gone":
                file.unlink()
            try:
                loaded = checkpoint.load(saved)
            except CheckpointError as error:
                assert "weights" in str(error)
                noticed.append(damage)
            else:  # not every bit counts, such as the fill values in zarr's metadata
                jax.tree.map(np.testing.assert_array_equal, loaded.params, PARAMS)
        file.write_bytes(good)
    assert noticed.count("gone") == noticed.count("end") == len(stored_files(saved)) == 2
    assert len(noticed) > 0.9 * 2 * 42
    checkpoint.load(saved)


def test_a_store_is_an_orbax_checkpoint(saved):
    with orbax.checkpoint.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore((saved / "weights").absolute())
    jax.tree.map(np.testing.assert_array_equal, restored, PARAMS)


def test_few_files_whatever_the_number_of_layers(tmp_path):
    config = tiny_config(num_layers=40)
    folder = checkpoint.save(tmp_path / "model", config, tiny_params(config))
    assert sum(file.is_file() for file in folder.rglob("*")) <= 8
    traces = [str(tmp_path).encode(), b"partial-"]  # of the place where it was written
    for file in folder.rglob("*"):
        assert file.is_dir() or not any(trace in file.read_bytes() for trace in traces)


def test_arrays_are_written_in_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "_BATCH_BYTES", 1)
    checkpoint.save(tmp_path / "model", CONFIG, PARAMS)
    assert len(stored_files(tmp_path / "model")) == 6  # one per group, and the manifest
    loaded = checkpoint.load(tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, PARAMS)


def test_the_format_with_files_per_array_is_read(saved):
    """Format version 2: an orbax checkpoint without OCDBT for each group."""
    shutil.rmtree(saved / "weights")
    for name, group in PARAMS.items():
        handler = orbax.checkpoint.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True)
        tree = jax.tree.map(np.asarray, group)
        with orbax.checkpoint.Checkpointer(handler) as checkpointer:
            checkpointer.save(
                (saved / "weights" / name).absolute(), args=orbax.checkpoint.args.PyTreeSave(tree)
            )
    edit(saved / "config.json", version=2)
    jax.tree.map(np.testing.assert_array_equal, checkpoint.load(saved).params, PARAMS)
    shutil.rmtree(saved / "weights" / "layers_1" / "mlp.down.weight")
    with pytest.raises(CheckpointError, match="  layers_1/mlp/down/weight: missing"):
        checkpoint.load(saved)


def test_int8_of_older_formats_is_the_plain_one(tmp_path):
    """Format version 4 gave the name to the rotated one."""
    config = CONFIG.replace(quantization="int8-plain")
    params = store_tree(config, PARAMS)
    checkpoint.save(tmp_path / "model", config, params)
    fields = json.loads((tmp_path / "model" / "config.json").read_text())
    assert fields["version"] == 4
    old = fields["model"] | {"quantization": "int8"}
    for version, name in ((4, "int8"), (3, "int8-plain")):
        edit(tmp_path / "model" / "config.json", model=old, version=version)
        assert checkpoint.load(tmp_path / "model").config == config.replace(quantization=name)


# --- writing --------------------------------------------------------------------------------------


def test_a_cast_that_overflows_is_refused(tmp_path):
    params = jax.tree.map(lambda x: x, PARAMS)
    params["embed"] = {"embedding": 1e6 * PARAMS["embed"]["embedding"]}
    checkpoint.save(tmp_path / "model", CONFIG, params)
    with pytest.raises(CheckpointError, match="embed/embedding holds values too large for float16"):
        checkpoint.load(tmp_path / "model", "float16")
    checkpoint.load(tmp_path / "model", "bfloat16")


def test_what_exists_is_not_overwritten(saved, tmp_path):
    with pytest.raises(CheckpointError, match="--overwrite"):
        checkpoint.save(saved, CONFIG, PARAMS)
    double = jax.tree.map(lambda x: 2 * x, PARAMS)
    checkpoint.save(saved, CONFIG, double, overwrite=True)
    loaded = checkpoint.load(saved)
    np.testing.assert_array_equal(
        loaded.params["final_norm"]["scale"], double["final_norm"]["scale"]
    )
    assert loaded.header.source == {}
    assert os.listdir(tmp_path) == ["model"]
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.jpg").write_text("miaow")
    (photos / "config.json").write_text('{"editor": "vim"}')  # other programs use this name, too
    with pytest.raises(CheckpointError, match="is no checkpoint that"):
        checkpoint.save(photos, CONFIG, PARAMS, overwrite=True)
    assert (photos / "cat.jpg").exists()


@pytest.mark.parametrize("error", [RuntimeError("mine"), KeyboardInterrupt()])
def test_an_error_leaves_nothing_new(saved, tmp_path, error):
    before = {p: p.read_bytes() for p in saved.rglob("*") if p.is_file()}
    for out in (tmp_path / "new", saved):
        with (
            pytest.raises(type(error)),
            checkpoint.checkpoint_writer(out, CONFIG, overwrite=True) as writer,
        ):
            writer.write_group("embed", PARAMS["embed"])
            assert len(os.listdir(tmp_path)) == 2
            raise error
        assert os.listdir(tmp_path) == ["model"]
    assert {p: p.read_bytes() for p in saved.rglob("*") if p.is_file()} == before


def test_parameters_that_do_not_fit(tmp_path):
    out = tmp_path / "out"
    wrong = {**PARAMS, "final_norm": {"scale": np.zeros(25, np.float32)}}
    half = {**PARAMS, "lm_head": {"weight": PARAMS["lm_head"]["weight"].astype("bfloat16")}}
    less = {k: v for k, v in PARAMS.items() if k != "layers_1"}
    more = {**PARAMS, "layers_2": PARAMS["layers_1"]}
    for params, message in (
        (wrong, r"final_norm/scale: shape \(25,\), expected \(24,\)"),
        (half, "lm_head/weight: bfloat16, the model has float32"),
        (less, r"missing:\n  layers_1/"),
        (more, "layers_2/.*: unknown"),
    ):
        with pytest.raises(CheckpointError, match=message):
            checkpoint.save(out, CONFIG, params)
        assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="exists and is not a folder"):
        checkpoint.save(tmp_path / "file", CONFIG, PARAMS)
    with pytest.raises(CheckpointError, match="is a file, not a folder"):
        checkpoint.save(tmp_path / "file" / "model", CONFIG, PARAMS)
    # Refused before a long computation as well.
    with pytest.raises(CheckpointError, match="is a file, not a folder"):
        check_replaceable(tmp_path / "file" / "more" / "model", overwrite=True)
    with monkeypatch.context() as patched:
        patched.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
        with pytest.raises(CheckpointError, match=r"cannot write .*new.x: no permission"):
            check_replaceable(tmp_path / "new" / "x", overwrite=False)
    with pytest.raises(CheckpointError, match="the path is too long"):
        checkpoint.save(tmp_path / ("x" * 300), CONFIG, PARAMS)
    with (
        pytest.raises(CheckpointError, match=r"it needs 1000000000\.0 GB, and the disk has"),
        checkpoint.checkpoint_writer(tmp_path / "out", CONFIG, needs=10**18),
    ):
        raise AssertionError("not reached")

    def forbidden(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", forbidden)  # in CI the superuser can write anywhere
    with pytest.raises(CheckpointError, match="no permission to write there"):
        checkpoint.save(tmp_path / "out", CONFIG, PARAMS)
    assert os.listdir(tmp_path) == ["file"]


FILLED_DISK = """
import resource, signal, sys
from s3d_jax.storage import native as checkpoint
from s3d_jax.storage.trees import flatten
from s3d_jax.errors import CheckpointError
from tests.tiny import tiny_config, tiny_params
config = tiny_config(num_layers=2, hidden_size=200)
params = tiny_params(config)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    checkpoint.save(sys.argv[1], config, params)
except CheckpointError as error:
    print(error)
"""


def test_a_write_that_fails_in_the_middle(tmp_path):
    """The kernel refuses to write (here: the size of files is limited)."""
    done = subprocess.run(
        [sys.executable, "-c", FILLED_DISK, tmp_path / "out"], capture_output=True, text=True,
        cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"cannot write {tmp_path / 'out'}: File too large")
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_explained(tmp_path, monkeypatch):
    real = Path.write_text

    def full(self, *args, **kwargs):
        if self.name == "weights.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        checkpoint.save(tmp_path / "out", CONFIG, PARAMS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "raised, shown, message",
    [
        (ValueError("x os_error_code='13' y"), CheckpointError, "Permission denied$"),
        (ValueError("x os_error_code='2' y"), CheckpointError, "convert the model again"),
        (AssertionError("not of the file"), AssertionError, "not of the file"),
        (MemoryError("not of the file"), MemoryError, "not of the file"),
    ],
)
def test_only_damage_is_blamed_on_the_files(saved, monkeypatch, raised, shown, message):
    def refuse(*_, **__):
        raise raised

    monkeypatch.setattr(tensorstore, "open", refuse)
    with pytest.raises(shown, match=message):
        checkpoint.load(saved)
