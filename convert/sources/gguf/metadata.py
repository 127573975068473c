"""The metadata of a GGUF file, taken one by one: what nobody takes is not understood."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from convert.sources.base import AGAIN, first_line, reading
from s3d_jax.errors import ConversionError

MAGIC = b"GGUF"


def is_gguf_file(path: Path) -> bool:
    """Whether the content begins as a GGUF file."""
    with reading(path), open(path, "rb") as opened:
        return opened.read(len(MAGIC)) == MAGIC


@contextlib.contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turns whatever the gguf package raises into a ConversionError that names the file."""
    try:
        yield
    except ConversionError:
        raise
    except Exception as error:  # it raises most kinds for bytes that it does not expect
        reason = first_line(error) or type(error).__name__
        raise ConversionError(f"{path} is truncated or damaged ({reason}): {AGAIN}") from error


def open_reader(path: Path) -> Any:
    """The gguf package's reader of a file, which maps it into memory.

    Raises:
        ConversionError: the package is not installed, or the file is damaged.
    """
    try:
        import gguf
    except ImportError as error:
        raise ConversionError(
            f"{path.name} needs the gguf package: pip install 's3d-jax[gguf]', and convert again"
        ) from error
    with damage_named(path):
        try:
            return gguf.GGUFReader(path)
        except ValueError as error:
            if gguf.GGMLQuantizationType.__name__ not in str(error):
                raise
            raise ConversionError(
                f"{path} has a tensor of a type that the gguf package does not know "
                f"({first_line(error)}): pip install --upgrade gguf, or get the model in another "
                "type"
            ) from error


class Metadata:
    """The keys and values of a GGUF file.

    Args:
        path: the file, for errors.
        values: all of them.
    """

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path = path
        self._values = values
        self._taken: set[str] = set()

    @classmethod
    def of(cls, path: Path, reader: Any) -> "Metadata":
        """The metadata that a reader of the gguf package has found."""
        with damage_named(path):
            return cls(path, {key: _value(field) for key, field in reader.fields.items()})

    def take(self, key: str, default: Any = None) -> Any:
        """A value, or the default; counts as understood."""
        self._taken.add(key)
        return self._values.get(key, default)

    def need(self, key: str) -> Any:
        """A value that must be there.

        Raises:
            ConversionError: it is not.
        """
        if (value := self.take(key)) is None:
            raise self.error(f"has no {key}")
        return value

    def finish(self, prefix: str) -> None:
        """Refuses keys that begin so and that nobody has taken.

        Raises:
            ConversionError: names them.
        """
        left = [key for key in self._values if key.startswith(prefix) and key not in self._taken]
        if left:
            shown = ", ".join(f"{key} = {self._values[key]!r:.60}" for key in left)
            raise self.error(f"has settings that are not understood: {shown}")

    def error(self, problem: str) -> ConversionError:
        return ConversionError(f"{self.path} {problem}")


def _value(field: Any) -> Any:
    """The value of a field; a float32 as the shortest number that rounds to it."""
    value = field.contents()
    is_single = field.types and field.types[-1].name == "FLOAT32"
    return float(str(np.float32(value))) if is_single and isinstance(value, float) else value
