"""Rows of token ids to train on, and batches by step number.

A batch is a pure function of (seed, step), so a run that resumes after a kill sees the same batches
as one that was not killed.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from s3d_jax.errors import InputError
from s3d_jax.texts.documents import Document

_OPEN_ROWS = 64


@dataclasses.dataclass(frozen=True)
class Rows:
    """Documents in rows of equal length.

    Attributes:
        tokens: int32 [R, T].
        learn: bool [R, T], False on padding as well.
    """

    tokens: np.ndarray
    learn: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_learnt(self) -> int:
        """Tokens that are learnt; nothing is known before the first one of a row."""
        return int(self.learn[:, 1:].sum())


def row_length_for(documents: Sequence[Document], limit: int) -> int:
    """A row length that fits most documents: a multiple of 32 that holds nine in ten of them.

    Args:
        documents: to train on.
        limit: positions of the model.

    Returns:
        From 64 to 512, and at most `limit`.
    """
    sizes = [len(document.tokens) for document in documents]
    most = int(np.quantile(sizes, 0.9, method="inverted_cdf"))
    return min(max(64, -(-most // 32) * 32), 512, limit)


def pack(documents: Sequence[Document], length: int) -> Rows:
    """Packs each document into the first row with room, and cuts longer ones into pieces.

    Documents of one row see each other. The rest of a row is padding. Only the last 64 rows with
    room are considered. The first token of a piece is not learnt: the text before it has ended, and
    no block is drafted over that end.

    Raises:
        InputError: the length is below 2.
    """
    _check_length(length)
    tokens: list[np.ndarray] = []
    learn: list[np.ndarray] = []
    room: dict[int, int] = {}  # row -> free tokens at its end
    for document in documents:
        for cut in range(0, len(document.tokens), length):
            piece = slice(cut, cut + length)
            size = len(document.tokens[piece])
            row = next((row for row, free in room.items() if free >= size), len(tokens))
            if row == len(tokens):
                tokens.append(np.zeros(length, np.int32))
                learn.append(np.zeros(length, bool))
                room[row] = length
                if len(room) > _OPEN_ROWS:
                    del room[next(iter(room))]
            at = length - room[row]
            tokens[row][at : at + size] = document.tokens[piece]
            learn[row][at + 1 : at + size] = document.learn[piece][1:]
            room[row] -= size
            if room[row] == 0:
                del room[row]
    return Rows(np.stack(tokens), np.stack(learn))


def _check_length(length: int) -> None:
    if length < 2:
        raise InputError(f"a row needs at least two tokens, got a row length of {length}")


def concatenate(documents: Sequence[Document], length: int, seed: int) -> Rows:
    """Shuffles documents, joins them, and cuts the result into rows: for pretraining.

    There is no padding, and every token is learnt, the user's turns of a chat as well.

    Raises:
        InputError: the length is below 2, or the documents fill no row.
    """
    _check_length(length)
    order = np.random.default_rng(seed).permutation(len(documents))
    tokens = np.concatenate([documents[i].tokens for i in order])
    rows = len(tokens) // length
    if rows == 0:
        raise InputError(f"the texts have {len(tokens)} tokens, fewer than one row of {length}")
    tokens = tokens[: rows * length].reshape(rows, length)
    return Rows(tokens, np.ones(tokens.shape, bool))


class Batches:
    """Batches by step of endless epochs; each epoch is another permutation of the rows."""

    def __init__(self, rows: Rows, batch_size: int, seed: int) -> None:
        self.rows = rows
        self.batch_size = batch_size
        self._seed = seed
        self._epoch, self._order = -1, np.zeros(0, int)

    def _row(self, index: int) -> int:
        epoch, at = divmod(index, len(self.rows))
        if epoch != self._epoch:
            generator = np.random.default_rng((self._seed, epoch))
            self._epoch, self._order = epoch, generator.permutation(len(self.rows))
        return int(self._order[at])

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """{"tokens": int32 [B, T], "learn": bool [B, T]} of one step."""
        first = step * self.batch_size
        chosen = [self._row(first + i) for i in range(self.batch_size)]
        return {"tokens": self.rows.tokens[chosen], "learn": self.rows.learn[chosen]}
