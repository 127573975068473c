"""Tokenizers beside a model."""

import jax
import pytest

import s3d_jax
import s3d_jax.storage.native
from s3d_jax.nn.transformer import init_params
from tests.tiny import tiny_config, tiny_lm


@pytest.mark.parametrize("name", ["qwen2.5", "phi-3-mini"])
def test_large_tokenizers_load_in_silence_and_encode_as_before(data_dir, tmp_path, name, capfd):
    import transformers

    source = data_dir / "tokenizers" / name
    config = tiny_config()
    params = init_params(config, jax.random.key(0))
    s3d_jax.storage.native.save(tmp_path / "model", config, params, tokenizer=source)
    lm = s3d_jax.load(tmp_path / "model")
    assert "regex" not in "".join(capfd.readouterr())
    theirs = transformers.AutoTokenizer.from_pretrained(source, local_files_only=True)
    text = (data_dir / "text" / "wikitext2_valid.txt").read_text()[:50_000] + " 12345 don't \n\n 字"
    assert lm.tokenizer.encode(text) == theirs.encode(text)


@pytest.mark.parametrize(
    "file, advice",
    [("tokenizer.json", "JSONDecodeError"), ("tokenizer.model", "`pip install sentencepiece`")],
)
def test_an_unreadable_tokenizer_leaves_ids(tmp_path, monkeypatch, file, advice):
    monkeypatch.setattr("s3d_jax.storage.tokenizer.find_spec", lambda name: None)
    config = tiny_config()
    folder = s3d_jax.storage.native.save(
        tmp_path / "model", config, init_params(config, jax.random.key(0))
    )
    (folder / file).write_text("no tokenizer")
    with pytest.warns(UserWarning, match="cannot read the tokenizer.*--ids") as caught:
        lm = s3d_jax.load(folder)
    assert advice in str(caught[0].message)
    assert lm.tokenizer is None
    assert len(lm.generate([1, 2], max_new_tokens=3)[0].tokens) == 3


class Letters:
    """Writes each token as a letter, except one that is special."""

    chat_template = "{{ messages }}"

    def __init__(self, special: int) -> None:
        self.all_special_ids, self.all_special_tokens = [special], ["<|end|>"]

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        return "".join(chr(65 + i) for i in ids if i not in self.all_special_ids)

    def encode(self, text, add_special_tokens=True):
        return [(ord(c) - 65) % 31 for c in text]

    def apply_chat_template(self, messages, tokenize, add_generation_prompt=False):
        return "".join(m["content"] for m in messages)


def test_a_stop_string_may_be_a_special_token():
    """In batches, streams and chats it ends the text as an end-of-text id does."""
    lm, options = tiny_lm(), dict(max_new_tokens=12, method="ar", eos_token_ids=())
    options["frequency_penalty"] = 1.5  # else a random model repeats one token
    tokens = lm.generate([[1, 2, 3]], **options)[0].tokens
    end = next(i for i in range(4, 12) if tokens[i] not in tokens[:i])
    lm.tokenizer, stop = Letters(tokens[end]), "<|end|>"
    text = lm.tokenizer.decode(tokens[:end], True, False)
    assert len(text) == end
    stream, messages = lm.stream("BCD", stop=stop, **options), [{"role": "user", "content": "BCD"}]
    assert "".join(stream) == text
    answer = lm.conversation(stop=[stop], **options).send("BCD")
    results = lm.generate(["BCD", "BC"], stop=["never", stop], **options)
    for result in (results[0], stream.result, answer, lm.chat(messages, stop=stop, **options)):
        assert (result.tokens, result.text) == (tokens[: end + 1], text)
        assert (result.finish_reason, result.stopped_by) == ("stop", stop)
    (across,) = lm.generate("BCD", stop=text[-2:] + stop, **options)
    assert (across.text, across.stopped_by) == (text[:-2], text[-2:] + stop)
