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

--drafts compares trained drafts of one model: those of the mode two-pass are tuned first, one by
one; then all decode in turns, with the settings that loading takes. Of the kind s3d the fastest is
the one that loading uses here from then on, unless --draft names another. Drafts of the kinds eagle
and medusa are compared too; they are used by --method.

examples:
  s3d tune --plot tuning.png
  s3d tune --model models/smollm --suite mt_bench.jsonl --search greedy
  s3d tune --gammas 2,4,6 --limit 4 --check 2 --no-save        # a first look
  s3d tune --model models/smollm --drafts all                  # which draft is the fastest here"""


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
    drafts: str | None = option(
        None,
        "compare several trained drafts, see below",
        metavar="all|NAME,NAME",
        shown="tune one draft (--draft)",
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
    from s3d_jax.drafters.stored import S3D, draft_kind
    from s3d_jax.lm import EMBEDDED, LM, with_draft
    from s3d_jax.storage.tuning import check_writable, save_preferred, save_tuning
    from s3d_jax.texts.suites import default_suites, read_suites
    from s3d_jax.tune import report
    from s3d_jax.tune.contest import compare
    from s3d_jax.tune.plan import tune

    options = build(_Options, arguments)
    gammas = parse_gammas(options.gammas)
    if options.plot:
        check_plot(options.plot)
    folder = Path(arguments.model or EMBEDDED)
    names = _compared(folder, options, getattr(arguments, "draft", None))
    lm = load_model(arguments, use_draft=not names)
    if not options.no_save:
        check_writable(folder)
    room = lm.max_length - options.max_new_tokens
    suites = options.suite or default_suites(lm, folder)
    prompts = read_suites(suites, lm, room, options.limit)
    stack = contextlib.ExitStack()

    def progress(what: str, total: int) -> Callable[[], None]:
        stack.close()  # the bar of the stage before
        bar = stack.enter_context(tqdm(total=total, desc=what, disable=None, leave=False))
        return lambda: bar.update() and None

    def tuned(lm: LM) -> dict[str, Any]:
        """Tunes one draft, and keeps and shows what was found."""
        with stack:
            plan = tune(
                lm,
                prompts,
                gammas=gammas,
                kind=options.search,
                max_new_tokens=options.max_new_tokens,
                check=options.check,
                progress=progress,
            )
        found = {
            **common,
            "precision": lm.config.precisions,
            "draft": lm.draft_name,
            "search": options.search,
            **plan.to_dict(),
        }
        lm.tuning = plan.tuning
        show(report.table(found))
        if not options.no_save:
            measured = {name: value for name, value in found.items() if name != "tuning"}
            path = save_tuning(folder, lm.config, lm.draft_name, plan.tuning, measured)
            show(f"\nKept in {path}: loading the model on this device uses it from now on.")
        return found

    def show(text: str) -> None:
        if not options.json:
            print(text)

    common = {
        "about": about(),
        "model": folder.name,
        "suites": list(suites),
        "max_new_tokens": options.max_new_tokens,
    }
    if not names:
        found = tuned(lm)
    else:
        kinds = {name: draft_kind(folder, name) for name in names}
        drafts = {name: (kinds[name], with_draft(lm, folder, name)) for name in names}
        plans = []
        for name, (kind, model) in drafts.items():
            if kind == S3D and model.draft_config.mode != "merged":
                show(f"## {name}\n")
                plans.append(tuned(model))
                show("")
        with stack:
            standings = compare(
                drafts, prompts, max_new_tokens=options.max_new_tokens, progress=progress
            )
        rows = [dataclasses.asdict(standing) for standing in standings]
        preferred = next((s.draft for s in standings if s.method == S3D), None)
        found = {**common, "plans": plans, "drafts": rows, "preferred": preferred}
        show(report.comparison(found))
        if preferred and not options.no_save:
            measured = {**common, "drafts": rows}
            path = save_preferred(folder, lm.config, preferred, measured)
            show(f"\nKept in {path}: loading uses {preferred!r} here, unless --draft is given.")
    if options.json:
        print(json.dumps(found), file=arguments.stdout)
    if options.plot:  # last: a failure here loses least
        report.draw(found, options.plot)
    return 0


def _compared(folder: Path, options: _Options, draft: str | None) -> list[str]:
    """The drafts to compare; none without --drafts.

    Raises:
        InputError: options that do not fit together, fewer than two drafts, or one that is missing.
    """
    from s3d_jax.drafters.stored import draft_names

    if options.drafts is None:
        return []
    if draft is not None:
        raise InputError("--draft names the only draft to tune: leave it out with --drafts")
    if options.plot:
        raise InputError("--plot shows the tuning of one draft: leave it out with --drafts")
    known = draft_names(folder)
    names = list(known) if options.drafts == "all" else options.drafts.split(",")
    for name in names:
        if name not in known:
            raise InputError(f"{folder} has no draft {name!r}: it has {', '.join(known) or 'none'}")
    if len(set(names)) < 2:
        raise InputError(f"--drafts compares two drafts or more, got {', '.join(names) or 'none'}")
    return list(dict.fromkeys(names))


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
