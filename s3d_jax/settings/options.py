"""Fields of settings that say what they mean and which values they take.

The help of such a field is its documentation, in the source and on the command line: see
`settings.arguments`, which makes options of them.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    flag: str | None = None,
    metavar: str | None = None,
    shown: str | None = None,
    choices: Sequence[str] | None = None,
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
        choices: the values allowed, where the type does not say so.
        **bounds: least, above, most, below; see `records.Checked`.
    """
    metadata = dict(help=help, flag=flag, metavar=metavar, shown=shown, choices=choices, **bounds)
    return dataclasses.field(default=default, metadata=metadata)


def flag_of(field: dataclasses.Field[Any]) -> str:
    """The option of a field: row_length is --row-length, unless the field names another."""
    return field.metadata.get("flag") or "--" + field.name.replace("_", "-")
