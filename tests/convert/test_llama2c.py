"""llama2.c files give the same model as their HF folders."""

import shutil
import struct

import numpy as np
import pytest

import convert
import s3d_jax
from s3d_jax.errors import ConversionError
from s3d_jax.nn.transformer import forward_logits
from s3d_jax.storage import native as checkpoint
from s3d_jax.storage.trees import flatten

QUIET = dict(parity=False, progress=False)


def test_the_same_as_the_hf_folder(tmp_path, data_dir):
    folder = data_dir / "checkpoints" / "stories260k"
    file = data_dir / "llama2c" / "stories260K.bin"
    convert.convert(file, tmp_path / "bin", tokenizer=folder, **QUIET)
    convert.convert(folder, tmp_path / "hf", **QUIET)
    ours, theirs = (flatten(checkpoint.load(tmp_path / name).params) for name in ("bin", "hf"))
    assert ours.keys() == theirs.keys()
    for path in theirs:
        np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)
    verification = convert.verify(tmp_path / "bin", file)
    assert verification.agrees and verification.stored.num_arrays == len(ours)
    lm = s3d_jax.load(tmp_path / "bin")
    assert lm.config.max_position_embeddings == 512
    text = lm.generate("Once upon a time", max_new_tokens=20)[0].text
    assert "there was a" in text
    convert.export(tmp_path / "bin", tmp_path / "back", progress=False)
    convert.convert(tmp_path / "back", tmp_path / "again", **QUIET)
    again, hf = (checkpoint.read_header(tmp_path / name) for name in ("again", "hf"))
    assert again.arrays == hf.arrays


def test_interleaved_rotation_becomes_that_of_halves(tmp_path):
    """For a model with D 8, 2 heads, 1 key head, and an output head that is not tied."""
    dim, hidden, layers, heads, kv_heads, vocab, length = 8, 12, 2, 2, 1, 11, 16
    rng = np.random.default_rng(0)
    sizes = {
        "embed": (vocab, dim), "attention_norm": (layers, dim), "q": (layers, dim, dim),
        "k": (layers, 4, dim), "v": (layers, 4, dim), "o": (layers, dim, dim),
        "mlp_norm": (layers, dim), "gate": (layers, hidden, dim), "down": (layers, dim, hidden),
        "up": (layers, hidden, dim), "norm": (dim,), "tables": (2, length, 2), "head": (vocab, dim),
    }  # fmt: skip
    w = {name: rng.normal(0, 0.5, shape).astype("<f4") for name, shape in sizes.items()}
    header = struct.pack("<7i", dim, hidden, layers, heads, kv_heads, -vocab, length)
    (tmp_path / "x.bin").write_bytes(header + b"".join(x.tobytes() for x in w.values()))
    convert.convert(tmp_path / "x.bin", tmp_path / "out", **QUIET)
    lm = s3d_jax.load(tmp_path / "out")
    assert not lm.config.tie_embeddings and lm.tokenizer is None and lm.eos_token_ids == (1, 2)

    # llama2.c's forward pass, in float64
    tokens = rng.integers(0, vocab, 9)
    w = {name: x.astype(np.float64) for name, x in w.items()}
    x = w["embed"][tokens]

    def norm(x, scale):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale

    def rotate(x):  # neighbouring pairs, [T, heads, 4]
        angle = np.arange(9)[:, None, None] * 10000.0 ** (-np.arange(0, 4, 2) / 4)
        turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)
        return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)

    for i in range(layers):
        y = norm(x, w["attention_norm"][i])
        q = rotate((y @ w["q"][i].T).reshape(9, heads, 4))
        k = rotate((y @ w["k"][i].T).reshape(9, 1, 4))[:, 0]
        v = y @ w["v"][i].T
        scores = np.einsum("thd,sd->hts", q, k) / 2
        scores = np.where(np.tri(9, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("hts,sd->thd", weights, v).reshape(9, dim) @ w["o"][i].T
        y = norm(x, w["mlp_norm"][i])
        gate = y @ w["gate"][i].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w["up"][i].T)) @ w["down"][i].T
    logits = norm(x, w["norm"]) @ w["head"].T
    ours = forward_logits(lm.config, lm.params, np.asarray(tokens)[None])
    assert np.abs(logits).max() > 1
    assert np.abs(np.asarray(ours)[0] - logits).max() <= 1e-4


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda data: data[:20], "is truncated"),
        (lambda data: data[:-4], "is truncated or no llama2.c file"),
        (lambda data: data + b"1234", "is truncated or no llama2.c file"),
        (lambda data: struct.pack("<2i", 0x616B3432, 1) + data[8:], "format version 1"),
        (lambda data: struct.pack("<i", -64) + data[4:], "no llama2.c file"),
        (lambda data: struct.pack("<i", 63) + data[4:], "no llama2.c file"),
        (lambda data: b"PK\3\4" * 2000, "neither a GGUF nor a llama2.c file"),
    ],
)
def test_damage(tmp_path, data_dir, damage, message):
    data = (data_dir / "llama2c" / "stories260K.bin").read_bytes()
    (tmp_path / "x.bin").write_bytes(damage(data))
    with pytest.raises(ConversionError, match=message):
        convert.convert(tmp_path / "x.bin", tmp_path / "out", **QUIET)
    assert not (tmp_path / "out").exists()


def test_a_file_cut_while_it_is_read(tmp_path, data_dir):
    from convert.sources import llama2c

    shutil.copy(data_dir / "llama2c" / "stories260K.bin", tmp_path / "x.bin")
    _, source = llama2c.open_file(tmp_path / "x.bin")
    (tmp_path / "x.bin").write_bytes(b"0" * 100)
    with pytest.raises(ConversionError, match="in the middle of"):
        source.read("model.norm.weight", np.empty(64, np.float32))
