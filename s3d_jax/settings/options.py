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
    command_line: bool = True,
    **bounds: float,
) -> Any:
    """A dataclass field that is also an option of the command line.

    A field that is True by default becomes an option that turns it off; the help is the option's.

    Args:
        default: without one the option is required.
        help: what the value means.
        flag: the option's name where it differs from the field's, such as "--valid-prompts".
        metavar: the placeholder of the value in the help.
        shown: the default in words, where the value itself says too little.
        command_line: False keeps the field off the command line.
        **bounds: least, above, most, below; see `check_options`.
    """
    metadata = dict(
        help=help, flag=flag, metavar=metavar, shown=shown, command_line=command_line, **bounds
    )
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
    """Base of settings whose fields are checked against their choices and bounds."""

    def __post_init__(self) -> None:
        check_options(self)


def check_options(settings: Any) -> None:
    """Checks every field of a dataclass against its Literal choices and its bounds.

    Raises:
        ConfigError: a value lies outside; the message names the field and its option.
    """
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        flag = field.metadata.get("flag")
        name = f"{field.name} ({flag})" if flag else field.name
        if value is None:
            continue
        kind = kind_of(field)
        if get_origin(kind) is Literal and value not in get_args(kind):
            raise ConfigError(f"{name} must be one of {get_args(kind)}, got {value!r}")
        bounds = {k: field.metadata[k] for k in _BOUNDS if k in field.metadata}
        if not all(_BOUNDS[k][0](value, bound) for k, bound in bounds.items()):
            words = " and ".join(f"{_BOUNDS[k][1]} {bound}" for k, bound in bounds.items())
            raise ConfigError(f"{name} must be {words}, got {value}")
