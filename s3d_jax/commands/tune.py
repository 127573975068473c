"""The command `s3d tune`."""

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from s3d_jax.commands.generation import ModelOptions, add_model, load_model
from s3d_jax.errors import InputError
from s3d_jax.settings.arguments import RAW, add_options, build
from s3d_jax.settings.options import option
from s3d_jax.settings.records import Checked

_MOST = 64  # draft tokens; far more than ever pays off

_DESCRIPTION = """\
Chooses γ and the layers to skip for this device: measures what plain decoding, the verify pass and
the draft pass cost, and how many draft tokens are accepted on calibration prompts; predicts the
improvement factor (speed over plain decoding) of every setting; measures some of them to check the
predictions; and keeps the fastest for each dtype in the checkpoint's tuning.json, where loading
finds it. It tunes for one greedy row. The choice never changes the output of S3D."""

_EPILOG = """\
Predictions use every other prompt of each category; up to 8 of the others check them. Acceptance
depends on the prompts: take prompts like the ones that the model will see.

--search chooses one set of layers for each number of skipped layers:
  symmetric  the middle ones: no search (default)
  band       the best contiguous ones: about L²/2 draft passes over the texts, for L layers
  greedy     any: skips one more layer at a time, the one whose loss costs least; as many passes
  dp         any: dynamic programming over (layer, layers skipped so far) by the similarity of
             hidden states, as in CLaSp (arXiv 2505.24196); one pass as costly as L
The layers that a trained draft was trained to skip are always a candidate.

examples:
  s3d tune --plot tuning.png
  s3d tune --model models/smollm --suite mt_bench.jsonl --search greedy
  s3d tune --gammas 2,4,6 --limit 4 --check 2 --no-save        # a first look"""


@dataclasses.dataclass(frozen=True)
class _Options(Checked):
    suite: tuple[str, ...] = option(
        (),
        "prompts, as in s3d bench; may be repeated",
        metavar="NAME|FILE",
        shown="as in s3d bench: chat for a model with a chat template",
    )
    limit: int = option(16, "prompts of each category at most", least=1)
    max_new_tokens: int = option(128, "tokens to generate per prompt", least=1)
    gammas: str = option("1,2,3,4,5,6,8", "draft tokens per iteration to consider", metavar="LIST")
    search: Literal["symmetric", "band", "greedy", "dp"] = option(  # as in search.py, without jax
        "symmetric", "sets of layers, see below"
    )
    check: int = option(
        6,
        "settings that are measured: half have the best predictions, the others cover all "
        "settings; the fastest is chosen. 0 trusts the prediction",
        least=0,
    )
    no_save: bool = option(False, "show the choice, and keep nothing")
    json: bool = option(False, "print one JSON object and no tables")
    plot: Path | None = option(None, "draw a PNG (needs matplotlib)", metavar="FILE")


def add_command(commands: Any) -> None:
    """Adds `tune` to the subparsers of `s3d`."""
    parser = commands.add_parser(
        "tune",
        help="choose γ and the layers to skip for this device",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=RAW,
    )
    add_model(parser)
    add_options(parser, ModelOptions, ["draft", "dtype", "kv_cache"])
    add_options(parser, _Options)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Tunes, and keeps the choice."""
    from tqdm import tqdm

    from s3d_jax.bench.report import about, check_plot
    from s3d_jax.drafters.stored import choose_draft
    from s3d_jax.lm import EMBEDDED
    from s3d_jax.storage.tuning import check_writable, save_tuning
    from s3d_jax.texts.suites import default_suites, read_suites
    from s3d_jax.tune import report
    from s3d_jax.tune.plan import tune

    options = build(_Options, arguments)
    gammas = parse_gammas(options.gammas)
    if options.plot:
        check_plot(options.plot)
    lm = load_model(arguments)
    folder = Path(arguments.model or EMBEDDED)
    if not options.no_save:
        check_writable(folder)
    room = lm.max_length - options.max_new_tokens
    suites = options.suite or default_suites(lm, folder)
    prompts = read_suites(suites, lm, room, options.limit)
    with contextlib.ExitStack() as stack:

        def progress(what: str, total: int) -> Callable[[], None]:
            stack.close()  # the bar of the stage before
            bar = stack.enter_context(tqdm(total=total, desc=what, disable=None, leave=False))
            return lambda: bar.update() and None

        plan = tune(
            lm,
            prompts,
            gammas=gammas,
            kind=options.search,
            max_new_tokens=options.max_new_tokens,
            check=options.check,
            progress=progress,
        )
    draft = choose_draft(folder, getattr(arguments, "draft", None))
    found = {
        "about": about(),
        "model": folder.name,
        "precision": lm.config.precisions,
        "draft": draft,
        "suites": list(suites),
        "search": options.search,
        "max_new_tokens": options.max_new_tokens,
        **plan.to_dict(),
    }
    if options.json:
        print(json.dumps(found), file=arguments.stdout)
    else:
        print(report.table(found))
    if not options.no_save:
        measured = {name: value for name, value in found.items() if name != "tuning"}
        path = save_tuning(folder, lm.config, draft, plan.tuning, measured)
        if not options.json:
            print(f"\nKept in {path}: loading the model on this device uses it from now on.")
    if options.plot:  # last: a failure here loses least
        report.draw(found, options.plot)
    return 0


def parse_gammas(text: str) -> list[int]:
    """ "2,4" -> [2, 4].

    Raises:
        InputError: it is not a list of numbers from 1 to 64.
    """
    try:
        gammas = [int(part) for part in text.split(",")]
    except ValueError:
        gammas = [0]
    if not all(1 <= gamma <= _MOST for gamma in gammas):
        raise InputError(f"--gammas takes numbers from 1 to {_MOST}, such as 2,4,6, got {text!r}")
    return gammas
