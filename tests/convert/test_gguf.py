"""GGUF files: tokenizers, settings, and what is refused."""

import importlib.util
import json
import shutil
from types import SimpleNamespace

import hypothesis
import numpy as np
import pytest
import tokenizers
from hypothesis import strategies as st

import convert
import s3d_jax
from convert import plan
from convert.__main__ import main
from convert.sources.gguf import tensors as gguf_tensors
from convert.sources.gguf.config import ARCHITECTURES
from convert.sources.gguf.metadata import Metadata, open_reader
from convert.sources.open import open_origin
from s3d_jax.errors import ConfigError, ConversionError
from tests.conftest import need

gguf, torch, transformers = need("gguf"), need("torch"), need("transformers")

from tests.convert.gguf_file import llama, write_gguf  # noqa: E402 (needs gguf)

TEXT = (
    "def f(x):\n\treturn x[1:3] + 12345  # it's Élan 日本語 한국어 🙂👍🏽\n\n\n"
    "   Don't STOP, I'LL go!!\r\n"
    "  1,000.50 €  ¿qué?  naïve café  \x00 <unk> x² ½ "
)
VOCABULARY = {"ggml.model": "gpt2", "ggml.pre": "gpt-2"}


@pytest.fixture
def file(tmp_path):
    write_gguf(tmp_path / "model.gguf", "llama", llama())
    return tmp_path / "model.gguf"


def convert_quietly(source, out, **options):
    return convert.convert(source, out, parity=False, progress=False, **options)


def vocabulary_of(folder):
    """The keys that llama.cpp stores for a tokenizer.json, but not its rules."""
    stored = json.loads((folder / "tokenizer.json").read_text())
    ids = dict(stored["model"]["vocab"])
    added = {token["id"]: token for token in stored["added_tokens"]}
    ids |= {token["content"]: i for i, token in added.items()}
    tokens = [token for token, _ in sorted(ids.items(), key=lambda item: item[1])]
    kinds = [1] * len(tokens)
    for i, token in added.items():
        kinds[i] = 3 if token["special"] else 4
    merges = [m if isinstance(m, str) else " ".join(m) for m in stored["model"]["merges"]]
    return {"ggml.tokens": tokens, "ggml.token_type": kinds, "ggml.merges": merges}


def special_texts(tokenizer):
    return "".join(f"{token} a " for token in tokenizer.all_special_tokens[:6])


def test_a_byte_level_tokenizer_is_that_of_its_json(data_dir, tmp_path):
    theirs = transformers.AutoTokenizer.from_pretrained(data_dir / "tokenizers" / "qwen2.5")
    folder = tmp_path / "tokenizer"
    theirs.save_pretrained(folder)
    keys = {"ggml.model": "gpt2", "ggml.pre": "qwen2", **vocabulary_of(folder)}
    eos = theirs.convert_tokens_to_ids("<|im_end|>")
    keys |= {"ggml.eos_token_id": eos, "chat_template": theirs.chat_template}
    keys |= {"chat_templates": ["rag"], "chat_template.rag": "documents"}
    model = llama(vocab_size=len(keys["ggml.tokens"]), hidden_size=32, num_hidden_layers=1)
    write_gguf(tmp_path / "model.gguf", "llama", model, "F16", tokenizer=keys)
    convert_quietly(tmp_path / "model.gguf", tmp_path / "native")
    lm = s3d_jax.load(tmp_path / "native")
    text = TEXT + special_texts(theirs)
    assert lm.tokenizer.encode(text) == theirs.encode(text)
    ids = theirs.encode(text)
    assert lm.tokenizer.decode(ids) == theirs.decode(ids)
    chat = [{"role": "user", "content": "Hi"}]
    assert lm.chat_prompt(chat) == theirs.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=False
    )
    assert lm.eos_token_ids == (eos,)
    assert lm.tokenizer.chat_template == {"default": theirs.chat_template, "rag": "documents"}


def test_a_sentencepiece_tokenizer_is_that_of_its_json(data_dir, tmp_path):
    folder = data_dir / "tokenizers" / "phi-3-mini"
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    keys = {"ggml.model": "llama", **vocabulary_of(folder)}
    del keys["ggml.merges"]  # the scores stand for them
    tokens = keys["ggml.tokens"]
    ranks = {}  # of the merge that makes a piece
    stored = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    for rank, merge in enumerate(stored):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault("".join(pair), rank)
    keys["ggml.scores"] = [float(-ranks.get(token, 1e9)) for token in tokens]
    kinds = keys["ggml.token_type"]
    for i, token in enumerate(tokens):
        if len(token) == 6 and token.startswith("<0x"):
            kinds[i] = 6
    keys |= {"ggml.bos_token_id": 1, "ggml.eos_token_id": 32000, "ggml.unknown_token_id": 0}
    keys |= {"ggml.eot_token_id": 32007, "ggml.add_bos_token": False}
    sizes = dict(vocab_size=len(tokens), hidden_size=32, num_hidden_layers=1)
    config = transformers.Phi3Config(
        **sizes, intermediate_size=32, num_attention_heads=2, pad_token_id=0
    )
    model = transformers.Phi3ForCausalLM(config)
    write_gguf(tmp_path / "model.gguf", "phi3", model, "F16", tokenizer=keys)
    convert_quietly(tmp_path / "model.gguf", tmp_path / "native")
    lm = s3d_jax.load(tmp_path / "native")
    for text in (TEXT.replace("<unk>", ""), " a", "a  b", "<|user|>Hi<|end|>\n<|assistant|>"):
        ids = theirs.encode(text).ids
        assert lm.tokenizer.encode(text) == ids
        assert lm.tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=False)
    assert lm.eos_token_ids == (32000, 32007)


def test_an_export_is_a_hf_folder(file, tmp_path):
    convert_quietly(file, tmp_path / "native")
    convert.export(tmp_path / "native", tmp_path / "hf", progress=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(model(tokens).logits, llama()(tokens).logits)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_types(kind, tmp_path):
    model = llama()
    write_gguf(tmp_path / "model.gguf", "llama", model, kind)
    report = convert_quietly(tmp_path / "model.gguf", tmp_path / "native")
    usual = {"F16": "float16", "BF16": "bfloat16"}.get(kind, "float32")
    assert report.config.dtype == usual
    assert report.stored_dtypes == tuple(sorted({"float32", usual if "F" in kind else kind}))
    embedding = s3d_jax.load(tmp_path / "native").params["embed"]["embedding"]
    np.testing.assert_array_equal(
        np.asarray(embedding, np.float32), model.model.embed_tokens.weight.detach().numpy()
    )


def test_verify(tmp_path, monkeypatch, capsys):
    """Settings and weights bit for bit, then logits; the first two without torch."""
    path, native = tmp_path / "model.gguf", tmp_path / "native"
    model = llama()
    write_gguf(path, "llama", model, "Q4_1")
    convert_quietly(path, native)
    words = ["verify", str(native), str(path)]
    assert main([*words, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["stored"] == {"num_arrays": 15, "settings": [], "arrays": {}}
    assert facts["stored_dtypes"] == ["Q4_1", "float32"] and facts["max_kl"] == 1e-6
    assert abs(facts["parity"]["kl"]) < 1e-8 and facts["parity"]["max_difference"] <= 2e-4

    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        assert main(words) == 0
        text = capsys.readouterr().out
        assert "weights the same bit for bit   15 of 15 arrays" in text
        assert "not compared: torch is not installed" in text and "agrees: of settings" in text
        for options in (dict(quantization="int8"), dict(dtype="bfloat16")):
            convert_quietly(path, native, overwrite=True, **options)
            verification = convert.verify(native, path)
            assert verification.agrees and not verification.stored.arrays

        # Another model: one weight and one setting are not those of the file.
        table = model.model.embed_tokens.weight
        with torch.no_grad():
            table[3, 0] += 1.0
        write_gguf(tmp_path / "other.gguf", "llama", model, "F32", changes={"context_length": 99})
        convert_quietly(tmp_path / "other.gguf", native, overwrite=True)
        verification = convert.verify(native, path)
        assert not verification.agrees and verification.parity is None
        assert verification.stored.arrays == {"embed/embedding": pytest.approx(1.0)}
        (setting,) = verification.stored.settings
        assert setting == "max_position_embeddings: 99, and in the file 128"
        assert main(words) == 1
        assert "embed/embedding differs: by 1.0e+00" in capsys.readouterr().out


def test_every_type_of_block(tmp_path, monkeypatch):
    """One file of all types, read a few rows at a time: the numbers that the blocks stand for."""
    kinds = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
    kinds += ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL"]
    model = llama(hidden_size=256, intermediate_size=256)  # blocks of the K types hold 256
    write_gguf(tmp_path / "model.gguf", "llama", model, kinds)
    source = open_origin(tmp_path / "model.gguf").source
    dtypes = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    stored = {tensor.dtype for name, tensor in source.tensors.items()}
    assert stored == {dtypes.get(kind, kind) for kind in kinds}
    monkeypatch.setattr(gguf_tensors, "CHUNK", 256 * 5)  # 5 rows
    state = model.state_dict()
    assert source.tensors.keys() == state.keys()
    for name, expected in state.items():
        found = np.full(tuple(expected.shape), np.nan, np.float32)
        source.read(name, found)
        np.testing.assert_array_equal(found, expected.numpy(), err_msg=name)
        assert np.std(found) > 1e-3 or found.ndim == 1
    rest = np.empty((2, 256), np.float32)
    source.read("model.layers.1.self_attn.q_proj.weight", rest, first_row=7)
    expected = state["model.layers.1.self_attn.q_proj.weight"][7:9]
    np.testing.assert_array_equal(rest, expected.numpy())


@pytest.mark.parametrize("kind", ["IQ2_XXS", "TQ1_0", "Q8_K"])
def test_another_type_of_block_is_named(kind, tmp_path, capsys):
    model = llama(hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    write_gguf(tmp_path / "model.gguf", "llama", model, ["F16", kind])
    words = rf"q_proj.weight: stored as {kind}, and supported are F32, .*Q4_1, .*Q6_K, IQ4_NL"
    with pytest.raises(ConversionError, match=words):
        convert_quietly(tmp_path / "model.gguf", tmp_path / "native")
    assert main(["inspect", str(tmp_path / "model.gguf")]) == 1
    assert f"FAULT: stored as {kind}" in capsys.readouterr().out
    assert main([str(tmp_path / "model.gguf"), str(tmp_path / "native"), "--dry-run"]) == 2
    assert not (tmp_path / "native").exists()


def test_a_type_that_the_package_does_not_know(file, tmp_path):
    whole = bytearray(file.read_bytes())
    at = whole.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 2 * 8
    whole[at : at + 4] = (4242).to_bytes(4, "little")
    (tmp_path / "new.gguf").write_bytes(whole)
    with pytest.raises(ConversionError, match=r"(?s)type.*4242.*pip install --upgrade gguf"):
        convert_quietly(tmp_path / "new.gguf", tmp_path / "native")


def test_dry_run_and_inspect_write_nothing(file, tmp_path, capsys):
    found = plan.dry_run(file, tmp_path / "native")
    assert (found.model_type, found.config.dtype) == ("llama", "float32")
    assert found.num_written == 4 * found.num_params
    assert main([str(file), str(tmp_path / "native"), "--dry-run"]) == 0
    assert main(["inspect", str(file)]) == 0
    assert "model.layers.1.mlp.up_proj.weight" in capsys.readouterr().out
    assert not (tmp_path / "native").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"new_feature": 3}, "settings that are not understood: llama.new_feature = 3"),
        ({"expert_count": 8}, "mixture of experts"),
        ({"embedding_length": None}, "has no llama.embedding_length"),
        ({"rope.scaling.type": "magic"}, "rope.scaling.type 'magic'"),
        ({"attention.head_count": 0}, "num_attention_heads"),
        ({"block_count": 2**31}, "num_hidden_layers"),
        ({"block_count": "two"}, "llama.block_count 'two', which is no size"),
        ({"attention.value_length": 8}, "keys of 16 numbers and values of 8"),
        ({"feed_forward_length": [96, 80]}, r"different llama.feed_forward_length: \[80, 96\]"),
    ],
)
def test_settings_that_are_refused(tmp_path, changes, message):
    write_gguf(tmp_path / "model.gguf", "llama", llama(), changes=changes)
    with pytest.raises((ConversionError, ConfigError), match=message):
        convert_quietly(tmp_path / "model.gguf", tmp_path / "native")
    assert not (tmp_path / "native").exists()


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"ggml.model": "gpt2", "ggml.pre": "klingon"}, "rules named 'klingon'.*--tokenizer"),
        ({"ggml.model": "gpt2"}, "rules named None"),
        ({"ggml.model": "rwkv"}, "tokenizer of kind 'rwkv'"),
        ({**VOCABULARY, "ggml.eos_token_id": 7}, "no token for eos_token"),
        ({**VOCABULARY, "ggml.merges": ["x y"]}, "a vocabulary that makes no tokenizer"),
        ({**VOCABULARY, "ggml.scores": ["x"]}, r"scores \['x'\], which is no list of numbers"),
        ({**VOCABULARY, "chat_template./tmp/x": "a"}, "name '/tmp/x'"),
    ],
)
def test_tokenizers_that_are_refused(tmp_path, keys, message):
    keys = {"ggml.tokens": ["a", "b"], "ggml.token_type": [1, 1], **keys}
    write_gguf(tmp_path / "model.gguf", "llama", llama(), tokenizer=keys)
    with pytest.raises(ConversionError, match=message):
        convert_quietly(tmp_path / "model.gguf", tmp_path / "native")
    assert not (tmp_path / "native").exists()


def test_other_files_are_refused(file, tmp_path):
    def refused(path, message):
        with pytest.raises(ConversionError, match=message):
            convert_quietly(path, tmp_path / "native")
        assert not (tmp_path / "native").exists()

    whole = file.read_bytes()
    for size in (5, 30, 400, len(whole) - 100):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        refused(tmp_path / "cut.gguf", "truncated or damaged")
    write_gguf(tmp_path / "other.gguf", "llama", llama(), extra={"blk.0.magic": np.ones(3, "f4")})
    refused(tmp_path / "other.gguf", "blk.0.magic: unknown")
    writer = gguf.GGUFWriter(tmp_path / "bert.gguf", "bert")
    writer.add_tensor("token_embd.weight", np.ones((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(tmp_path / "bert.gguf", "architecture 'bert', and supported are llama, qwen2")
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps(llama().config.to_dict()))
    refused(folder, "of a GGUF file, give its own name")


def test_without_the_package_it_is_named(file, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ConversionError, match=r"pip install 's3d-jax\[gguf\]'"):
        convert_quietly(file, tmp_path / "native")


_KEYS = {
    "general.architecture": "llama",
    **{f"llama.{name}": value for name, value in (
        ("context_length", 64), ("embedding_length", 64), ("block_count", 2),
        ("feed_forward_length", 96), ("attention.head_count", 4), ("attention.head_count_kv", 2),
        ("attention.layer_norm_rms_epsilon", 1e-5), ("rope.freq_base", 1e4),
        ("rope.dimension_count", 16), ("attention.key_length", 16), ("vocab_size", 96),
        ("attention.value_length", 16),
    )},
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["a", "b", "ab"], "tokenizer.ggml.token_type": [1, 1, 3],
    "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.eos_token_id": 1,
}  # fmt: skip
_OPTIONAL = (
    *(f"tokenizer.ggml.{key}" for key in ("bos_token_id", "padding_token_id", "unknown_token_id",
        "eot_token_id", "eom_token_id", "scores", "add_bos_token", "add_eos_token",
        "add_space_prefix")),
    *("general.type", "split.count", "tokenizer.chat_template", "tokenizer.chat_template.rag"),
)  # fmt: skip
_OPTIONAL_OF_ARCHITECTURE = (
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
    "rope.scaling.attn_factor", "rope.scale_linear", "rope.scaling.yarn_beta_fast",
    "attention.sliding_window", "attention.sliding_window_pattern", "attn_logit_softcapping",
    "rope.freq_base_swa", "embedding_scale", "logit_scale", "attention.scale", "expert_count",
)  # fmt: skip
_SCALARS = st.one_of(
    st.sampled_from([0, 1, 2, -1, 2**31, 2**63, 1e-9, 1e300, -1.5, float("nan"), float("inf")]),
    st.sampled_from(["", "none", "linear", "yarn", "llama", "gpt2", "model", "../x"]),
    st.booleans(),
)
_VALUES = st.one_of(_SCALARS, st.none(), st.lists(_SCALARS, max_size=3))


@pytest.fixture(scope="module")
def tensors(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(path, "llama", llama())
    return path


@hypothesis.settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(st.data())
def test_any_metadata_is_a_model_or_an_error(tensors, tmp_path, monkeypatch, data):
    """Keys that are missing or new, of wrong types, and absurd numbers."""
    name = data.draw(st.sampled_from(sorted(ARCHITECTURES)))
    keys = {key.replace("llama.", f"{name}."): value for key, value in _KEYS.items()}
    keys["general.architecture"] = name
    optional = (*_OPTIONAL, *(f"{name}.{key}" for key in _OPTIONAL_OF_ARCHITECTURE))
    chosen = st.lists(st.sampled_from([*keys, *optional]), min_size=1, max_size=3)
    keys |= {key: data.draw(_VALUES) for key in data.draw(chosen)}  # None: it is missing
    metadata = Metadata(tensors, {key: value for key, value in keys.items() if value is not None})
    reader = open_reader(tensors)
    monkeypatch.setattr("convert.sources.gguf.open.open_reader", lambda path: reader)
    monkeypatch.setattr(Metadata, "of", lambda path, reader: metadata)
    try:
        origin = open_origin(tensors)
        assert origin.config.head_dim > 0
        if origin.tokenizer is not None:
            origin.tokenizer.write(SimpleNamespace(folder=tmp_path))
    except (ConversionError, ConfigError) as error:
        assert str(error)
