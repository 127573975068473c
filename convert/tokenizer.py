"""The tokenizer of a checkpoint: copied, checked, and turned into a tokenizer.json if it has none.

A SentencePiece model alone (`tokenizer.model`) can be read only where sentencepiece is installed.
A tokenizer.json can be read everywhere, so the conversion makes one.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any, Protocol

from convert.sources.base import first_line, read_hf_json
from s3d_jax.errors import ConversionError, InputError
from s3d_jax.storage.json_files import write_json
from s3d_jax.storage.native import CheckpointWriter
from s3d_jax.storage.tokenizer import (
    NEEDS_CODE,
    NO_CODE,
    has_vocabulary,
    needs_code,
    read_tokenizer,
    tokenizer_files,
)

# Has no runs of spaces, special tokens or rare letters: there rules decide, not pieces.
_PROBE = "Once upon a time, there was a Curious girl; she counted: 1, 2, 345!"


class TokenizerSource(Protocol):
    """Where a checkpoint's tokenizer comes from: a folder, or a file that holds weights too."""

    @property
    def path(self) -> Path:
        """What is read on disk."""

    @property
    def file_names(self) -> tuple[str, ...]:
        """Names of its files; empty if there is no tokenizer."""

    @property
    def is_complete(self) -> bool:
        """Whether there is a vocabulary: settings alone are no tokenizer."""

    def write(self, writer: CheckpointWriter) -> str:
        """Writes the tokenizer's files into a checkpoint, a tokenizer.json among them.

        Returns:
            "", or why the tokenizer cannot be read and what to do about it. The files are written
            in either case, so that an export can give them back.
        """


@dataclasses.dataclass(frozen=True)
class TokenizerFolder:
    """The tokenizer files of a HF folder or a native checkpoint."""

    path: Path

    @property
    def file_names(self) -> tuple[str, ...]:
        return tuple(str(file.relative_to(self.path)) for file in tokenizer_files(self.path))

    @property
    def is_complete(self) -> bool:
        return has_vocabulary(self.path)

    def write(self, writer: CheckpointWriter) -> str:
        return _write_folder(self.path, writer)


def given_tokenizer(folder: str | os.PathLike[str]) -> TokenizerSource:
    """The tokenizer that the user names.

    Raises:
        ConversionError: there is none.
    """
    if not has_vocabulary(folder):
        raise ConversionError(
            f"{folder} holds no tokenizer files (tokenizer.json, tokenizer.model or vocab.json)"
        )
    return TokenizerFolder(Path(folder))


def _write_folder(folder: Path, writer: CheckpointWriter) -> str:
    writer.add_tokenizer(folder)
    if not has_vocabulary(folder):
        return ""
    try:
        if (folder / "tokenizer.json").is_file():
            read_tokenizer(folder)
            return ""
        tokenizer = _load(folder)
        text = tokenizer.backend_tokenizer.to_str(pretty=True)
    except ConversionError as error:
        return f"the tokenizer in {folder} cannot be read: {error}"
    except InputError as error:
        reason = first_line(error).removeprefix(f"cannot read the tokenizer in {folder}: ")
        return (
            f"the tokenizer in {folder} cannot be read: {reason}. Get a good copy, or give another "
            "tokenizer by --tokenizer, and convert again"
        )
    except Exception as error:  # transformers raises most kinds for files that it cannot read
        return (
            f"the tokenizer in {folder} cannot be read ({type(error).__name__}: "
            f"{first_line(error)}): get a good copy, or give another tokenizer by --tokenizer, and "
            "convert again"
        )
    (writer.folder / "tokenizer.json").write_text(text, encoding="utf-8")
    if not (folder / "tokenizer_config.json").is_file():
        settings = {"tokenizer_class": type(tokenizer).__name__, **tokenizer.special_tokens_map}
        write_json(writer.folder / "tokenizer_config.json", settings)
    return ""


def _load(folder: Path) -> Any:
    """The tokenizer of a folder without tokenizer.json, by transformers.

    Raises:
        ConversionError: it cannot be read, or would not give the model's tokens. Says what to do.
    """
    is_sentencepiece = (folder / "tokenizer.model").is_file()
    pieces = _sentencepiece(folder / "tokenizer.model") if is_sentencepiece else None
    import transformers

    path = folder / "tokenizer_config.json"
    settings = read_hf_json(path) if path.is_file() else {}
    name = settings.get("tokenizer_class") or "LlamaTokenizer"
    if is_sentencepiece and name in ("LlamaTokenizer", "LlamaTokenizerFast"):
        # Old folders do not name the class, or do not say that a text begins with <s>: both were
        # the default then. transformers 5 neither guesses the class nor adds the token.
        tokenizer = transformers.LlamaTokenizer.from_pretrained(
            folder,
            local_files_only=True,
            add_bos_token=settings.get("add_bos_token") is not False,
        )
    else:
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, **NO_CODE
            )
        except Exception as error:
            if needs_code(folder):
                raise ConversionError(NEEDS_CODE) from error
            raise
    if pieces is None:
        text = tokenizer.decode(
            tokenizer.encode(_PROBE, add_special_tokens=False), clean_up_tokenization_spaces=False
        )
        if text != _PROBE:
            raise ConversionError(
                f"{type(tokenizer).__name__} of transformers turns {_PROBE!r} into tokens that "
                f"say {text!r}: correct tokenizer_class in a copy of tokenizer_config.json, or "
                "give a folder with a tokenizer.json by --tokenizer, and convert again"
            )
    else:
        ours = tokenizer.encode(_PROBE, add_special_tokens=False)
        if ours != pieces.encode(_PROBE):
            raise ConversionError(
                "transformers splits a text otherwise than sentencepiece does by tokenizer.model: "
                "give a folder with a tokenizer.json by --tokenizer, and convert again"
            )
    return tokenizer


def _sentencepiece(path: Path) -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        raise ConversionError(
            f"{path.name} needs sentencepiece: pip install 's3d-jax[sentencepiece]' and convert "
            "again, or give a folder with a tokenizer.json by --tokenizer"
        ) from error
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except Exception as error:
        raise ConversionError(
            f"{path.name} is damaged or no SentencePiece model: give a folder with a "
            "tokenizer.json by --tokenizer, and convert again"
        ) from error
