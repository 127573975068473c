"""Reads transformers tokenizers, and names their files."""

import inspect
import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from s3d_jax.errors import CheckpointError, InputError

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
TEMPLATES = "additional_chat_templates/*.jinja"  # named ones, for tools or documents
NO_CODE = {"trust_remote_code": False}  # else transformers asks on the terminal whether to run it
NEEDS_CODE = (
    "its settings name a class whose code comes with it, and such code is never run: get a folder "
    "with a tokenizer.json, which is enough without the class"
)
_MANGLED = (
    "transformers {} splits a text otherwise than tokenizer.json says, and the model would see "
    "other tokens than in its training: install another version of transformers"
)
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")

# Prose, code, digits, scripts without spaces, emoji of several code points, and runs of spaces.
_PROBE = (
    "Hello,  world! It's 12345.67, don't SHOUT.\n\n\tdef f(x_1):\n        return x_1**2 != 0\r\n"
    " 日本語の文章 한국어 Привет u\u0308üné 🙂👩\u200d💻   "
)


def tokenizer_files(folder: str | os.PathLike[str]) -> tuple[Path, ...]:
    """The tokenizer files of a native or HF folder."""
    path = Path(folder)
    files = (*(path / name for name in TOKENIZER_FILES), *sorted(path.glob(TEMPLATES)))
    return tuple(file for file in files if file.is_file())


def copy_tokenizer(folder: str | os.PathLike[str], out: Path) -> None:
    """Copies the tokenizer files of a folder, if it has any, to the same places in `out`.

    Raises:
        CheckpointError: one cannot be read.
    """
    for file in tokenizer_files(folder):
        try:
            data = file.read_bytes()
        except OSError as error:
            raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
        copy = out / file.relative_to(folder)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(data)


def has_vocabulary(folder: str | os.PathLike[str]) -> bool:
    """Whether the folder holds a tokenizer."""
    return any((Path(folder) / name).is_file() for name in VOCABULARIES)


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """The special tokens, which are no text: id -> how it is written."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    named = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    return dict(named) | {i: token.content for i, token in added.items() if token.special}


def end_of_turn(tokenizer: Any) -> int | None:
    """The special or added token that the chat template writes after an answer, or None.

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
    ends = {*special_tokens(tokenizer), *_plain_added(tokenizer)}
    return next((i for i in ids if i in ends), None)


def _plain_added(tokenizer: Any) -> dict[int | None, Any]:
    """Tokens that were added without being special, except for spaces and line breaks."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {i: t for i, t in added.items() if not t.special and t.content.strip()}


def read_tokenizer(folder: str | os.PathLike[str]) -> Any:
    """The transformers tokenizer in a native or HF folder, read offline.

    Code that comes with a folder is never run. A tokenizer.json is enough without it.

    Raises:
        InputError: it cannot be read, or splits texts otherwise than its tokenizer.json says.
    """
    path = Path(folder)
    # Without torch, transformers advises installing it, but nothing here needs it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    file = path / "tokenizer.json"
    reference = _read_json(file) if file.is_file() else None
    kinds: list[Any] = [transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast]
    if reference is None:
        kinds = kinds[:1]
    elif not _is_sentencepiece(reference):
        # The class that tokenizer_config.json names may rebuild what tokenizer.json holds, in
        # another way. The generic class takes it as it is. But a SentencePiece class also knows
        # whether the text after a special token begins with a space, which settings ("legacy") say.
        kinds = kinds[1:]
    # transformers looks for the model type in HF's config.json. Without this argument it therefore
    # warns about a wrong regex for each large vocabulary. Version 5.0.0 fails with the argument.
    options: tuple[dict[str, bool], ...] = ({"fix_mistral_regex": False}, {})
    reason = ""
    for kind in kinds:
        for option in options:
            try:
                tokenizer = kind.from_pretrained(path, local_files_only=True, **NO_CODE, **option)
                if reference is None or _agrees(tokenizer, reference):
                    _name_special_tokens(tokenizer, path)
                    _keep_templates(tokenizer, path)
                    _make_end_of_turn_special(tokenizer)
                    return tokenizer
                reason = _MANGLED.format(transformers.__version__)
                reference = _read_json(file)  # without the tokens that this class has added
            except Exception as error:  # transformers raises most kinds for files it cannot read
                reason = f"{type(error).__name__}: {error}"
    if reference is None and needs_code(path):
        reason = NEEDS_CODE
    elif (path / "tokenizer.model").is_file() and not find_spec("sentencepiece"):
        reason = "tokenizer.model needs another package, `pip install sentencepiece`"
    raise InputError(f"cannot read the tokenizer in {path}: {reason}")


def _read_json(file: Path) -> Any:
    """The tokenizer that tokenizer.json alone describes.

    Raises:
        InputError: it is damaged, or too new for the installed package.
    """
    import tokenizers

    try:
        text = file.read_text(encoding="utf-8")
        json.loads(text)  # whose errors say what is wrong, and where
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises no other kind
        raise InputError(
            f"cannot read the tokenizer in {file.parent}: {file.name} is damaged or too new "
            f"({type(error).__name__}: {error})"
        ) from error
    tokenizer.no_truncation()  # it holds for batches; transformers sets it per call
    tokenizer.no_padding()
    return tokenizer


def needs_code(folder: Path) -> bool:
    """Whether the tokenizer's settings name a class whose code comes with the folder."""
    return "auto_map" in _settings(folder)


def _settings(folder: Path) -> dict[str, Any]:
    """The fields of tokenizer_config.json; none if they cannot be read."""
    try:
        fields = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _name_special_tokens(tokenizer: Any, folder: Path) -> None:
    """Names the special tokens that settings leave out, since they are their class's defaults."""
    import transformers

    settings = _settings(folder)
    try:
        kind = getattr(transformers, str(settings.get("tokenizer_class")), None)
    except ImportError:  # the class needs a package that is not installed
        return
    if not isinstance(kind, type):
        return
    vocabulary = tokenizer.get_vocab()
    for name, parameter in inspect.signature(kind).parameters.items():
        is_free = name in _SPECIAL_TOKENS and name not in settings
        if is_free and getattr(tokenizer, name) is None and parameter.default in vocabulary:
            tokenizer.add_special_tokens({name: parameter.default})


def _keep_templates(tokenizer: Any, folder: Path) -> None:
    """Adds the templates of the settings, which transformers drops where files have others."""
    templates, others = tokenizer.chat_template, _settings(folder).get("chat_template")
    if isinstance(templates, dict) and others:
        if isinstance(others, str):
            others = [{"name": "default", "template": others}]
        tokenizer.chat_template = {t["name"]: t["template"] for t in others} | templates


def _make_end_of_turn_special(tokenizer: Any) -> None:
    """Makes the token that ends an answer a special one, which is no part of the answer's text."""
    plain = _plain_added(tokenizer)
    end = end_of_turn(tokenizer) if plain else None  # rendering costs some time
    if end in plain:
        plain[end].special = True
        tokenizer.add_tokens([plain[end]], special_tokens=True)


def _is_sentencepiece(reference: Any) -> bool:
    """Whether spaces are ▁ in the vocabulary; a byte-level one has another letter for them."""
    return reference.token_to_id("▁") is not None


def _agrees(tokenizer: Any, reference: Any) -> bool:
    """Whether a transformers tokenizer splits a text as its tokenizer.json does.

    Takes over what tokenizer.json puts around a text: some versions of transformers replace it, by
    add_bos_token and add_eos_token.
    """
    if reference.post_processor is not None:
        tokenizer.backend_tokenizer.post_processor = reference.post_processor
    reference.encode_special_tokens = tokenizer.backend_tokenizer.encode_special_tokens
    added = [token for _, token in sorted(tokenizer.added_tokens_decoder.items())]
    reference.add_tokens(added)  # settings may add some to the file's
    ours, theirs = tokenizer.encode(_PROBE), reference.encode(_PROBE).ids
    text = "".join(f"{token.content}a {token.content} b" for token in added)
    between, expected = tokenizer.encode(text, verbose=False), reference.encode(text).ids
    if _is_sentencepiece(reference):  # of these, the class chooses what is between the tokens
        ids = set(tokenizer.added_tokens_decoder)
        between, expected = ([i for i in row if i in ids] for row in (between, expected))
    return ours == theirs and between == expected
