"""Options of the command line from the fields of settings, and settings from what was given.

An option that is not given is absent from the namespace: its default stands in the dataclass alone,
and a command can tell what was given from what was not.
"""

import argparse
import contextlib
import dataclasses
import difflib
import io
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, TextIO, TypeVar, get_args, get_origin

from s3d_jax.errors import InputError
from s3d_jax.settings.options import flag_of
from s3d_jax.settings.records import kind_of

T = TypeVar("T")
RAW = argparse.RawDescriptionHelpFormatter


class Parser(argparse.ArgumentParser):
    """Refuses an unknown option with the usage of the subcommand that got it, and a likely one."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            # A main parser would refuse what its subcommand left, with its own usage.
            option = unknown[0].partition("=")[0]
            likely = difflib.get_close_matches(option, self._option_string_actions, 1)
            hint = f"; did you mean {likely[0]}?" if likely else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found, unknown


def prepare_streams() -> None:
    """Makes the standard streams take what commands read and print.

    What cannot be printed is escaped ("\\u03c4"), and bytes of the input that are no text become
    lone surrogates, which `InputError`s name. A stream that the caller has closed (`2>&-`) becomes
    the null device.
    """
    for name, mode, errors in (
        ("stdin", "r", "surrogateescape"),
        ("stdout", "w", "backslashreplace"),
        ("stderr", "w", "backslashreplace"),
    ):
        if getattr(sys, name) is None:
            # In this order it gets the number of the closed stream. Else the next file that is
            # opened would get it, and what libraries print with it.
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (for the whole run)
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def add_options(
    parser: Any, settings: type, names: Iterable[str] | None = None, **defaults: Any
) -> None:
    """Adds the fields of a dataclass that `settings.options.option` made.

    Args:
        parser: a parser or a group of one.
        settings: the dataclass.
        names: the fields to add; None adds all.
        **defaults: defaults by field that the help shows in place of the dataclass's; the command
            passes them to `build`.
    """
    for field in _options(settings):
        if names is None or field.name in names:
            parser.add_argument(
                flag_of(field),
                dest=_destination(field),
                default=argparse.SUPPRESS,
                required=field.default is dataclasses.MISSING,
                help=_help(field, defaults.get(field.name, field.default)),
                **_kind(field),
            )


def given(settings: type, arguments: argparse.Namespace) -> dict[str, Any]:
    """The values of the fields whose options were given, by the field's name."""
    found = {
        field.name: getattr(arguments, _destination(field), None) for field in _options(settings)
    }
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in found.items()
        if value is not None
    }


def build(settings: type[T], arguments: argparse.Namespace, **others: Any) -> T:
    """The dataclass with what was given; `others` are values where nothing was."""
    return settings(**{**others, **given(settings, arguments)})


def refuse(
    arguments: argparse.Namespace, reason: str, fields: Mapping[type, Iterable[str] | None]
) -> None:
    """Raises InputError for options that were given and would have no effect.

    Args:
        arguments: what was given.
        reason: completes the message "--rank, --decay: ...".
        fields: names of the fields that have no effect, by dataclass; None is all of them.
    """
    flags = [
        flag_of(field)
        for settings, names in fields.items()
        for field in _options(settings)
        if field.name in given(settings, arguments) and (names is None or field.name in names)
    ]
    if flags:
        raise InputError(f"{', '.join(flags)}: {reason}")


@contextlib.contextmanager
def json_stdout(wanted: bool) -> Iterator[TextIO]:
    """Yields the stream on which a command prints its JSON; standard output if none is `wanted`.

    What libraries print in the block, in C or in Python, then goes to standard error, and what was
    written to the stream is printed when the block ends.
    """
    out, text = sys.stdout, io.StringIO()
    if not wanted:
        yield out
        return
    out.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield text
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        out.write(text.getvalue())
        out.flush()


def _options(settings: type) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(settings) if field.metadata.get("help")]


def _destination(field: dataclasses.Field[Any]) -> str:
    return flag_of(field).removeprefix("--").replace("-", "_")


def _kind(field: dataclasses.Field[Any]) -> dict[str, Any]:
    """Arguments of add_argument for the type of the field."""
    kind = kind_of(field)
    if kind is bool:
        if field.default is None:
            return {"action": argparse.BooleanOptionalAction}
        return {"action": "store_false" if field.default else "store_true"}
    action = {}
    if get_origin(kind) is tuple:
        kind, action = get_args(kind)[0], {"action": "append"}
    if get_origin(kind) is Literal:
        return action | {"choices": get_args(kind)}
    placeholder = field.metadata["metavar"] or {int: "N", float: "X"}.get(kind)
    return action | {"type": kind, "metavar": placeholder}


def _help(field: dataclasses.Field[Any], default: Any) -> str:
    shown = field.metadata["shown"] if default is field.default else None
    if shown is None and not isinstance(default, bool | tuple | None | type(dataclasses.MISSING)):
        shown = str(default)
    text = field.metadata["help"].replace("%", "%%")
    return text if shown is None else f"{text} (default: {shown})"
