"""Tokenizers of any kind become a tokenizer.json; a report names those that cannot be read."""

import io
import json
import shutil
import sys

import pytest
import transformers

import convert
import s3d_jax
from convert.__main__ import main
from s3d_jax.errors import ConversionError
from s3d_jax.lm import EMBEDDED
from s3d_jax.storage import native as checkpoint
from s3d_jax.storage.tokenizer import tokenizer_files
from tests.convert.hf_folder import write_folder

QUIET = dict(parity=False, progress=False)


@pytest.fixture
def sentencepiece_folder(tmp_path, data_dir):
    """stories260k as llama2.c trained it: with a SentencePiece model, without tokenizer.json."""
    folder = tmp_path / "hf"
    folder.mkdir()
    source = data_dir / "checkpoints" / "stories260k"
    for name in ("config.json", "model.safetensors", "tokenizer_config.json"):
        shutil.copy(source / name, folder)
    shutil.copy(data_dir / "llama2c" / "tok512.model", folder / "tokenizer.model")
    return folder


@pytest.mark.parametrize("settings", ["as they are", "bos not asked for", "none"])
def test_a_sentencepiece_model_becomes_a_tokenizer_json(
    tmp_path, data_dir, sentencepiece_folder, monkeypatch, settings
):
    path = sentencepiece_folder / "tokenizer_config.json"
    if settings == "bos not asked for":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"add_bos_token": False}))
    elif settings == "none":
        path.unlink()
    report = convert.convert(sentencepiece_folder, tmp_path / "out", **QUIET)
    assert report.tokenizer and report.tokenizer_problem == ""
    names = {file.name for file in tokenizer_files(tmp_path / "out")}
    assert names == {"tokenizer.json", "tokenizer.model", "tokenizer_config.json"}

    monkeypatch.setitem(sys.modules, "sentencepiece", None)  # loading does not need it
    ours = s3d_jax.load(tmp_path / "out").tokenizer
    theirs = transformers.AutoTokenizer.from_pretrained(data_dir / "checkpoints" / "stories260k")
    text = (data_dir / "text" / "tinystories_valid.txt").read_text()[:20_000]
    for line in [*text.splitlines(), "  two  spaces ", "Ein Mädchen, 日本", "a<s>b</s>"]:
        expected = theirs.encode(line)
        tokens = ours.encode(line)
        assert tokens == (expected[1:] if settings == "bos not asked for" else expected)
        assert ours.decode(tokens) == theirs.decode(tokens)


def test_vocab_and_merges_become_a_tokenizer_json(tmp_path, data_dir):
    source = data_dir / "tokenizers" / "qwen2.5"
    folder = write_folder(tmp_path / "hf")
    report = convert.convert(folder, tmp_path / "out", tokenizer=source, **QUIET)
    assert report.tokenizer and (tmp_path / "out" / "tokenizer.json").is_file()
    theirs = transformers.AutoTokenizer.from_pretrained(source)
    ours = s3d_jax.load(tmp_path / "out").tokenizer
    text = "Hello,  wörld! 123 日本 <|im_end|>\n"
    assert ours.encode(text) == theirs.encode(text)
    message = [{"role": "user", "content": "Hi"}]
    assert ours.apply_chat_template(message, tokenize=False) == theirs.apply_chat_template(
        message, tokenize=False
    )


def test_what_cannot_be_read_is_said_and_the_weights_are_converted(
    tmp_path, sentencepiece_folder, monkeypatch, capsys
):
    model = sentencepiece_folder / "tokenizer.model"
    good = model.read_bytes()
    settings = (sentencepiece_folder / "tokenizer_config.json").read_text()

    def problem(*expected: str) -> None:
        arguments = [str(sentencepiece_folder), str(tmp_path / "out"), "--no-parity", "--overwrite"]
        assert main([*arguments, "--quiet"]) == 0  # quiet hides progress, not warnings
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("warning: the tokenizer in ") and err.count("\n") == 1
        assert "token ids only" in err
        for words in expected:
            assert words in err
        assert main(arguments) == 0
        assert "no tokenizer, so it works with token ids only" in capsys.readouterr().out
        assert checkpoint.load(tmp_path / "out").header.arrays
        # The files are kept for an export.
        assert (tmp_path / "out" / "tokenizer.model").read_bytes() == model.read_bytes()

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "sentencepiece", None)
        problem("needs sentencepiece", "pip install 's3d-jax[sentencepiece]' and convert again")
    model.write_bytes(good[:1000])
    problem("tokenizer.model is damaged or no SentencePiece model", "--tokenizer")
    model.write_bytes(b"IQ== 0\nIg== 1\n")  # tiktoken's format, as in the first Llama 3 folders
    problem("tokenizer.model is damaged or no SentencePiece model", "--tokenizer")
    model.write_bytes(good)
    (sentencepiece_folder / "tokenizer_config.json").write_text(
        json.dumps(json.loads(settings) | {"tokenizer_class": "GPT2Tokenizer"})
    )
    problem("--tokenizer")  # another class would split texts differently
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    (sentencepiece_folder / "tokenizer.json").write_text("{")
    problem("tokenizer.json is damaged", "--tokenizer")


def test_settings_alone_are_no_tokenizer(tmp_path, data_dir):
    settings = data_dir / "checkpoints" / "stories260k" / "tokenizer_config.json"
    folder = write_folder(tmp_path / "hf")
    shutil.copy(settings, folder)
    report = convert.convert(folder, tmp_path / "out", **QUIET)
    assert not report.tokenizer and report.tokenizer_problem == ""
    with pytest.raises(ConversionError, match="holds no tokenizer files"):
        convert.convert(folder, tmp_path / "out2", tokenizer=folder, **QUIET)


def test_code_that_comes_with_a_tokenizer_is_never_run(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "hf")
    for file in tokenizer_files(EMBEDDED):
        shutil.copy(file, folder)
    (folder / "my.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w').close()\n")
    settings = {"auto_map": {"AutoTokenizer": ["my.Mine", None]}, "tokenizer_class": "Mine"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    stdin = io.StringIO("y\n")
    monkeypatch.setattr(sys, "stdin", stdin)
    assert convert.convert(folder, tmp_path / "out", **QUIET).tokenizer
    (folder / "tokenizer.json").rename(folder / "vocab.json")
    report = convert.convert(folder, tmp_path / "without", **QUIET)
    assert not report.tokenizer and "such code is never run" in report.tokenizer_problem
    assert stdin.tell() == 0 and not (tmp_path / "was_run").exists()


def test_tokens_that_a_class_mangles_are_a_problem(tmp_path, data_dir, monkeypatch):
    folder = write_folder(tmp_path / "hf")
    for file in tokenizer_files(data_dir / "tokenizers" / "qwen2.5"):
        shutil.copy(file, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "LlamaTokenizer"})
    )
    report = convert.convert(folder, tmp_path / "vocab", **QUIET)
    assert "correct tokenizer_class in a copy of tokenizer_config.json" in report.tokenizer_problem
    assert not report.tokenizer and not (tmp_path / "vocab" / "tokenizer.json").exists()
