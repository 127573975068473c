"""A stream: one continuation, piece by piece."""

from collections.abc import Iterator
from typing import Generic, NoReturn, TypeVar

from s3d_jax.engine.batch import Batch
from s3d_jax.engine.results import Result

_Piece = TypeVar("_Piece")


def text_pieces(batch: Batch) -> Iterator[str]:
    """Decodes a batch of one row; yields its text piece by piece."""
    assert batch.texts is not None
    row, shown = batch.texts[0], 0
    for _ in batch.run(1):
        if len(row.text) > shown:
            yield row.text[shown:]
            shown = len(row.text)
    if len(row.text) > shown:
        yield row.text[shown:]


class Stream(Generic[_Piece]):
    """An iterator over the pieces of one continuation; has a `result` when it has ended.

    After an interruption (Ctrl-C) or an error within a step it yields nothing more, like any
    generator, and has no result.
    """

    def __init__(self, pieces: Iterator[_Piece], batch: Batch) -> None:
        self._pieces = pieces
        self._batch = batch
        self._result: Result | None = None

    def __iter__(self) -> Iterator[_Piece]:
        return self

    def __next__(self) -> _Piece:
        try:
            return next(self._pieces)
        except StopIteration:
            if self._result is None and self._batch.has_ended:
                self._result = self._batch.results()[0]
            raise

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a stream cannot be copied or pickled, since it is running: take its result when it "
            "has ended, or begin another one with the same seed"
        )

    @property
    def result(self) -> Result:
        """The whole output with its statistics.

        Raises:
            RuntimeError: the stream has not been read to its end.
        """
        if self._result is None:
            raise RuntimeError(
                "a stream has a result when it has been read to its end, without an interruption: "
                "iterate over it first"
            )
        return self._result
