"""Reads transformers tokenizers, and names their files."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from s3d_jax.errors import InputError

# A tokenizer has at least one of the vocabularies.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
TOKENIZER_FILES = (
    *VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def tokenizer_files(folder: str | os.PathLike[str]) -> tuple[Path, ...]:
    """The tokenizer files of a native or HF folder."""
    return tuple(p for name in TOKENIZER_FILES if (p := Path(folder) / name).is_file())


def has_vocabulary(folder: str | os.PathLike[str]) -> bool:
    """Whether the folder holds a tokenizer."""
    return any((Path(folder) / name).is_file() for name in VOCABULARIES)


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """The special tokens, which are no text: id -> how it is written."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    named = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    return dict(named) | {i: token.content for i, token in added.items() if token.special}


def end_of_turn(tokenizer: Any) -> int | None:
    """The special token that the chat template writes after an answer, or None.

    Chat models end their answers with it, whether or not generation_config.json names it.
    """
    answer = "yes"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:  # a template is a program and can fail; chats report that when they use it
        return None
    _, found, end = text.rpartition(answer)
    if not found:  # the template omits answers, or changes them
        return None
    ids = tokenizer.encode(end, add_special_tokens=False)
    special = special_tokens(tokenizer)
    return next((i for i in ids if i in special), None)


def read_tokenizer(folder: str | os.PathLike[str]) -> Any:
    """The transformers tokenizer in a native or HF folder, read offline.

    Raises:
        InputError: it cannot be read.
    """
    path = Path(folder)
    # Without torch, transformers advises installing it, but nothing here needs it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    kinds = [transformers.AutoTokenizer]
    if (path / "tokenizer.json").is_file():
        # If tokenizer_config.json names no class, AutoTokenizer looks for it in HF's config.json.
        # Ours is not HF's; tokenizer.json alone is enough.
        kinds.append(transformers.PreTrainedTokenizerFast)
    # transformers looks for the model type in HF's config.json. Without this argument it therefore
    # warns about a wrong regex for each large vocabulary. Version 5.0.0 fails with the argument.
    options: tuple[dict[str, bool], ...] = ({"fix_mistral_regex": False}, {})
    reason = ""
    for kind in kinds:
        for option in options:
            try:
                return kind.from_pretrained(path, local_files_only=True, **option)
            except Exception as error:  # transformers raises most kinds for files it cannot read
                reason = f"{type(error).__name__}: {error}"
    if (path / "tokenizer.model").is_file() and not find_spec("sentencepiece"):
        reason = "tokenizer.model needs another package, `pip install sentencepiece`"
    raise InputError(f"cannot read the tokenizer in {path}: {reason}")
