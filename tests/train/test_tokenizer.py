"""The tokenizer of a model from scratch: trained whole or not at all, never a stale one."""

import json

import pytest

from s3d_jax.errors import ConfigError, InputError
from s3d_jax.train.tokenizer import end_token_ids, tokenizer_for, tokenizer_of_run, train_tokenizer

TEXT = "the cat sat on the mat, the dog ran to the cat. " * 3


def test_a_run_finds_its_tokenizer_again_and_no_other(tmp_path):
    texts, run = tmp_path / "texts.txt", tmp_path / "run"
    texts.write_text(TEXT)
    folder = tokenizer_of_run([texts], 270, run)
    tokenizer = tokenizer_for(folder, 270)
    ids = tokenizer("the cat")["input_ids"]
    assert len(tokenizer) == 270 and tokenizer.decode(ids[1:]) == "the cat"
    assert len(end_token_ids(tokenizer)) == 2
    assert tokenizer.eos_token_id in end_token_ids(tokenizer)
    before = (folder / "tokenizer.json").stat().st_mtime_ns
    assert tokenizer_of_run([texts], 270, run) == folder
    assert (folder / "tokenizer.json").stat().st_mtime_ns == before

    with pytest.raises(InputError, match="holds a tokenizer of 270 tokens, not 265"):
        tokenizer_of_run([texts], 265, run)
    texts.write_text(TEXT + "More.")
    with pytest.raises(InputError, match="was trained on other data"):
        tokenizer_of_run([texts], 270, run)
    (folder / "trained_on.json").unlink()
    with pytest.raises(InputError, match="of unknown origin"):
        tokenizer_of_run([texts], 270, run)


def test_a_tokenizer_appears_whole_or_not_at_all(tmp_path):
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text(json.dumps({"text": TEXT}) + "\n{")
    with pytest.raises(InputError, match="line 2 is not JSON"):
        tokenizer_of_run([wrong], 270, tmp_path / "run")
    with pytest.raises(InputError, match=r"cannot read .*none\.txt"):
        tokenizer_of_run([tmp_path / "none.txt"], 270, tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    train_tokenizer([TEXT], 270, tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def changed(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_given_tokenizer_must_fit(folder):
    with pytest.raises(InputError, match="no tokenizer at"):
        tokenizer_for(folder / "nowhere", 270)
    with pytest.raises(ConfigError, match="has 270 tokens, the model's vocab_size is 269"):
        tokenizer_for(folder, 269)
    changed(folder / "tokenizer_config.json", eos_token=None)
    with pytest.raises(InputError, match="has no end-of-text token"):
        tokenizer_for(folder, 270)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="cannot read the tokenizer in"):
        tokenizer_for(folder, 270)


def test_a_word_that_is_unknown_ends_no_text(tmp_path):
    import transformers
    from tokenizers import Tokenizer, models

    vocabulary = {"<unk>": 0, "</s>": 1, "the": 2}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")),
        eos_token="</s>",
        unk_token="<unk>",
    ).save_pretrained(tmp_path)
    tokenizer = tokenizer_for(tmp_path, 3)
    assert tokenizer.convert_tokens_to_ids("<|end|>") == 0  # the trap
    assert end_token_ids(tokenizer) == [1]
