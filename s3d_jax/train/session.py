"""What all training runs have in common: their data and their options."""

import dataclasses
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from s3d_jax.errors import ConfigError, InputError
from s3d_jax.settings.model import ModelConfig
from s3d_jax.settings.training import RunConfig
from s3d_jax.texts.documents import Document, read_documents
from s3d_jax.train.data import Batches, Rows, pack
from s3d_jax.train.validation import held_out_prompts

Files = Sequence[str | os.PathLike[str]]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The data of a run.

    Attributes:
        data, valid: names of the files.
        rows: to train on.
        held_out: rows of held-out documents.
        prompts: int32 [n] each, the beginnings of held-out documents.
    """

    data: list[str]
    valid: list[str]
    rows: Rows
    held_out: Rows
    prompts: list[np.ndarray]

    @property
    def summary(self) -> str:
        """What there is to learn, for the user."""
        return (
            f"{_counted(self.rows)} to train on; held out: {_counted(self.held_out)}, "
            f"{len(self.prompts)} prompts"
        )

    def batches(self, config: RunConfig) -> Batches:
        """The batches of the rows to train on."""
        return Batches(self.rows, config.loop.batch_size, config.loop.seed)

    def options(self, config: RunConfig, more: Mapping[str, Any]) -> dict[str, Any]:
        """All that a run depends on, JSON: its settings, its data, and more."""
        return {
            **more,
            "objective": dataclasses.asdict(config.objective),
            "row_length": self.rows.tokens.shape[1],
            "validation": dataclasses.asdict(config.validation),
            "remat": config.remat,
            "loop": dataclasses.asdict(config.loop),
            "data": self.data,
            "valid": self.valid,
            # So that a run is not resumed on other data.
            "rows_crc32": zlib.crc32(
                self.rows.learn.tobytes(), zlib.crc32(self.rows.tokens.tobytes())
            ),
        }


def _counted(rows: Rows) -> str:
    number, length = rows.tokens.shape
    return f"{number:,} rows of {length} tokens ({rows.num_learnt:,} learnt)"


def check_row_length(row_length: int | None, model: ModelConfig) -> None:
    """Raises ConfigError for rows longer than the model is made for."""
    limit = model.max_position_embeddings
    if row_length is not None and row_length > limit:
        raise ConfigError(
            f"row_length (--row-length) is {row_length}, but the model is made for {limit} tokens "
            "(max_position_embeddings): take at most that"
        )


def read_corpus(
    data: Files,
    valid: Files,
    tokenizer: Any,
    end: int | None,
    model: ModelConfig,
    config: RunConfig,
    arrange: Callable[[Sequence[Document]], Rows],
    *,
    texts: bool = False,
    learns_text: bool = False,
) -> Corpus:
    """Reads, splits and packs the documents of a run.

    Args:
        data: files to train on.
        valid: held-out files; without them a share of the documents is held out.
        tokenizer, texts: as in `read_documents`.
        end: the id that ends a text, if there is one.
        model: its vocabulary and its length bound what is read.
        config: seed and validation.
        arrange: makes rows of the documents to train on.
        learns_text: the target is trained too, so held-out text is needed, not prompts alone.

    Raises:
        InputError: files that cannot be used; no document or no token to learn in a part; or
            foreign token ids.
    """
    documents = read_documents(data, tokenizer, end, texts=texts)
    if valid:
        held_out = read_documents(valid, tokenizer, end, texts=texts)
    else:
        count = max(1, round(config.validation.held_out * len(documents)))
        order = np.random.default_rng(config.loop.seed).permutation(len(documents))
        held_out = [documents[i] for i in sorted(order[:count])]
        documents = [documents[i] for i in sorted(order[count:])]
    for name, part in (("to train on", documents), ("held out", held_out)):
        if not part:
            raise InputError(f"no document is {name}: give more data, or files with --valid")
        largest = max(int(d.tokens.max(initial=0)) for d in part)
        if largest >= model.vocab_size:
            raise InputError(
                f"the data holds token {largest}; the vocabulary has {model.vocab_size}"
            )
    rows, validation = arrange(documents), config.validation
    held_out_rows = pack(held_out, rows.tokens.shape[1])
    _check_learnt("the data", rows, documents)
    if learns_text:
        _check_learnt("the held-out data", held_out_rows, held_out)
    limit = model.max_position_embeddings
    return Corpus(
        [Path(file).name for file in data],
        [Path(file).name for file in valid],
        rows,
        held_out_rows,
        held_out_prompts(held_out, validation.prompts, validation.prompt_tokens, limit),
    )


def _check_learnt(what: str, rows: Rows, documents: Sequence[Document]) -> None:
    if rows.num_learnt == 0:
        marked = sum(int(d.learn.sum()) for d in documents)
        raise InputError(
            f"{what}: none of the {len(rows):,} rows of {rows.tokens.shape[1]} tokens has a token "
            f"to learn. The {len(documents):,} documents have {marked:,}, but the first token of a "
            "text or of a row is never learnt: give longer texts, chats with answers, or lines "
            'whose "tokens" are not empty'
        )
