"""From costs and acceptance to settings: predict, check against measurement, choose."""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from s3d_jax.bench import measure
from s3d_jax.bench.contestants import Ours
from s3d_jax.drafters.s3d import takes_leaves
from s3d_jax.errors import ConfigError, InputError
from s3d_jax.jax_settings import under_usual_jax_settings
from s3d_jax.lm import LM
from s3d_jax.settings.drafting import Tuning
from s3d_jax.texts.suites import Prompt
from s3d_jax.tune.acceptance import (
    Expected,
    Judge,
    Skip,
    fit_acceptance,
    num_measured,
    write_texts,
)
from s3d_jax.tune.combs import Comb, combs_of, extra_rows, with_fastest, worth_trying
from s3d_jax.tune.costs import Clock, Costs, num_programs
from s3d_jax.tune.search import Search, num_judged, search

GAMMAS = (1, 2, 3, 4, 5, 6, 8)

_TIMED_PROMPTS = _CHECK_PROMPTS = 8
_TURNS = 3  # of every setting on every prompt, that count

Setting = tuple[Skip, int]  # what is skipped, and γ
Progress = Callable[[str, int], Callable[[], None]]  # (stage, steps) -> call after each step


@dataclasses.dataclass(frozen=True)
class Candidate(Expected):
    """A set of layers to skip, and what it is worth.

    Attributes:
        improvement_factor: speed over plain decoding, by γ.
    """

    improvement_factor: Mapping[int, float]


@dataclasses.dataclass(frozen=True)
class Check:
    """A prediction, and the measurement that checks it, on other prompts where there are enough.

    Attributes:
        gamma, skip: the settings.
        predicted, measured: the improvement factor; the measured one of each prompt's median times.
        spread: its standard deviation over the repeats.
        predicted_tau, measured_tau: tokens per iteration.
        identical_to_ar: share of outputs that equal plain decoding.
    """

    gamma: int
    skip: Skip
    predicted: float
    measured: float
    spread: float
    predicted_tau: float
    measured_tau: float
    identical_to_ar: float

    @property
    def error(self) -> float:
        """Error of the prediction, relative to the measurement."""
        return self.predicted / self.measured - 1


@dataclasses.dataclass(frozen=True)
class TuningPlan:
    """What tuning found.

    Attributes:
        candidates: the sets of layers, by their size, with their improvement factors.
        costs: of the passes; the predictions use them.
        checks: predictions that were measured.
        combs: leaves beside the draft tokens of the choice, and none, compared; empty where none
            can pay, or without checks.
        tuning: the choice: the fastest of the checked settings, with the leaves of the fastest
            comb; or without checks the best prediction.
        calibration_prompts, calibration_tokens, check_prompts: what was decoded.
        held_out: whether the check uses other prompts than the prediction.
    """

    candidates: tuple[Candidate, ...]
    costs: Costs
    checks: tuple[Check, ...]
    combs: tuple[Comb, ...]
    tuning: Tuning
    calibration_prompts: int
    calibration_tokens: int
    check_prompts: int
    held_out: bool

    @property
    def pays(self) -> bool:
        """Whether S3D is faster than plain decoding."""
        return self.tuning.improvement_factor > 1

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "tuning": self.tuning.to_dict(),
            "pays": self.pays,
            "costs": dataclasses.asdict(self.costs),
            "candidates": [dataclasses.asdict(candidate) for candidate in self.candidates],
            "checks": [dataclasses.asdict(c) | {"error": c.error} for c in self.checks],
            "combs": [dataclasses.asdict(comb) for comb in self.combs],
            "calibration_prompts": self.calibration_prompts,
            "calibration_tokens": self.calibration_tokens,
            "check_prompts": self.check_prompts,
            "held_out": self.held_out,
        }


@under_usual_jax_settings
def tune(
    lm: LM,
    prompts: Sequence[Prompt],
    *,
    gammas: Sequence[int] = GAMMAS,
    kind: Search = "symmetric",
    max_new_tokens: int = 128,
    check: int = 6,
    progress: Progress = lambda what, total: lambda: None,
) -> TuningPlan:
    """Looks for the γ and the skipped layers with which S3D decodes one greedy row fastest.

    Args:
        lm: the model with its draft. The layers that a trained draft skips are a candidate in
            addition to what the search finds.
        prompts: typical prompts. Predictions use every other prompt of each category; up to 8 of
            the rest check them. (Where no category has two, all are used for both.)
        gammas: which γ to consider.
        kind: how sets of layers are searched for; see search.py.
        max_new_tokens: per prompt.
        check: how many settings are measured: half of them the best, the others spread over all
            predictions.
        progress: (stage, its number of steps) -> a function to call after each step.

    Raises:
        ConfigError: the draft is merged.
        InputError: no prompt, or the model continues none of them; a model of one layer; or the
            search "dp" needs too much memory.
    """
    if not prompts:
        raise InputError("tuning needs a prompt")
    if lm.draft_config.mode == "merged":
        raise ConfigError(
            "a merged draft skips no layers and has no draft pass, so there are none to choose or "
            "to time: compare values of gamma with s3d bench, or tune a two-pass draft (--draft)"
        )
    if lm.config.num_layers < 2:
        raise InputError("a model of one layer has none that a draft could skip")
    gammas = sorted(set(gammas))
    calibration, held_out = split(prompts)
    others = to_check_with(prompts)

    step = progress("writing", 1)
    texts = write_texts(lm, calibration, max_new_tokens)
    step()
    judge = Judge(lm, texts, gammas[-1])
    found = search(kind, judge, progress("searching", num_judged(kind, lm.config.num_layers)))
    own = lm.draft_config.skip
    timed = list({sum(skip): skip for skip in (found[0], found[-1], own)}.values())
    extra = extra_rows(lm)
    clock = Clock(
        lm,
        timed,
        gammas,
        texts,
        max_new_tokens,
        extra,
        progress("compiling", num_programs(timed, gammas, extra)),
    )
    step = progress("accepting", num_measured(found, own))
    expected = fit_acceptance(found, own, gammas, judge.acceptance, step)
    clock.take_turns()
    costs = clock.costs()
    best, gamma = _ranking(predict(expected, costs))[0]
    some = calibration[:: -(-len(calibration) // _TIMED_PROMPTS)]
    plain, ours = decoded(
        _with_settings(lm, [(best.skip, gamma)]), some, max_new_tokens, "timing", progress
    )
    costs = costs.scaled(
        _seconds_per_iteration(plain), best.kept, gamma, _seconds_per_iteration(ours)
    )
    candidates = predict(expected, costs)
    settings = _to_check(candidates, check)
    rows = []
    if settings:
        in_turns = _with_settings(lm, settings)
        rows = decoded(in_turns, others, max_new_tokens, "checking", progress)
    checks = _compared(candidates, settings, rows)
    tuning, combs = choose(candidates, costs, checks), tuple[Comb, ...]()
    worth = worth_trying(costs, tuning) if checks and takes_leaves(lm.config) else []
    if worth:
        tried = [(), *worth]
        in_turns = _with_settings(lm, [(tuning.skip, tuning.gamma)] * len(tried), tried)
        rows = decoded(in_turns, others, max_new_tokens, "trying leaves", progress)
        combs = combs_of(tried, rows)
        tuning = with_fastest(tuning, combs, costs)
    return TuningPlan(
        candidates=tuple(candidates),
        costs=costs,
        checks=checks,
        combs=combs,
        tuning=tuning,
        calibration_prompts=len(calibration),
        calibration_tokens=texts.new_tokens,
        check_prompts=len(others) if checks else 0,
        held_out=bool(held_out),
    )


def split(prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """Every other prompt of each category, from its first on; and the prompts between."""
    by_category: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_category.setdefault(prompt.category, []).append(prompt)
    rows = by_category.values()
    return [p for row in rows for p in row[::2]], [p for row in rows for p in row[1::2]]


def to_check_with(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Up to 8 of the prompts that predictions do not use; of all where they use all."""
    calibration, held_out = split(prompts)
    others = held_out or calibration
    return others[:: -(-len(others) // _CHECK_PROMPTS)]


def predict(expected: Sequence[Expected], costs: Costs) -> list[Candidate]:
    """The improvement factor of every set with every γ: τ divided by the cost of an iteration."""
    return [
        Candidate(
            **vars(e),
            improvement_factor={
                gamma: tau / costs.relative(e.kept, gamma).iteration(gamma)
                for gamma, tau in e.tokens_per_iteration.items()
            },
        )
        for e in expected
    ]


def choose(candidates: Sequence[Candidate], costs: Costs, checks: Sequence[Check]) -> Tuning:
    """The fastest of the measured settings; without measurements the best prediction."""
    if checks:
        fastest = max(checks, key=lambda check: check.measured)
        skip, gamma, factor = fastest.skip, fastest.gamma, fastest.measured
    else:
        best, gamma = _ranking(candidates)[0]
        skip, factor = best.skip, best.improvement_factor[gamma]
    return Tuning(gamma, skip, costs.relative(len(skip) - sum(skip), gamma), factor)


def _ranking(candidates: Sequence[Candidate]) -> list[tuple[Candidate, int]]:
    """All settings, the best prediction first."""
    settings = [(c, gamma) for c in candidates for gamma in c.improvement_factor]
    return sorted(settings, key=lambda s: -s[0].improvement_factor[s[1]])


def _to_check(candidates: Sequence[Candidate], count: int) -> list[Setting]:
    """Half of them the best, since one of these is chosen; the others spread over the rest."""
    ranking = _ranking(candidates)
    best = (count + 1) // 2
    rest = ranking[best:]
    places = np.linspace(0, max(len(rest) - 1, 0), count - best).astype(int)
    chosen = ranking[:best] + [rest[i] for i in np.unique(places) if rest]
    return [(candidate.skip, gamma) for candidate, gamma in chosen]


def _with_settings(
    lm: LM, settings: Sequence[Setting], combs: Sequence[tuple[int, ...]] | None = None
) -> list[Ours]:
    """Plain decoding, and S3D with each of the settings, with the leaves of each comb."""
    ours = [Ours("ar", {}, lm)]
    for (skip, gamma), leaves in zip(settings, combs or [()] * len(settings), strict=True):
        options = {"gamma": gamma, "skip": skip, "leaves": leaves, "adaptive": False}
        ours.append(Ours("s3d", options, lm))
    return ours


def decoded(
    contestants: Sequence[Ours],
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    what: str,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Lets contestants decode in turns, as `s3d bench` does.

    Returns:
        Its rows, with the seconds that decoding all prompts took. The first contestant, plain
        decoding, is what the others are compared with.
    """
    step = progress(what, len(contestants) * len(prompts) * (1 + _TURNS))
    records = measure.take_turns(contestants, prompts, max_new_tokens, _TURNS, step)
    rows = measure.summary(contestants, prompts, records, max_new_tokens)
    whole = [row for row in rows if row["category"] == "all"]
    for c, row in enumerate(whole):
        # A prompt's median time, since a busy machine is slow in single turns.
        times: dict[int, list[float]] = {}
        for record in records:
            if record.contestant == c and record.repeat > 0:
                times.setdefault(record.prompt, []).append(record.run.decode_seconds)
        row["seconds"] = sum(map(statistics.median, times.values()))
    return whole


def _seconds_per_iteration(row: Mapping[str, Any]) -> float:
    return row["seconds"] * row["tokens_per_iteration"] / row["new_tokens"]


def _compared(
    candidates: Sequence[Candidate],
    settings: Sequence[Setting],
    rows: Sequence[Mapping[str, Any]],
) -> tuple[Check, ...]:
    if not rows:
        return ()
    plain, *rows = rows
    by_skip = {candidate.skip: candidate for candidate in candidates}
    return tuple(
        Check(
            gamma=gamma,
            skip=skip,
            predicted=by_skip[skip].improvement_factor[gamma],
            measured=plain["seconds"] / row["seconds"],
            spread=row["improvement_factor_spread"],
            predicted_tau=by_skip[skip].tokens_per_iteration[gamma],
            measured_tau=row["tokens_per_iteration"],
            identical_to_ar=row["identical_to_ar"],
        )
        for (skip, gamma), row in zip(settings, rows, strict=True)
    )
