"""The command `s3d chat`."""

import argparse
import sys
from typing import Any

from s3d_jax.commands.generation import add_decoding, add_model, decoding_options, load_model
from s3d_jax.errors import InputError


def add_command(commands: Any) -> None:
    """Adds `chat` to the subparsers of `s3d`."""
    parser = commands.add_parser(
        "chat",
        help="talk with a model that has a chat template",
        description="A conversation in the terminal. Ctrl-C ends an answer, an empty line or "
        "Ctrl-D the conversation. When the context has no room left for an answer, the oldest "
        "turns are forgotten.",
    )
    add_model(parser)
    add_decoding(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message to begin with")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Answers questions from standard input until it ends."""
    lm = load_model(arguments)
    conversation = lm.conversation(arguments.system or None, **decoding_options(arguments, lm))
    interactive = sys.stdin.isatty()
    while True:
        try:
            question = input("> " if interactive else "").strip()
        except EOFError:
            return 0
        if not question:
            return 0
        try:
            answer = conversation.stream(question)
            for piece in answer:
                print(piece, end="", flush=True)
            answer.result.check()
        except InputError as error:  # the question is refused; the conversation continues
            print(f"error: {error}", file=sys.stderr)
            continue
        except KeyboardInterrupt:
            print(" ...", end="")
        print()
