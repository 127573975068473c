"""The command `s3d tune`."""

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from s3d_jax.commands.generation import ModelOptions, add_model, load_model
from s3d_jax.errors import InputError
from s3d_jax.settings.arguments import RAW, add_options, build
from s3d_jax.settings.options import option
from s3d_jax.settings.records import Checked

if TYPE_CHECKING:
    from s3d_jax.lm import LM
    from s3d_jax.texts.suites import Prompt

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
one; then all decode in turns, each as loading uses it, copies included. Merged drafts and those of
the kinds eagle and medusa keep the γ that they were trained with. Of two or more of the kind s3d
the fastest is the one that loading uses here from then on, unless --draft names another; those of
other kinds are used by --method.

Where more rows cost a pass little, as on GPUs, it also tries other candidates beside the first
draft tokens (--leaves of s3d generate), and keeps what is fastest.

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
    from s3d_jax.bench.report import about, check_plot
    from s3d_jax.lm import EMBEDDED
    from s3d_jax.storage.tuning import check_writable
    from s3d_jax.texts.suites import default_suites, read_suites
    from s3d_jax.tune import report

    options = build(_Options, arguments)
    gammas = parse_gammas(options.gammas)
    if options.plot:
        check_plot(options.plot)
    folder = Path(arguments.model or EMBEDDED)
    kinds = _drafts_to_compare(folder, options, getattr(arguments, "draft", None))
    lm = load_model(arguments, use_draft=not kinds)
    if not options.no_save:
        check_writable(folder)
    room = lm.max_length - options.max_new_tokens
    suites = options.suite or default_suites(lm, folder)
    common = {
        "about": about(),
        "model": folder.name,
        "suites": list(suites),
        "max_new_tokens": options.max_new_tokens,
    }
    prompts = read_suites(suites, lm, room, options.limit)
    session = _Session(options, gammas, folder, prompts, common)
    found = session.compare(lm, kinds) if kinds else session.tune(lm)
    if options.json:
        print(json.dumps(found), file=arguments.stdout)
    if options.plot:  # last: a failure here loses least
        report.draw(found, options.plot)
    return 0


@dataclasses.dataclass(frozen=True)
class _Session:
    """One run of the command.

    Attributes:
        options, gammas: what was asked for.
        folder: the checkpoint.
        prompts: of the suites.
        common: what all reports begin with (JSON).
        bars: the bar of the present stage.
    """

    options: _Options
    gammas: list[int]
    folder: Path
    prompts: Sequence["Prompt"]
    common: dict[str, Any]
    bars: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)

    def tune(self, lm: "LM", *, alone: bool = True) -> dict[str, Any]:
        """Tunes one draft, keeps and shows what was found, and lets the model use it.

        Args:
            lm: the model with the draft.
            alone: whether there is no other draft to compare it with.
        """
        from s3d_jax.storage.tuning import save_tuning
        from s3d_jax.tune import report
        from s3d_jax.tune.plan import tune

        with self.bars:
            plan = tune(
                lm,
                self.prompts,
                gammas=self.gammas,
                kind=self.options.search,
                max_new_tokens=self.options.max_new_tokens,
                check=self.options.check,
                progress=self._progress,
            )
        found = {
            **self.common,
            "precision": lm.config.precisions,
            "draft": lm.draft_name,
            "search": self.options.search,
            **plan.to_dict(),
        }
        lm.tuning = plan.tuning
        self._show(report.table(found))
        if not self.options.no_save:
            measured = {name: value for name, value in found.items() if name != "tuning"}
            path = save_tuning(self.folder, lm.config, lm.draft_name, plan.tuning, measured)
            if alone:
                use = "loading the model on this device uses it from now on"
                self._show(f"\nKept in {path}: {use}.")
        return found

    def compare(self, lm: "LM", kinds: Mapping[str, str]) -> dict[str, Any]:
        """Tunes each draft of two passes, lets all decode in turns, and keeps the fastest of S3D.

        Args:
            lm: the model, with any draft.
            kinds: of the drafts to compare.
        """
        from s3d_jax.drafters.stored import S3D
        from s3d_jax.lm import with_draft
        from s3d_jax.storage.tuning import save_preferred
        from s3d_jax.tune import report
        from s3d_jax.tune.contest import compare

        drafts = {name: (kind, with_draft(lm, self.folder, name)) for name, kind in kinds.items()}
        plans = []
        for name, (kind, model) in drafts.items():
            if kind == S3D and model.draft_config.mode != "merged":
                self._show(f"## {name}\n")
                plans.append(self.tune(model, alone=False))
                self._show("")
        with self.bars:
            standings = compare(
                drafts,
                self.prompts,
                max_new_tokens=self.options.max_new_tokens,
                progress=self._progress,
            )
        rows = [dataclasses.asdict(standing) for standing in standings]
        ours = [standing.draft for standing in standings if standing.method == S3D]
        preferred = ours[0] if len(ours) > 1 else None  # one alone was not compared
        found = {**self.common, "plans": plans, "drafts": rows, "preferred": preferred}
        self._show(report.comparison(found))
        if preferred and not self.options.no_save:
            measured = {**self.common, "drafts": rows}
            path = save_preferred(self.folder, lm.config, preferred, measured)
            self._show(
                f"\nKept in {path}: loading the model in {lm.config.precisions} on this device "
                f"uses {preferred!r} from now on, unless --draft names another."
            )
        return found

    def _progress(self, what: str, total: int) -> Callable[[], None]:
        from tqdm import tqdm

        self.bars.close()  # the bar of the stage before
        bar = self.bars.enter_context(tqdm(total=total, desc=what, disable=None, leave=False))
        return lambda: bar.update() and None

    def _show(self, text: str) -> None:
        if not self.options.json:
            print(text)


def _drafts_to_compare(folder: Path, options: _Options, draft: str | None) -> dict[str, str]:
    """The kinds of the drafts to compare, by name; none without --drafts.

    Raises:
        CheckpointError: there is no checkpoint, or a draft is missing or damaged.
        InputError: options that do not fit together, fewer than two drafts, or one of a kind that
            is not known here.
    """
    from s3d_jax.drafters.stored import KINDS, choose_draft, draft_kind, draft_names
    from s3d_jax.storage.native import read_header

    if options.drafts is None:
        return {}
    if draft is not None:
        raise InputError("--draft names the only draft to tune: leave it out with --drafts")
    if options.plot:
        raise InputError("--plot shows the tuning of one draft: leave it out with --drafts")
    known = draft_names(read_header(folder).path)
    names = list(known) if options.drafts == "all" else options.drafts.split(",")
    for name in names:
        if name not in known:
            choose_draft(folder, name)  # says which drafts there are
    kinds = {name: draft_kind(folder, name) for name in names}
    if foreign := [name for name, kind in kinds.items() if kind not in KINDS]:
        raise InputError(
            f"the draft {foreign[0]!r} of {folder} is of the kind {kinds[foreign[0]]!r}, which is "
            "not known here: name those to compare (--drafts NAME,NAME)"
        )
    if len(kinds) < 2:
        raise InputError(
            f"--drafts compares two drafts or more, got {', '.join(names) or 'none'}: leave it out "
            "to tune one, or add another (s3d train --name, s3d draft add --name)"
        )
    return kinds


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
