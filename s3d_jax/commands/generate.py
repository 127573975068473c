"""The command `s3d generate`."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from s3d_jax.commands.generation import add_decoding, add_model, decoding_options, load_model
from s3d_jax.commands.hosts import add_hosts
from s3d_jax.errors import InputError
from s3d_jax.settings.arguments import RAW

if TYPE_CHECKING:
    from s3d_jax.engine.results import Stats

_EPILOG = """\
examples:
  s3d generate "Once upon a time"
  s3d generate "Once upon a time" "The dog" --model models/smollm --temperature 0.8 --json
  echo "Once upon a time" | s3d generate - --method ar"""


def add_command(commands: Any) -> None:
    """Adds `generate` to the subparsers of `s3d`."""
    parser = commands.add_parser(
        "generate",
        help="continue one or more prompts",
        description="Continues one or more prompts, all in one batch, and prints the texts.",
        epilog=_EPILOG,
        formatter_class=RAW,
    )
    parser.add_argument(
        "prompt", nargs="+", metavar="PROMPT", help="a text; - reads standard input"
    )
    add_model(parser)
    add_decoding(parser)
    add_hosts(parser)
    parser.add_argument(
        "--ids",
        action="store_true",
        help='prompts and output are token ids ("1 15 7"), for checkpoints without a tokenizer',
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object per prompt: text, tokens, finish_reason, error, stats",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints the continuations, and on standard error what they cost."""
    from tqdm import tqdm

    if arguments.prompt.count("-") > 1:
        raise InputError("standard input (-) can be read only once")
    texts = [sys.stdin.read().rstrip("\n") if p == "-" else p for p in arguments.prompt]
    prompts = [_parse_ids(text) for text in texts] if arguments.ids else texts
    lm = load_model(arguments)
    options = decoding_options(arguments, lm)
    total = options["max_new_tokens"] * len(prompts)
    with tqdm(total=total, desc="generating", unit=" tokens", disable=None, leave=False) as bar:
        results = lm.generate(prompts, progress=lambda n: bar.update(n - bar.n) and None, **options)
    for text, result in zip(texts, results, strict=True):
        if arguments.json:
            names = ("text", "tokens", "finish_reason", "stopped_by", "error")
            fields = {name: getattr(result, name) for name in names}
            stats = result.stats.to_dict()
            print(json.dumps({"prompt": text, **fields, "stats": stats}), file=arguments.stdout)
        elif arguments.ids or result.text is None:
            print(*result.tokens)
        else:
            print(text + result.text)
    if not arguments.json:
        print(_costs(arguments.method, [result.stats for result in results]), file=sys.stderr)
    for result in results:  # after what the others have given
        result.check()
    return 0


def _costs(method: str, stats: Sequence["Stats"]) -> str:
    new, iterations = sum(s.new_tokens for s in stats), sum(s.iterations for s in stats)
    seconds = stats[0].decode_seconds
    share = sum(s.plain_iterations for s in stats) / max(iterations, 1)
    plain = f", {share:.0%} of them plain" if method != "ar" and share else ""
    if share := sum(s.copying_iterations for s in stats) / max(iterations, 1):
        plain += f", {share:.0%} copied"
    return (
        f"[{method}: {new} tokens in {seconds:.2f} s ({new / seconds:.1f}/s), "
        f"{new / max(iterations, 1):.2f} per iteration{plain}; "
        f"prefill {stats[0].prefill_seconds:.2f} s, "
        f"compilation {stats[0].compile_seconds:.1f} s]"
    )


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError as error:
        raise InputError(f"--ids takes numbers, got {text!r}") from error
