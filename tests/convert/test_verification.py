"""`verify`: a checkpoint against its original, which HF transformers runs."""

import importlib.util
import json

import ml_dtypes
import numpy as np
import pytest

import convert
from convert import parity
from convert.__main__ import main
from convert.passage import PASSAGE
from s3d_jax.errors import ConfigError, ConversionError
from s3d_jax.storage.tokenizer import read_tokenizer
from tests.conftest import need
from tests.convert.hf_folder import FIELDS, random_tensors, write_folder

QUIET = dict(parity=False, progress=False)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A HF folder in bfloat16, sharded, and its conversion."""
    need("torch")
    folder = tmp_path_factory.mktemp("pair")
    tensors = random_tensors(dtype=ml_dtypes.bfloat16)
    write_folder(folder / "hf", tensors, FIELDS | {"torch_dtype": "bfloat16"}, shards=2)
    convert.convert(folder / "hf", folder / "native", **QUIET)
    return folder / "native", folder / "hf"


def test_a_conversion_agrees(pair, capsys):
    words = [str(path) for path in pair]
    assert main(["verify", *words]) == 0
    text = capsys.readouterr().out
    assert "(bfloat16) against" in text
    assert "ours in float32 against HF transformers in float32, 640 random tokens" in text
    assert "same greedy token              100.0%" in text and "agrees" in text
    assert "rounding" not in text
    assert main(["verify", *words, "--json", "--tokens", "700"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["agrees"] and facts["max_kl"] == 1e-6 and facts["stored_dtypes"] == ["bfloat16"]
    assert facts["stored"] is None and facts["parity_skipped"] == ""
    measured = facts["parity"]
    assert measured["is_text"] is False and measured["hf_rounding"] is None
    assert measured["num_tokens"] == 700 and measured["greedy_agreement"] == 1.0
    assert measured["mean_difference"] < measured["max_difference"] <= 2e-4
    assert abs(measured["kl"]) < 1e-8


@pytest.mark.parametrize(
    "field, value", [("norm_eps", 1e-3), ("rope", {"theta": 11_000.0}), ("activation", "gelu")]
)
def test_another_model_differs(pair, tmp_path, capsys, field, value):
    native = tmp_path / "wrong"
    convert.convert(pair[1], native, **QUIET)
    fields = json.loads((native / "config.json").read_text())
    fields["model"][field] = fields["model"][field] | value if field == "rope" else value
    (native / "config.json").write_text(json.dumps(fields))
    assert main(["verify", str(native), str(pair[1])]) == 1
    assert "DIFFERS" in capsys.readouterr().out


def test_rounding_is_allowed_for(pair, tmp_path):
    native = tmp_path / "float16"
    convert.convert(write_folder(tmp_path / "hf"), native, dtype="float16", **QUIET)
    for verification in (
        convert.verify(native, tmp_path / "hf"),
        convert.verify(*pair, dtype="bfloat16"),
    ):
        assert verification.max_kl == 1e-2 and verification.agrees
        assert verification.parity.kl > 1e-9
    assert not convert.verify(native, tmp_path / "hf", max_kl=1e-12).agrees


def test_hf_s_own_rounding_stands_next_to_ours(pair, monkeypatch, capsys):
    """HF's model runs in float32 and in bfloat16; in bfloat16 alone where that is what fits."""
    import torch
    import transformers

    native, source = pair
    assert main(["verify", str(native), str(source), "--dtype", "bfloat16", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)["parity"]
    assert (measured["dtype"], measured["reference"]) == ("bfloat16", "float32")
    tokens, _ = parity._tokens(native, 37, 640)
    logits = []
    for dtype in (torch.bfloat16, torch.float32):
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        with torch.inference_mode():
            logits.append(model(torch.tensor(tokens)).logits[0].float().numpy())
    rounding = measured["hf_rounding"]
    assert rounding["max_difference"] == pytest.approx(np.abs(logits[0] - logits[1]).max())
    assert rounding["kl"] > 1e-8 and 0.2 < measured["kl"] / rounding["kl"] < 5
    assert main(["verify", str(native), str(source), "--dtype", "bfloat16"]) == 0
    text = capsys.readouterr().out
    assert "ours in bfloat16 against HF transformers in float32" in text
    assert "HF's own rounding: HF in bfloat16 against HF in float32:" in text

    params = sum(x.size for x in random_tensors().values())
    room = 3 * params + parity.logits_bytes(640, 37)  # for weights of two bytes, not of four
    monkeypatch.setattr(parity, "_available_memory", lambda: room)
    measured = convert.verify(native, source, dtype="bfloat16").parity
    assert measured.reference == "bfloat16" and measured.hf_rounding is None


def test_the_tokens_are_text_where_there_is_a_tokenizer(pair, data_dir):
    folder = data_dir / "checkpoints" / "babyllama-1m"
    tokens, is_text = parity._tokens(folder, 105, 5000)
    assert is_text and tokens.shape == (1, 5000) and tokens.max() < 105
    tokenizer = read_tokenizer(folder)
    ids = tokenizer.encode(PASSAGE)
    assert 640 <= len(ids) < 5000 and tokens[0, : len(ids)].tolist() == ids
    assert tokens[0, len(ids) : 2 * len(ids)].tolist() == ids  # repeated
    for other, vocab_size in ((pair[0], 37), (folder, 50)):  # none; and one of another model
        tokens, is_text = parity._tokens(other, vocab_size, 640)
        assert not is_text and len(np.unique(tokens)) == vocab_size


def test_the_numbers_are_what_they_are_called():
    """Against the definitions, with more rows than are compared at a time."""
    rng = np.random.default_rng(0)
    q, p = rng.normal(size=(2, 70, 11)).astype(np.float32)
    measured = parity._parity(q, p)
    probabilities = [np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (q, p)]
    kl = np.sum(probabilities[1] * np.log(probabilities[1] / probabilities[0]), axis=-1)
    assert measured.kl == pytest.approx(kl.mean(), rel=1e-5)
    assert measured.max_difference == pytest.approx(np.abs(q - p).max())
    assert measured.mean_difference == pytest.approx(np.abs(q - p).mean(), rel=1e-5)
    assert measured.greedy_agreement == np.mean(q.argmax(-1) == p.argmax(-1))


def test_what_cannot_be_compared(pair, tmp_path, data_dir, monkeypatch, capsys):
    native, source = pair
    other = write_folder(tmp_path / "other", fields=FIELDS | {"vocab_size": 41})
    with pytest.raises(ConversionError, match=r"a vocabulary of 37 tokens, and .* one of 41"):
        convert.verify(native, other)
    with pytest.raises(ConversionError, match="native checkpoint: give what it was converted from"):
        convert.verify(native, native)
    with pytest.raises(ConversionError, match=r"of 37 tokens, and .*bin one of 512"):
        convert.verify(native, data_dir / "llama2c" / "stories260K.bin")
    for wrong in (dict(dtype="int8"), dict(num_tokens=0)):
        with pytest.raises(ConfigError):
            convert.verify(native, source, **wrong)
    assert main(["verify", str(source), str(source)]) == 2
    assert "a native one is needed" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(parity, "_available_memory", lambda: 10**8)
        assert main(["verify", *map(str, pair)]) == 2
        assert "--dtype bfloat16 needs half" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        assert main(["verify", *map(str, pair)]) == 2
        assert "pip install 's3d-jax[torch]'" in capsys.readouterr().err
    import transformers

    class Broken:
        @staticmethod
        def from_pretrained(*args, **options):
            raise KeyError("rope")

    monkeypatch.setattr(transformers, "AutoModelForCausalLM", Broken)
    with pytest.raises(ConversionError, match=r"cannot run .*KeyError.*another version"):
        convert.verify(native, source)
