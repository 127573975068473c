"""The tokenizer of a checkpoint: copied, checked, and made into a tokenizer.json where it has none.

A SentencePiece model alone (`tokenizer.model`) can be read only where sentencepiece is installed.
A tokenizer.json can be read everywhere, so it is made while the conversion runs.
"""

from pathlib import Path
from typing import Any

from convert.hf import read_json
from s3d_jax.errors import ConversionError
from s3d_jax.storage.json_files import write_json
from s3d_jax.storage.native import CheckpointWriter
from s3d_jax.storage.tokenizer import has_vocabulary, tokenizer_files

# Without runs of spaces, special tokens and rare letters, on which rules and not pieces decide.
_PROBE = "Once upon a time, there was a Curious girl; she counted: 1, 2, 345!"


def write_tokenizer(folder: Path, writer: CheckpointWriter) -> str:
    """Copies the tokenizer files of a HF folder, and adds a tokenizer.json if it has none.

    Returns:
        "", or why the tokenizer cannot be read and what to do about it. The files are copied all
        the same, for an export to give them back.
    """
    files = {file.name: file for file in tokenizer_files(folder)}
    for file in files.values():
        writer.add_file(file)
    if not has_vocabulary(folder):
        return ""
    try:
        if "tokenizer.json" in files:
            _check_json(files["tokenizer.json"])
            return ""
        tokenizer = _load(folder)
        text = tokenizer.backend_tokenizer.to_str(pretty=True)
    except ConversionError as error:
        return f"the tokenizer in {folder} cannot be read: {error}"
    except Exception as error:  # transformers raises most kinds for files that it cannot read
        reason = str(error).strip().partition("\n")[0]
        return (
            f"the tokenizer in {folder} cannot be read ({type(error).__name__}: {reason}): get a "
            "good copy, or give another tokenizer by --tokenizer, and convert again"
        )
    (writer.folder / "tokenizer.json").write_text(text, encoding="utf-8")
    if "tokenizer_config.json" not in files:
        settings = {"tokenizer_class": type(tokenizer).__name__, **tokenizer.special_tokens_map}
        write_json(writer.folder / "tokenizer_config.json", settings)
    return ""


def _check_json(path: Path) -> None:
    import tokenizers

    try:
        tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:
        raise ConversionError(
            f"{path.name} is damaged or too new ({error}): get a good copy, or give another "
            "tokenizer by --tokenizer, and convert again"
        ) from error


def _load(folder: Path) -> Any:
    """The tokenizer of a folder without tokenizer.json, by transformers.

    Raises:
        ConversionError: it cannot be read, or would not give the model's tokens. Says what to do.
    """
    is_sentencepiece = (folder / "tokenizer.model").is_file()
    pieces = _sentencepiece(folder / "tokenizer.model") if is_sentencepiece else None
    import transformers

    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    name = settings.get("tokenizer_class") or "LlamaTokenizer"
    if is_sentencepiece and name in ("LlamaTokenizer", "LlamaTokenizerFast"):
        # Old folders leave the class out, or that a text begins with <s>: both were the default
        # then, and transformers 5 neither guesses the class nor adds the token.
        tokenizer = transformers.LlamaTokenizer.from_pretrained(
            folder,
            local_files_only=True,
            add_bos_token=settings.get("add_bos_token") is not False,
        )
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if pieces is not None:
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
