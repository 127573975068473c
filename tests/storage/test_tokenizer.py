"""Tokenizers as people have them: read by tokenizer.json, whatever else the folder says."""

import io
import json
import shutil
import sys

import pytest
import transformers
from tokenizers import Tokenizer, pre_tokenizers

import convert
from s3d_jax.errors import InputError
from s3d_jax.lm import EMBEDDED
from s3d_jax.storage import native
from s3d_jax.storage.tokenizer import end_of_turn, read_tokenizer, special_tokens, tokenizer_files
from tests.tiny import tiny_config, tiny_lm, tiny_params

TEXT = "hello world,  日本\n<|user|> hi <|end|>"


@pytest.fixture
def folder(tmp_path):
    """The tokenizer of the package, which is byte-level."""
    for file in tokenizer_files(EMBEDDED):
        shutil.copy(file, tmp_path)
    return tmp_path


def change_settings(folder, **changes):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def add_code(folder):
    """Names a class whose file leaves a trace when it is run."""
    (folder / "tokenization_my.py").write_text(f"open({str(folder / 'was_run')!r}, 'w').close()\n")
    settings = {"AutoTokenizer": ["tokenization_my.MyTokenizer", None]}
    change_settings(folder, auto_map=settings, tokenizer_class="MyTokenizer")


def mangles(kind):
    """A stand-in for a class that rebuilds its pre-tokenizer, as transformers 5.3's Llama does."""

    class Mangling:
        @staticmethod
        def from_pretrained(*args, **options):
            tokenizer = kind.from_pretrained(*args, **options)
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
            return tokenizer

    return Mangling


def test_code_of_a_folder_is_neither_run_nor_asked_about(folder, monkeypatch, capsys):
    add_code(folder)
    (folder / "config.json").write_text('{"auto_map": {"AutoConfig": "tokenization_my.C"}}')
    stdin = io.StringIO("y\ny\n")
    monkeypatch.setattr(sys, "stdin", stdin)
    tokenizer = read_tokenizer(folder)
    expected = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids
    assert tokenizer.encode(TEXT) == expected
    assert tokenizer.chat_template == read_tokenizer(EMBEDDED).chat_template
    vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(InputError, match="such code is never run: get a folder with a tokenizer"):
        read_tokenizer(folder)
    assert not (folder / "was_run").exists()
    assert stdin.tell() == 0 and capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "GemmaTokenizer", "Nobody"])
def test_the_class_in_the_settings_does_not_change_the_tokens(folder, monkeypatch, name):
    change_settings(folder, tokenizer_class=name)
    for kind in ("AutoTokenizer", "LlamaTokenizer", "LlamaTokenizerFast"):
        monkeypatch.setattr(f"transformers.{kind}", mangles(transformers.PreTrainedTokenizerFast))
    tokenizer = read_tokenizer(folder)
    tokens = tokenizer.encode(TEXT)
    assert tokens == Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids
    assert tokenizer.decode(tokens) == f"<|endoftext|>{TEXT}"
    assert tokenizer.special_tokens_map == read_tokenizer(EMBEDDED).special_tokens_map


def test_other_tokens_than_those_of_tokenizer_json_are_an_error(folder, monkeypatch):
    kind = mangles(transformers.PreTrainedTokenizerFast)
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast", kind)
    with pytest.raises(InputError, match=r"splits a text otherwise than .*install another version"):
        read_tokenizer(folder)


def test_special_tokens_that_only_the_class_names(tmp_path, data_dir):
    shutil.copy(data_dir / "checkpoints" / "stories260k" / "tokenizer.json", tmp_path)
    settings = {"tokenizer_class": "LlamaTokenizer", "unk_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.special_tokens_map == {"bos_token": "<s>", "eos_token": "</s>"}
    assert tokenizer.encode("a</s>")[-1] == tokenizer.eos_token_id == 2
    assert tokenizer.decode([2], skip_special_tokens=True) == ""


def add_templates(folder):
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("documents")


@pytest.mark.parametrize("main", ["chat_template.jinja", "settings", "list", "none"])
def test_named_chat_templates(folder, main):
    add_templates(folder)
    default = folder / "chat_template.jinja"
    if main != default.name:
        text = default.read_text()
        default.unlink()
        listed = [{"name": "default", "template": text}, {"name": "rag", "template": "old"}]
        change_settings(folder, chat_template={"settings": text, "list": listed}.get(main))
    tokenizer = read_tokenizer(folder)
    question = [{"role": "user", "content": "Hi"}]
    rag = tokenizer.apply_chat_template(question, chat_template="rag", tokenize=False)
    assert rag == "documents"
    lm = tiny_lm()
    lm.tokenizer = tokenizer
    if main == "none":
        with pytest.raises(InputError, match=r"templates for rag and no default: choose one by"):
            lm.chat_prompt(question)
        lm.tokenizer.chat_template = lm.tokenizer.chat_template["rag"]
        assert lm.chat_prompt(question) == tokenizer.encode("documents", add_special_tokens=False)
    else:
        expected = "<|endoftext|><|user|>Hi<|end|><|assistant|>"
        assert tokenizer.decode(lm.chat_prompt(question)) == expected


def test_templates_in_a_folder_are_copied_with_the_tokenizer(folder, tmp_path_factory):
    add_templates(folder)
    (folder / "additional_chat_templates" / "notes.txt").write_text("no template")
    config, out = tiny_config(), tmp_path_factory.mktemp("native")
    native.save(out / "model", config, tiny_params(config), tokenizer=folder)
    convert.export(out / "model", out / "hf", progress=False)
    for copy in (out / "model", out / "hf"):
        (file,) = (copy / "additional_chat_templates").iterdir()
        assert file.name == "rag.jinja" and file.read_text() == "documents"
        assert set(read_tokenizer(copy).chat_template) == {"default", "rag"}


def test_a_token_that_ends_turns_ends_chats_though_it_is_not_special(folder):
    path = folder / "tokenizer.json"
    fields = json.loads(path.read_text())
    for token in fields["added_tokens"]:
        token["special"] &= token["content"] != "<|end|>"
    path.write_text(json.dumps(fields))
    change_settings(folder, extra_special_tokens=["<|user|>", "<|assistant|>"])
    tokenizer = read_tokenizer(folder)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert end_of_turn(tokenizer) == end and end in special_tokens(tokenizer)
    assert tokenizer.decode([40, end], skip_special_tokens=True) == tokenizer.decode([40])
    # Spaces and line breaks, which some tokenizers add too, end nothing.
    tokenizer = read_tokenizer(EMBEDDED)
    tokenizer.add_tokens(["\n", "</s>"])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n</s>{% endfor %}"
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("</s>")
