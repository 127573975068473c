"""The metadata of a GGUF file, taken one by one: what nobody takes is not understood."""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from convert.sources.base import AGAIN, first_line, reading
from s3d_jax.errors import ConversionError
from s3d_jax.settings.records import is_integer

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

    def typed(self, key: str, kind: type, default: Any = None, *, many: bool = False) -> Any:
        """A value of this type (`many`: a list of such), or the default; counts as understood.

        Raises:
            ConversionError: it is of another type.
        """
        if (value := self.take(key)) is None:
            return default
        is_right = functools.partial(_is_of, kind)
        if (isinstance(value, list) and all(map(is_right, value))) if many else is_right(value):
            return value
        wanted = f"list of {_KINDS[kind]}s" if many else _KINDS[kind]
        raise self.error(f"has {key} {value!r:.80}, which is no {wanted}: {AGAIN}")

    def beginning_with(self, prefix: str) -> dict[str, Any]:
        """The values whose keys begin so, by the rest of the key; they count as understood."""
        found = {key: value for key, value in self._values.items() if key.startswith(prefix)}
        self._taken.update(found)
        return {key.removeprefix(prefix): value for key, value in found.items()}

    def need(self, key: str, kind: type) -> Any:
        """As `typed`, for a value that must be there."""
        if (value := self.typed(key, kind)) is None:
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


_KINDS = {str: "text", bool: "flag", int: "whole number", float: "number"}


def _is_of(kind: type, value: Any) -> bool:
    if kind in (int, float):
        return is_integer(value) or (kind is float and isinstance(value, float))
    return isinstance(value, kind)


def _value(field: Any) -> Any:
    """The value of a field; a float32 as the shortest number that rounds to it."""
    value = field.contents()
    is_single = field.types and field.types[-1].name == "FLOAT32"
    return float(str(np.float32(value))) if is_single and isinstance(value, float) else value
