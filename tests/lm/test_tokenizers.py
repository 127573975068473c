"""Tokenizers beside a model."""

import jax
import pytest

import s3d_jax
import s3d_jax.storage.native
from s3d_jax.nn.transformer import init_params
from tests.tiny import tiny_config


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
