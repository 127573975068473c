"""Base of all settings: frozen records that check their fields and convert to and from JSON."""

import dataclasses
import math
import numbers
import operator
import types
from collections.abc import Sequence
from typing import Any, Literal, Self, Union, get_args, get_origin

from s3d_jax.errors import ConfigError


def check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def is_integer(value: Any) -> bool:
    """Whether a value is an integer of Python or numpy; booleans are not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_list(value: Any) -> bool:
    """Whether a value is a sequence other than a string."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def plain(value: Any) -> Any:
    """Converts numbers and arrays of numpy or jax, and sequences, to Python's numbers and lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [plain(v) for v in value] if is_list(value) else value


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value


def is_finite(value: Any) -> bool:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer past the largest float
        return False


def is_positive(value: Any) -> bool:
    return is_finite(value) and value > 0


_KINDS = {
    bool: (lambda value: isinstance(value, bool), "True or False"),
    int: (is_integer, "an integer"),
    float: (is_finite, "a number"),
}
_BOUNDS = {
    "least": (operator.ge, "at least"),
    "above": (operator.gt, "above"),
    "most": (operator.le, "at most"),
    "below": (operator.lt, "below"),
}


def kind_of(field: dataclasses.Field[Any]) -> Any:
    """The type of a field; of `X | None` it is X."""
    kind: Any = field.type
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(part for part in get_args(kind) if part is not type(None))
    return kind


class Checked:
    """Base of settings whose fields are checked by their types, choices and bounds.

    Choices are those of a Literal type or of `settings.options.option`, which also sets bounds.
    None passes where the type allows it.
    """

    def __post_init__(self) -> None:
        """Raises ConfigError for a wrong value; the message names the field and its option."""
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value, kind, facts = getattr(self, field.name), kind_of(field), field.metadata
            if value is None and kind is not field.type:
                continue
            name = f"{field.name} ({facts['flag']})" if facts.get("flag") else field.name
            literal = get_args(kind) if get_origin(kind) is Literal else ()
            if choices := facts.get("choices") or literal:
                known = any(type(value) is type(c) and value == c for c in choices)
                check(known, f"{name} must be one of {tuple(choices)}, got {value!r:.80}")
            elif kind in _KINDS:
                fits, words = _KINDS[kind]
                check(fits(value), f"{name} must be {words}, got {value!r:.80}")
            bounds = {k: facts[k] for k in _BOUNDS if k in facts}
            if not all(_BOUNDS[k][0](value, bound) for k, bound in bounds.items()):
                limits = " and ".join(f"{_BOUNDS[k][1]} {bound}" for k, bound in bounds.items())
                raise ConfigError(f"{name} must be {limits}, got {value!r:.80}")


class Record(Checked):
    """Base of frozen dataclasses: converts to and from JSON and refuses unknown fields."""

    def __post_init__(self) -> None:
        """Turns lists into tuples and numpy's numbers into Python's, and checks the fields."""
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = _frozen(plain(getattr(self, field.name)))
            object.__setattr__(self, field.name, value)
        super().__post_init__()

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        if not isinstance(fields, dict):
            raise ConfigError(f"{cls.__name__}: expected a JSON object, got {fields!r}")
        known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(fields) - set(known))
        check(not unknown, f"{cls.__name__}: unknown fields {unknown}; known are {sorted(known)}")
        required = {
            name
            for name, f in known.items()
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        }
        missing = sorted(required - set(fields))
        check(not missing, f"{cls.__name__}: missing fields {missing}")
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    def replace(self, **changes: Any) -> Self:
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]
