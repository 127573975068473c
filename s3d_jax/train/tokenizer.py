"""The tokenizer of a model that is trained from scratch: a new one, or a given one."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from s3d_jax.errors import ConfigError, InputError
from s3d_jax.storage.staging import staged_folder
from s3d_jax.storage.tokenizer import read_tokenizer
from s3d_jax.texts.documents import read_texts

END = "<|endoftext|>"  # begins and ends every text
USER, ASSISTANT, END_OF_TURN = "<|user|>", "<|assistant|>", "<|end|>"

# Like Phi-3's. This small template treats "system" turns as the user's.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}<|assistant|>{% else %}<|user|>{% endif %}"
    "{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int, out: str | os.PathLike[str]) -> None:
    """Trains a byte-level BPE tokenizer, and writes its files for transformers.

    Args:
        texts: the texts to train on.
        vocab_size: V, including 256 bytes and four special tokens.
        out: the folder.

    Raises:
        InputError: a vocabulary too small for the bytes, or texts that give too few merges.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = [END, USER, ASSISTANT, END_OF_TURN]
    if vocab_size < 256 + len(special):
        raise InputError(f"vocab_size must be at least {256 + len(special)}, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if tokenizer.get_vocab_size() != vocab_size:
        raise InputError(
            f"the texts give a vocabulary of {tokenizer.get_vocab_size()} only, not {vocab_size}"
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        additional_special_tokens=special[1:],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(out)


def tokenizer_of_run(
    data: Iterable[str | os.PathLike[str]], vocab_size: int, run: str | os.PathLike[str]
) -> Path:
    """The folder of a run's own tokenizer, trained on its data; a resumed run finds it there.

    Args:
        data: .txt and .jsonl files; see `read_texts`.
        vocab_size: V.
        run: the run's folder.

    Raises:
        InputError: data that cannot be used; or the run holds a tokenizer of other data or of
            another size, which its states may depend on.
        CheckpointError: the folder cannot be written.
    """
    files = [Path(path) for path in data]
    folder = Path(run) / "tokenizer"
    origin = folder / "trained_on.json"
    wanted = {"vocab_size": vocab_size, "data_sha256": [_hash(path) for path in files]}
    if not folder.exists() or not any(folder.iterdir()):
        with staged_folder(folder) as partial:
            train_tokenizer(read_texts(files), vocab_size, partial)
            (partial / origin.name).write_text(json.dumps(wanted, indent=1), encoding="utf-8")
        return folder
    try:
        found = json.loads(origin.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if found != wanted:
        size = found.get("vocab_size") if isinstance(found, dict) else None
        what = (
            "of unknown origin"
            if size is None
            else f"of {size} tokens, not {vocab_size}"
            if size != vocab_size
            else "that was trained on other data"
        )
        raise InputError(
            f"{folder} holds a tokenizer {what}: choose another folder with --run, or remove this "
            "one"
        )
    return folder


def _hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


def tokenizer_for(folder: str | os.PathLike[str], vocab_size: int) -> Any:
    """The transformers tokenizer in a folder, for a model of this vocabulary.

    Raises:
        InputError: there is none that can be read, or it has no token that ends a text.
        ConfigError: it has ids that the model does not have.
    """
    path = Path(folder)
    if not path.is_dir():
        raise InputError(f"no tokenizer at {path}: give a folder with tokenizer files")
    tokenizer = read_tokenizer(path)
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"the tokenizer in {path} has no end-of-text token, so the model could not learn to "
            "end: name one as eos_token in its tokenizer_config.json"
        )
    size = max(tokenizer.get_vocab().values()) + 1
    if size > vocab_size:
        raise ConfigError(
            f"the tokenizer in {path} has {size} tokens, the model's vocab_size is {vocab_size}"
        )
    return tokenizer


def end_token_ids(tokenizer: Any) -> list[int]:
    """Tokens that end a text: the end of text, and the end of a turn where the tokenizer has it."""
    end_of_turn = tokenizer.get_vocab().get(END_OF_TURN)
    ends = [tokenizer.eos_token_id, *([] if end_of_turn is None else [end_of_turn])]
    return list(dict.fromkeys(ends))
