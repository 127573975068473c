"""Options of the command line from dataclass fields, and settings from what was given."""

import argparse
import dataclasses
import subprocess
import sys
from typing import Literal

import pytest

from convert.__main__ import main as convert_main
from s3d_jax.commands.main import main
from s3d_jax.errors import ConfigError, InputError
from s3d_jax.settings.arguments import add_options, build, given, refuse
from s3d_jax.settings.options import option
from s3d_jax.settings.records import Checked


@dataclasses.dataclass(frozen=True)
class Example(Checked):
    folder: str = option(help="where", metavar="DIR")
    count: int = option(3, "how many", least=1, below=10)
    share: float | None = option(None, "100 % of it", shown="all", above=0)
    kind: Literal["a", "b"] | None = option(None, "which")
    names: tuple[str, ...] = option((), "may be repeated", flag="--name", metavar="NAME")
    fast: bool = option(False, "hurries")
    careful: bool = option(True, "takes no care", flag="--careless")
    adaptive: bool | None = option(None, "either")
    hidden: int = option(5, least=5)  # without help it is not an option


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_options(parser, Example, count=4)
    return parser.parse_args(arguments)


def test_only_given_options_are_in_the_settings():
    arguments = parse("--folder", "x")
    assert given(Example, arguments) == {"folder": "x"}
    assert build(Example, arguments, count=4) == Example("x", count=4)
    arguments = parse("--folder", "x", "--count", "3")
    assert build(Example, arguments, count=4) == Example("x")  # a given default is given


def test_every_type_of_field():
    options = "--folder x --count 7 --share 0.5 --kind b --name one --name two --fast --careless"
    settings = build(Example, parse(*options.split(), "--no-adaptive"))
    expected = Example("x", 7, 0.5, "b", ("one", "two"), fast=True, careful=False, adaptive=False)
    assert settings == expected


@pytest.mark.parametrize(
    "options, message",
    [
        ("", "required: --folder"),
        ("--folder x --count two", "argument --count: invalid int value"),
        ("--folder x --kind c", "argument --kind: invalid choice"),
        ("--folder x --hidden 5", "unrecognized arguments: --hidden"),
    ],
)
def test_argparse_refuses_wrong_options(options, message, capsys):
    with pytest.raises(SystemExit):
        parse(*options.split())
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "command, words",
    [
        ("generate x --max-token 3", "generate: error: unrecognized arguments: --max-token 3; did "
         "you mean --max-new-tokens?"),
        ("generate x --temprature=0.5", "did you mean --temperature?"),
        ("draft export a b --model m --gama 2", "usage: s3d draft export"),
        ("info --zzz", "unrecognized arguments: --zzz\n"),
        ("info more", "unrecognized arguments: more\n"),
    ],
)  # fmt: skip
def test_an_unknown_option_is_refused_by_the_command_that_got_it(command, words, capsys):
    with pytest.raises(SystemExit):
        main(command.split())
    assert words in capsys.readouterr().err


def test_s3d_convert_refuses_it_as_well(capsys):
    with pytest.raises(SystemExit):
        convert_main(["verify", "a", "b", "--dtpe", "float32"])
    assert "usage: s3d-convert verify" in (shown := capsys.readouterr().err)
    assert "did you mean --dtype?" in shown


def test_the_help_has_defaults(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    for line in (
        "--folder DIR where --count",
        "--count N how many (default: 4)",  # the command's, not the dataclass's
        "--share X 100 % of it (default: all)",
        "--kind {a,b} which --name",
        "--name NAME may be repeated --fast hurries --careless takes no care",
        "--adaptive, --no-adaptive either",
    ):
        assert line in text


def test_options_without_effect_are_refused():
    arguments = parse("--folder", "x", "--name", "n", "--careless", "--count", "3")
    refuse(arguments, "nothing given", {Example: ["share", "fast"]})
    with pytest.raises(InputError, match=r"^--count, --name, --careless: no use$"):
        refuse(arguments, "no use", {Example: ["count", "names", "careful", "fast"]})
    with pytest.raises(InputError, match=r"^--folder, --count, --name, --careless: all$"):
        refuse(arguments, "all", {Example: None})


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(count=0), r"^count must be at least 1 and below 10, got 0$"),
        (dict(count=10), "below 10"),
        (dict(share=0.0), "share must be above 0, got 0.0"),
        (dict(share=float("nan")), "share must be a number, got nan"),
        (dict(kind="c"), r"kind must be one of \('a', 'b'\), got 'c'"),
        (dict(hidden=4), "hidden must be at least 5"),
    ],
    ids=str,
)
def test_values_out_of_bounds_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        Example("x", **changes)


def test_the_command_line_is_built_without_jax():
    code = (
        "import sys; from s3d_jax.commands.main import _parser; _parser()\n"
        "print([name for name in ('jax', 'numpy', 'flax', 'optax') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    "module, arguments, code, out",
    [
        ("s3d_jax", "info --json 2>&-", 0, '{"model": '),
        ("s3d_jax", "info 1>&-", 0, ""),
        ("s3d_jax", "info --model nowhere 0<&- 2>&-", 2, ""),  # errors are no output
        ("s3d_jax", "--help >&-", 0, ""),
        ("convert", "inspect nowhere --json 2>&-", 2, ""),
    ],
)
def test_closed_streams_are_null_devices(module, arguments, code, out):
    command = f"exec {sys.executable} -m {module} {arguments}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, "")
    assert done.stdout.startswith(out) and bool(done.stdout) == bool(out)
