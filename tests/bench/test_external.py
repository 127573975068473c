"""Contestants from outside: llama.cpp by a stand-in, and by the real package where there is one."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

import convert
import s3d_jax
from s3d_jax.bench import external, report
from s3d_jax.errors import InputError
from s3d_jax.texts.suites import Prompt
from tests.bench.llama_cpp_stand_in import WEIGHTS, install

TEXTS = ["<s>", "a", "b", "c"]
PROMPT, CHAT = np.array([1, 2, 1]), np.array([2, 2])
PROMPTS = [Prompt("x", PROMPT), Prompt("chat", CHAT, (3,))]
NEW = {(1, 2, 1): [1, 2, 3, 2, 1, 1, 1, 1], (2, 2): [1, 2, 3, 2, 1, 1, 1, 1]}


@pytest.fixture
def lm():
    """What a contestant asks of a model, with a vocabulary of four tokens."""
    config = SimpleNamespace(vocab_size=4, num_layers=3, num_kv_heads=2, head_dim=8)
    tokenizer = SimpleNamespace(convert_ids_to_tokens=TEXTS.__getitem__)
    return SimpleNamespace(config=config, tokenizer=tokenizer, eos_token_ids=(0,))


@pytest.fixture
def file(tmp_path):
    (tmp_path / "m.gguf").touch()
    return tmp_path / "m.gguf"


def model_of(file, lm, lookup=False):
    return external.llama_cpp_model(file, lm, PROMPTS, 5, lookup=lookup)


def test_llama_cpp_is_asked_for_the_same(lm, file, monkeypatch):
    """The same ids and end, greedily, from an empty cache, with the threads of jax."""
    monkeypatch.setenv("NPROC", "1")
    calls = install(monkeypatch, TEXTS, NEW)
    contestant = external.LlamaCpp("llama.cpp", {}, lm, model_of(file, lm))
    ((_, path, options),) = calls
    assert path == str(file) and options == dict(
        n_ctx=256, n_threads=1, n_threads_batch=1, n_gpu_layers=0, logits_all=False, verbose=False
    )
    calls.clear()
    run = contestant.run(PROMPTS[0], 5)
    assert calls == [("reset",), ("generate", [1, 2, 1], 0.0)] * 2  # timed, and to the first token
    assert run.tokens == [1, 2, 3, 2, 1] and (run.decoded, run.iterations) == (4, 4)
    assert run.seconds > run.decode_seconds > 0 < run.first_seconds and run.compile_seconds == 0
    assert contestant.run(PROMPTS[1], 5).tokens == [1, 2, 3]  # with the token that ends a chat
    row = {"method": "llama.cpp", "settings": contestant.in_full()}
    assert report.label(row) == "llama.cpp Q4_K - Medium"
    install(monkeypatch, TEXTS, NEW, description=b"llama ?B (guessed) all F32")
    assert contestant.in_full() == {"dtype": "all F32"}  # of a file that does not say its type
    assert contestant.memory_bytes(PROMPTS[0], 5) == WEIGHTS + 2 * 3 * 2 * 8 * 2 * 256
    assert contestant.memory_bytes(PROMPTS[0], 254) == WEIGHTS + 2 * 3 * 2 * 8 * 2 * 512


def test_llama_cpp_with_its_prompt_lookup(lm, file, monkeypatch):
    calls = install(monkeypatch, TEXTS, NEW)
    model = model_of(file, lm, lookup=True)
    assert calls[0][2]["logits_all"] is True  # else the binding's array of logits is too small
    given = external.candidates("llama.cpp-prompt-lookup", {})
    assert given == [{"gamma": 3}, {"gamma": 10}]
    for settings in given:
        calls.clear()
        run = external.LlamaCpp("llama.cpp-prompt-lookup", settings, lm, model).run(PROMPTS[0], 5)
        drafts = [call for call in calls if call[0] == "draft"]
        # One per token here, since the stand-in accepts nothing; none after the last.
        assert run.iterations == len(drafts) == 4 and run.decoded == 4
        assert drafts[0][1:] == ([1, 2, 1, 1], settings["gamma"])


def test_settings_that_are_tried():
    assert external.candidates("hf", {"dtype": "float16"}) == [{"dtype": "float16"}]
    tried = external.candidates("hf-prompt-lookup", {"dtype": "bfloat16"})
    assert tried == [{"gamma": 3, "dtype": "bfloat16"}, {"gamma": 10, "dtype": "bfloat16"}]
    assert external.candidates("hf-prompt-lookup", {"gamma": 5}) == [{"gamma": 5}]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([*TEXTS, "d"], r"m\.gguf has a vocabulary of 5 tokens, and the model one of 4: the file"),
        (["<s>", "a", "B", "c"], r"token 2 is 'B' in .*m\.gguf, and 'b' in the model: the file"),
        (["<s>", "a", "b", "C"], r"token 3 is 'C'"),  # it only ends a chat
        (["</s>", "a", "b", "c"], r"token 0 is '</s>'"),  # it only ends a text
    ],
)
def test_the_file_of_another_model_is_refused(lm, file, monkeypatch, texts, message):
    install(monkeypatch, texts, NEW)
    with pytest.raises(InputError, match=message):
        model_of(file, lm)


def test_tokens_without_texts_are_not_compared(lm, file, monkeypatch):
    install(monkeypatch, [None] * 4, NEW)
    model_of(file, lm)
    install(monkeypatch, ["other"] * 4, NEW)
    lm.tokenizer = None
    model_of(file, lm)


def test_what_llama_cpp_needs(lm, file, monkeypatch):
    with pytest.raises(InputError, match="need the model as a GGUF file: give --gguf FILE"):
        external.check_llama_cpp(None)
    with pytest.raises(InputError, match=r"--gguf: there is no file .*none\.gguf"):
        external.check_llama_cpp(file.parent / "none.gguf")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(InputError, match=r"need llama-cpp-python \(.*\): pip install llama-cpp"):
        external.check_llama_cpp(file)
    install(monkeypatch, TEXTS, NEW)
    external.check_llama_cpp(file)
    with pytest.raises(InputError, match=r"llama\.cpp cannot read .*broken\.gguf: Failed to load"):
        model_of(file.parent / "broken.gguf", lm)


def test_the_real_llama_cpp(tmp_path):
    """Where it is installed: the tokens are ours, with and without its prompt lookup."""
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    from tests.convert.gguf_file import write_gguf
    from tests.parity.test_families import hf_model

    shape = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    shape |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    model = hf_model("llama", models={"llama": ("Llama", {})}, sizes=shape)
    for name, keys in (("ours", {}), ("theirs", {"ggml.model": "no_vocab"})):
        write_gguf(tmp_path / f"{name}.gguf", "llama", model, "F32", tokenizer=keys)
    convert.convert(tmp_path / "ours.gguf", tmp_path / "native", parity=False, progress=False)
    lm = s3d_jax.load(tmp_path / "native")
    prompt = Prompt("x", np.arange(3, 40, dtype=np.int32))
    expected = lm.generate(prompt.tokens, max_new_tokens=24, method="ar")[0].tokens
    assert len(set(expected)) > 4
    file = tmp_path / "theirs.gguf"
    for method, settings in (("llama.cpp", {}), ("llama.cpp-prompt-lookup", {"gamma": 3})):
        llama = external.llama_cpp_model(file, lm, [prompt], 24, lookup=bool(settings))
        contestant = external.LlamaCpp(method, settings, lm, llama)
        for _ in range(2):
            run = contestant.run(prompt, 24)
            assert run.tokens == expected and 1 <= run.iterations <= 23 == run.decoded
        assert contestant.in_full()["dtype"] == "all F32"
        weights = 4 * sum(x.numel() for x in model.parameters())
        cache = contestant.memory_bytes(prompt, 24) - weights
        assert cache == 2 * 2 * lm.config.num_kv_heads * 16 * 256 * 2
    with pytest.raises(InputError, match=r"llama\.cpp cannot read .*native"):
        external.llama_cpp_model(tmp_path / "native", lm, [prompt], 24, lookup=False)
