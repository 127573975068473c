"""The command `s3d`: the parser of its subcommands, and exit codes."""

import argparse
import sys
import warnings
from collections.abc import Sequence

from s3d_jax import __version__
from s3d_jax.commands import bench, chat, distill, draft, generate, info, pretrain, train, tune
from s3d_jax.commands.hosts import joined
from s3d_jax.errors import S3DError
from s3d_jax.machine import out_of_memory_explained
from s3d_jax.settings.arguments import RAW, Parser, json_stdout, prepare_streams

_DESCRIPTION = """\
S3D self-speculative decoding: the model drafts several tokens at once with its own middle layers
skipped, then verifies them in one full pass. It generates the same text as plain decoding, in
fewer passes."""


_ELSEWHERE = (  # than in what knows better what it needs
    "ask for fewer or shorter rows, or take the model in 16 bits or int8; s3d info --context N "
    "--batch B says what fits"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0 done, 2 wrong input, 130 interrupted."""
    prepare_streams()
    arguments = _parser().parse_args(argv)
    usual = warnings.formatwarning
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # without source lines
    try:
        with (
            json_stdout(getattr(arguments, "json", False)) as arguments.stdout,
            out_of_memory_explained(lambda: _ELSEWHERE),
            joined(arguments),
        ):
            return arguments.run(arguments)
    except S3DError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has closed it
        sys.stderr.close()
        return 141
    finally:
        warnings.formatwarning = usual


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="s3d", description=_DESCRIPTION, formatter_class=RAW)
    parser.add_argument("--version", action="version", version=f"s3d_jax {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (generate, chat, train, pretrain, distill, draft, bench, tune, info):
        command.add_command(commands)
    return parser
