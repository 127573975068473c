"""Reads text and jsonl files, plain or gzipped."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from s3d_jax.errors import InputError

SEPARATOR = "<|endoftext|>"  # between the documents of a text file


def split_texts(path: Path) -> list[str]:
    """The documents of a text file."""
    texts = (text.strip() for text in read_text(path).split(SEPARATOR))
    return [text for text in texts if text]


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a jsonl file, each after its place as text: "FILE, line 3"."""
    # Not splitlines(): a JSON string may contain U+2028 and other line separators.
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            fields = json.loads(line)
            if "\\ud" in line.lower():  # a surrogate pair, or half of one
                json.dumps(fields, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{where} holds half a character: {error}") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise InputError(f"{where} is not a JSON object")
        yield where, fields


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        InputError: it cannot be read, is damaged, or is not UTF-8.
    """
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.name.endswith(".gz") else data).decode("utf-8")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path} is not gzip, or damaged: {error}") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from error


def is_jsonl(path: Path) -> bool:
    """Whether the name ends in .jsonl or .jsonl.gz."""
    return path.name.removesuffix(".gz").endswith(".jsonl")
