"""The command `s3d tune`."""

import argparse
import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from s3d_jax.errors import InputError

_SEARCHES = ("symmetric", "band", "greedy", "dp")  # search.py says the same, and imports jax
_GAMMAS = "1,2,3,4,5,6,8"
_MOST = 64  # draft tokens; far more than ever pay

_DESCRIPTION = """\
Chooses γ and the layers to skip for this device: measures what plain decoding, the verify pass and
the draft pass cost, and how many draft tokens are accepted on calibration prompts; predicts the
improvement factor (speed over plain decoding) of every setting; measures some of them to check the
predictions; and keeps the fastest in the checkpoint's tuning.json, where loading finds it. For one
greedy row; the output of S3D is that of plain decoding whatever is chosen."""

_EPILOG = """\
Of each category every other prompt is predicted from; of the rest up to 8 are what predictions are
checked on. Take prompts like those to come: acceptance depends on them.

--search says which sets of layers are looked at, one for each number of layers:
  symmetric  the middle ones. Nothing needs to be searched (default)
  band       the best contiguous ones. About L²/2 draft passes over the texts, of L layers
  greedy     any: one layer more at a time, the one that is missed least. As many passes
  dp         any: dynamic programming over (layer, layers skipped so far) by the likeness of hidden
             states, as in CLaSp (arXiv 2505.24196). One pass, as large as L
Where the draft is trained, the layers it was trained to skip are a candidate besides.

examples:
  s3d tune --plot tuning.png
  s3d tune --model models/smollm --suite mt_bench.jsonl --search greedy
  s3d tune --gammas 2,4,6 --limit 4 --check 2 --no-save        # a first look"""


def add_command(commands: Any) -> None:
    """Adds `tune` to the subparsers of `s3d`."""
    parser = commands.add_parser(
        "tune",
        help="choose γ and the layers to skip for this device",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", metavar="DIR", help="native checkpoint folder (default: the embedded model)"
    )
    parser.add_argument("--draft", metavar="NAME", help="which of the trained drafts")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="cast the weights while loading; settings are kept for each dtype",
    )
    parser.add_argument(
        "--suite",
        action="append",
        metavar="NAME|FILE",
        help="prompts, as in s3d bench; may be repeated (default: stories and dialogues)",
    )
    parser.add_argument(
        "--limit",
        type=int,
        default=16,
        metavar="N",
        help="prompts of each category at most (default: 16)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: 128")
    parser.add_argument(
        "--gammas",
        default=_GAMMAS,
        metavar="LIST",
        help=f"draft tokens per iteration to consider (default: {_GAMMAS})",
    )
    parser.add_argument(
        "--search", choices=_SEARCHES, default="symmetric", help="sets of layers: see below"
    )
    parser.add_argument(
        "--check",
        type=int,
        default=6,
        metavar="N",
        help="settings that are measured, half of them the best predictions and the others from "
        "all over the surface; the fastest is chosen. 0 trusts the prediction (default: 6)",
    )
    parser.add_argument(
        "--no-save", action="store_true", help="show what would be chosen, and keep nothing"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and no tables")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw a PNG (needs matplotlib)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from s3d_jax.bench.report import about, check_plot
    from s3d_jax.drafters.stored import choose_draft
    from s3d_jax.lm import EMBEDDED, load
    from s3d_jax.storage.tuning import check_writable, save_tuning
    from s3d_jax.texts.suites import read_suites
    from s3d_jax.tune import report
    from s3d_jax.tune.plan import tune

    gammas = parse_gammas(arguments.gammas)
    for name, least in (("limit", 1), ("max_new_tokens", 1), ("check", 0)):
        if (value := getattr(arguments, name)) < least:
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if arguments.plot:
        check_plot(arguments.plot)
    lm = load(arguments.model, dtype=arguments.dtype, draft=arguments.draft, progress=True)
    folder = Path(arguments.model or EMBEDDED)
    if not arguments.no_save:
        check_writable(folder)
    suites = arguments.suite or ["stories", "dialogues"]
    room = lm.max_length - arguments.max_new_tokens
    prompts = read_suites(suites, lm, room, arguments.limit)
    with contextlib.ExitStack() as stack:

        def progress(what: str, total: int) -> Callable[[], None]:
            stack.close()  # the bar of the stage before
            bar = stack.enter_context(tqdm(total=total, desc=what, disable=None, leave=False))
            return lambda: bar.update() and None

        plan = tune(
            lm,
            prompts,
            gammas=gammas,
            kind=arguments.search,
            max_new_tokens=arguments.max_new_tokens,
            check=arguments.check,
            progress=progress,
        )
    draft = choose_draft(folder, arguments.draft)
    found = {
        "about": about(),
        "model": folder.name,
        "precision": lm.config.precision,
        "draft": draft,
        "suites": suites,
        "search": arguments.search,
        "max_new_tokens": arguments.max_new_tokens,
        **plan.to_dict(),
    }
    print(json.dumps(found) if arguments.json else report.table(found))
    if not arguments.no_save:
        measured = {name: value for name, value in found.items() if name != "tuning"}
        path = save_tuning(folder, lm.config, draft, plan.tuning, measured)
        if not arguments.json:
            print(f"\nKept in {path}: loading the model on this device takes it from now on.")
    if arguments.plot:  # last, since it is the least that can be lost
        report.draw(found, arguments.plot)
    return 0


def parse_gammas(text: str) -> list[int]:
    """ "2,4" -> [2, 4].

    Raises:
        InputError: it is no list of numbers from 1 on.
    """
    try:
        gammas = [int(part) for part in text.split(",")]
    except ValueError:
        gammas = [0]
    if not all(1 <= gamma <= _MOST for gamma in gammas):
        raise InputError(f"--gammas takes numbers from 1 to {_MOST}, such as 2,4,6, got {text!r}")
    return gammas
