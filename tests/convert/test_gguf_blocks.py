"""GGUF blocks that are kept: the numbers of the gguf package's dequantiser, in as many bits."""

import functools
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import convert
from convert.__main__ import main
from convert.sources.gguf.blocks import KINDS, groups_of
from s3d_jax.errors import CheckpointError, ConfigError, ConversionError
from s3d_jax.lm import LM
from s3d_jax.nn.transformer import abstract_params, forward_logits, weight_bytes
from s3d_jax.settings.drafting import DraftConfig
from s3d_jax.settings.model import ModelConfig
from s3d_jax.settings.training import TrainDraftConfig
from s3d_jax.storage import native as checkpoint
from s3d_jax.storage.arrays import Overflow
from s3d_jax.storage.trees import flatten
from s3d_jax.train.runs import train_draft
from s3d_jax.weights.base import num_bytes
from s3d_jax.weights.blocks import Blocks
from s3d_jax.weights.formats import weight_format
from tests.conftest import need
from tests.tiny import tiny_config
from tests.train.test_objective import noisy_draft

gguf, torch, transformers = need("gguf"), need("torch"), need("transformers")

from tests.convert import gguf_file  # noqa: E402 (needs gguf)

MIXED = Blocks(8, 16, "float32", True)


# Widths of 256 numbers, a K block each.
llama = functools.partial(gguf_file.llama, hidden_size=256, intermediate_size=256)


def kept(tmp_path, kinds, name="model", **changes):
    """A file with matrices of these types; converted with its blocks, and to float32."""
    file = tmp_path / f"{name}.gguf"
    gguf_file.write_gguf(file, "llama", llama(**changes), kinds)
    quiet = dict(parity=False, progress=False)
    convert.convert(file, tmp_path / f"{name}-blocks", quantization="blocks", **quiet)
    convert.convert(file, tmp_path / f"{name}-float", **quiet)
    return file, tmp_path / f"{name}-blocks", tmp_path / f"{name}-float"


def as_stored(folder):
    """The tree on disk, and its config, as a GPU would hold them."""
    header = checkpoint.read_header(folder)
    return header.config, {name: checkpoint.read_group(header, name) for name in header.groups}


@pytest.mark.parametrize("name", KINDS)
def test_a_block_is_what_the_dequantiser_makes_of_it(name):
    kind = gguf.GGMLQuantizationType[name]
    packed = gguf_file.random_blocks(kind, (7, 768))
    if not name.endswith("K"):
        packed = gguf.quantize(np.random.default_rng(0).normal(size=(7, 768)), kind)
    expected, groups, own = gguf.dequantize(packed, kind), groups_of(packed, name), KINDS[name]
    for held in (own, own.joined(MIXED), own.joined(Blocks(4, 32, "float16", True))):
        arrays = held.hold(*groups)
        assert arrays[0].dtype == (ml_dtypes.int4 if held.bits == 4 else np.int8)
        np.testing.assert_array_equal(held.widen(arrays, np.float32), expected)
        rows = held.look_up(tuple(map(jnp.asarray, arrays)), jnp.asarray([5, 0]), jnp.float32)
        np.testing.assert_array_equal(rows, expected[[5, 0]])
    assert Blocks.parse(str(own)) == own


def test_bits_of_the_kinds():
    """Of a weight; the file has 8.5, 4.5, 5, 5.5, 6, 4.5, 5.5 and 6.56."""
    config = tiny_config(hidden_size=256, intermediate_size=256)
    bits = {}
    for name, kind in KINDS.items():
        one = config.replace(quantization="blocks", blocks=(f"layers_0/mlp/down {kind}",))
        linear = abstract_params(one)["layers_0"]["mlp"]["down"]
        bits[name] = num_bytes(linear) * 8 / 256**2
    assert bits == {
        "Q8_0": 8.5, "Q4_0": 4.5, "Q4_1": 5, "Q5_0": 8.5, "Q5_1": 9,
        "Q4_K": 6, "Q5_K": 10, "Q6_K": 10,
    }  # fmt: skip


@pytest.mark.parametrize(
    "kinds",
    [
        ["Q4_1"],
        ["Q8_0", "Q4_K", "Q4_K", "Q6_K"],
        ["Q4_0", "Q4_1"],
        ["Q5_K", "Q8_0", "Q6_K"],
        ["Q5_0", "Q8_0"],
        ["Q5_1", "Q5_0"],
    ],
    ids=str,
)
def test_a_model_of_blocks_is_that_of_its_floats(tmp_path, kinds):
    """Query and key rows are permuted, and parts of a fused matrix are of different types."""
    _, blocks, floats = kept(tmp_path, kinds)
    config, tree = as_stored(blocks)
    whole = checkpoint.load(floats)
    found, expected = flatten(tree), flatten(abstract_params(config))
    assert {k: (x.shape, x.dtype) for k, x in found.items()} == {
        k: (x.shape, x.dtype) for k, x in expected.items()
    }
    assert weight_bytes(config) == num_bytes(tree) < weight_bytes(whole.config) / 2
    held = checkpoint.load(blocks)  # on a CPU
    assert held.config == config.unquantized() == whole.config
    jax.tree.map(np.testing.assert_array_equal, held.params, dict(whole.params))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 96, (2, 30)), jnp.int32)
    ours = forward_logits(config, jax.device_put(tree), tokens)
    theirs = forward_logits(whole.config, whole.params, tokens)
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * float(jnp.abs(theirs).max()))


def test_four_bits_stay_four_bits(tmp_path):
    _, blocks, _ = kept(tmp_path, ["Q4_1"], vocab_size=32)
    config, tree = as_stored(blocks)
    linear = tree["layers_0"]["mlp"]["down"]
    assert linear["weight"].dtype == ml_dtypes.int4 and linear["scale"].dtype == np.float16
    assert num_bytes(linear) * 8 / 256**2 == 5
    files = sum(f.stat().st_size for f in (blocks / "weights").rglob("*") if f.is_file())
    assert files < num_bytes(tree) + 20_000
    assert isinstance(weight_format(config, "embed"), Blocks)


def test_s3d_is_plain_decoding(tmp_path):
    _, blocks, _ = kept(tmp_path, ["Q4_K", "Q6_K"])
    config, tree = as_stored(blocks)
    params, draft = jax.device_put(tree), DraftConfig((False, True), 4)
    lm = LM(config, params, draft_config=draft, draft_params=noisy_draft(config, params, draft))
    for prompt in ([5, 6, 7], list(range(20))):
        plain = lm.generate([prompt], max_new_tokens=40, method="ar")[0].tokens
        assert lm.generate([prompt], max_new_tokens=40, adaptive=False)[0].tokens == plain


def test_widened_blocks_do_not_overflow_silently(tmp_path):
    _, blocks, _ = kept(tmp_path, ["Q8_0"], vocab_size=32)
    header = checkpoint.read_header(blocks)
    tree = {name: checkpoint.read_group(header, name) for name in header.groups}
    scale = tree["layers_1"]["mlp"]["down"]["scale"]
    scale[3], tree["layers_1"]["mlp"]["down"]["weight"][3] = 60000, 2
    checkpoint.save(tmp_path / "large", header.config, tree)
    with pytest.raises(Overflow, match="layers_1/mlp/down/weight"):
        checkpoint.load(tmp_path / "large", "float16")
    whole = checkpoint.load(tmp_path / "large").params["layers_1"]["mlp"]["down"]["weight"]
    assert float(whole.max()) == 120000


def test_what_is_stored_in_blocks_is_not_trained(tmp_path):
    """Although a CPU holds it as floats."""
    _, blocks, _ = kept(tmp_path, ["Q4_0"], vocab_size=32)
    config = TrainDraftConfig(mode="full", out=tmp_path / "out")
    with pytest.raises(ConfigError, match="these are blocks: train the checkpoint"):
        train_draft(blocks, [tmp_path / "none.jsonl"], tmp_path / "run", config)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([1, 2], "blocks must be a list of texts"),
        ({"a": 1}, "blocks must be a list"),
        (["layers_9/mlp/down 4x32:float16"], "layers_9/mlp/down.*no matrix of the model"),
        (["embed 4x32:float16", "embed 8x32:float16"], "names a matrix twice"),
        (["embed 7x32:float16"], "no kind of blocks: '7x32:float16'"),
        (["embed 4x19:float16"], "4x19:float16 of embed do not divide its 256 inputs"),
    ],
)
def test_hostile_kinds_are_named(tmp_path, blocks, message):
    _, folder, _ = kept(tmp_path, ["Q4_0"], vocab_size=32)
    fields = json.loads((folder / "config.json").read_text())
    fields["model"]["blocks"] = blocks
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=f"config.json: .*{message}"):
        checkpoint.load(folder)


@pytest.mark.parametrize("kind", [Blocks(4, 32, offset=True), Blocks(4, 16), Blocks(8, 32)])
def test_matrices_of_no_file_are_rounded_to_the_nearest(kind):
    matrix = np.random.default_rng(0).normal(size=(40, 96)).astype(np.float32)
    matrix[3], matrix[4, :32] = 0, 5
    arrays = kind.store(matrix)
    groups = matrix.reshape(40, -1, kind.group)
    step = np.abs(groups).max(axis=-1) / 7 if kind.bits == 4 else np.abs(groups).max(axis=-1) / 127
    if kind.offset:
        step = (groups.max(axis=-1) - groups.min(axis=-1)) / 15
    error = np.abs(kind.widen(arrays, np.float32) - matrix).reshape(groups.shape)
    near = np.abs(groups).max(axis=-1) * 2**-8  # scales and offsets are 16-bit floats
    assert (error <= (0.501 * step + near)[..., None]).all()
    with pytest.raises(ValueError, match="do not divide 95 inputs"):
        kind.store(matrix[:, :95])
    with pytest.raises(ValueError, match="infinities or NaN"):
        kind.store(np.full((2, 96), np.nan, np.float32))


def test_gradients_reach_the_input():
    matrix = np.random.default_rng(0).normal(size=(70, 96)).astype(np.float32)
    kind = Blocks(4, 32, offset=True)
    arrays = tuple(map(jnp.asarray, kind.store(matrix)))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 96)), jnp.float32)
    whole = np.asarray(kind.widen(arrays, jnp.float32), np.float64)
    gradient = jax.grad(lambda x: jnp.sum(jnp.sin(kind.multiply(x, arrays, jnp.float32))))(x)
    expected = np.cos(np.asarray(x, np.float64) @ whole.T) @ whole
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)


def test_the_command_says_what_blocks_are(tmp_path, capsys):
    file, blocks, _ = kept(tmp_path, ["Q4_1"], vocab_size=32)
    out = str(tmp_path / "out")
    assert main([str(file), out, "--quantize", "blocks"]) == 0
    printed = capsys.readouterr().out
    assert "KL divergence 0.0e+00 nats" in printed and "rounding" not in printed
    assert main(["verify", out, str(file)]) == 0
    model = llama(vocab_size=32)
    gguf_file.write_gguf(
        tmp_path / "again.gguf", "llama", model, ["Q4_1"]
    )  # gives it the file's numbers
    model.save_pretrained(tmp_path / "theirs")
    assert main(["verify", out, str(tmp_path / "theirs")]) == 0
    assert main(["export", str(blocks), str(tmp_path / "hf"), "--quiet"]) == 0
    convert.convert(tmp_path / "hf", tmp_path / "back", parity=False, progress=False)
    back, whole = checkpoint.load(tmp_path / "back").params, checkpoint.load(blocks).params
    jax.tree.map(np.testing.assert_array_equal, back, whole)


def test_what_is_refused(tmp_path):
    def refused(kinds, message, source=None):
        if source is None:
            gguf_file.write_gguf(source := tmp_path / "model.gguf", "llama", llama(), kinds)
        with pytest.raises(ConversionError, match=message):
            convert.convert(source, tmp_path / "out", quantization="blocks", progress=False)
        assert not (tmp_path / "out").exists()

    refused("F16", "holds floats and no blocks: leave --quantize out")
    refused(["Q8_0", "F16"], "one matrix here, and some of them are floats and some are blocks")
    refused("Q2_K", r"stored as Q2_K, and the blocks that can be kept are those of Q8_0, .*Q6_K")
    gguf_file.write_gguf(tmp_path / "nan.gguf", "llama", llama(), "Q4_0")
    content = bytearray((tmp_path / "nan.gguf").read_bytes())
    content[-18:-16] = np.float16(np.nan).tobytes()
    (tmp_path / "nan.gguf").write_bytes(content)
    refused(None, r"in .*nan.gguf holds infinities or NaN", tmp_path / "nan.gguf")
    (tmp_path / "cut.gguf").write_bytes(content[:-1000])
    refused(None, "cut.gguf", tmp_path / "cut.gguf")
    llama().save_pretrained(tmp_path / "hf")
    refused(None, "is no GGUF file, and only these hold blocks", tmp_path / "hf")
    for kind in ("5x32:float16", "4x0:float16", "4x32:int8", "4x32:float16+off", "4x32"):
        config = tiny_config(quantization="blocks", blocks=(f"layers_0/mlp/down {kind}",))
        with pytest.raises(ConfigError, match="no kind of blocks"):
            weight_format(config, "embed")
    with pytest.raises(ConfigError, match="blocks belong to quantization 'blocks'"):
        tiny_config(quantization="int8", blocks=())
    with pytest.raises(ConfigError, match="which names the kind of each matrix"):
        tiny_config(quantization="blocks")
    assert ModelConfig.from_dict(config.to_dict()) == config
