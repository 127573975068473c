"""Fields of settings that say what they mean and which values they take.

The help of such a field is its documentation, in the source and on the command line: see
`commands.arguments`, which makes options of them.
"""

import dataclasses
import operator
import types
from typing import Any, Literal, Union, get_args, get_origin

from s3d_jax.errors import ConfigError

_BOUNDS = {
    "least": (operator.ge, "at least"),
    "above": (operator.gt, "above"),
    "most": (operator.le, "at most"),
    "below": (operator.lt, "below"),
}


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    flag: str | None = None,
    metavar: str | None = None,
    shown: str | None = None,
    **bounds: float,
) -> Any:
    """A dataclass field that is also an option of the command line.

    A field that is True by default becomes an option that turns it off; the help is the option's.

    Args:
        default: without one the option is required.
        help: what the value means; a field without help is not on the command line.
        flag: the option's name where it differs from the field's, such as "--valid-prompts".
        metavar: the placeholder of the value in the help.
        shown: the default as text, where the value itself says too little.
        **bounds: least, above, most, below; see `Checked`.
    """
    metadata = dict(help=help, flag=flag, metavar=metavar, shown=shown, **bounds)
    return dataclasses.field(default=default, metadata=metadata)


def flag_of(field: dataclasses.Field[Any]) -> str:
    """The option of a field: row_length is --row-length, unless the field names another."""
    return field.metadata.get("flag") or "--" + field.name.replace("_", "-")


def kind_of(field: dataclasses.Field[Any]) -> Any:
    """The type of a field; of `X | None` it is X."""
    kind: Any = field.type
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(part for part in get_args(kind) if part is not type(None))
    return kind


class Checked:
    """Base of settings whose fields are checked against their Literal choices and bounds."""

    def __post_init__(self) -> None:
        """Raises ConfigError for a value outside; the message names the field and its option."""
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value, kind = getattr(self, field.name), kind_of(field)
            flag = field.metadata.get("flag")
            name = f"{field.name} ({flag})" if flag else field.name
            choices = get_args(kind) if get_origin(kind) is Literal else ()
            bounds = {k: field.metadata[k] for k in _BOUNDS if k in field.metadata}
            if value is None:
                continue
            if choices and value not in choices:
                raise ConfigError(f"{name} must be one of {choices}, got {value!r}")
            if not all(_BOUNDS[k][0](value, bound) for k, bound in bounds.items()):
                limits = " and ".join(f"{_BOUNDS[k][1]} {bound}" for k, bound in bounds.items())
                raise ConfigError(f"{name} must be {limits}, got {value}")
