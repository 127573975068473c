"""From costs and acceptance to settings: predict, check against measurement, choose."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from s3d_jax.bench import measure
from s3d_jax.bench.contestants import Ours
from s3d_jax.bench.suites import Prompt
from s3d_jax.errors import InputError
from s3d_jax.generate import LM
from s3d_jax.tune.acceptance import Acceptance, Judge, Skip, write_texts
from s3d_jax.tune.costs import Costs, measure_costs, num_programs
from s3d_jax.tune.search import Search, num_judged, search
from s3d_jax.tuning import Tuning

GAMMAS = (1, 2, 3, 4, 5, 6, 8)

_MEASURED_DEPTHS = 12  # of a search's sets; acceptance of the others lies between its neighbours'
_CHECK_PROMPTS, _CHECK_TURNS = 8, 3

Progress = Callable[[str, int], Callable[[], None]]  # (what, how often) -> to call so often


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A set of layers to skip, and what is expected of it.

    Attributes:
        skip: one entry per layer, True where the draft jumps over it.
        tokens_per_iteration: τ by γ.
        acceptance: share of iterations in which the i-th token of the longest draft is accepted.
        improvement_factor: speed over plain decoding, by γ.
        measured: False where acceptance was not measured but lies between neighbouring depths.
    """

    skip: Skip
    tokens_per_iteration: Mapping[int, float]
    acceptance: tuple[float, ...]
    improvement_factor: Mapping[int, float]
    measured: bool

    @property
    def kept(self) -> int:
        """Layers that the draft pass runs."""
        return len(self.skip) - sum(self.skip)


@dataclasses.dataclass(frozen=True)
class Check:
    """A prediction beside what came out, on prompts that it was not made from.

    Attributes:
        gamma, skip: the settings.
        predicted, measured: the improvement factor.
        spread: standard deviation of the measured one over the repeats.
        predicted_tau, measured_tau: tokens per iteration.
        identical_to_ar: share of outputs that are those of plain decoding.
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
        """Of the prediction, relative to the measurement."""
        return self.predicted / self.measured - 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was found.

    Attributes:
        candidates: the sets of layers, by their size; the surface of improvement factors.
        costs: what the predictions rest on.
        checks: predictions that were measured.
        tuning: the choice: the fastest of the checked settings, and without checks the best
            prediction.
        calibration_prompts, calibration_tokens, check_prompts: what was decoded.
    """

    candidates: tuple[Candidate, ...]
    costs: Costs
    checks: tuple[Check, ...]
    tuning: Tuning
    calibration_prompts: int
    calibration_tokens: int
    check_prompts: int

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
            "calibration_prompts": self.calibration_prompts,
            "calibration_tokens": self.calibration_tokens,
            "check_prompts": self.check_prompts,
        }


def tune(
    lm: LM,
    prompts: Sequence[Prompt],
    *,
    gammas: Sequence[int] = GAMMAS,
    kind: Search = "symmetric",
    max_new_tokens: int = 128,
    check: int = 6,
    progress: Progress = lambda what, total: lambda: None,
) -> Plan:
    """Looks for the γ and the skipped layers with which S3D decodes one greedy row fastest.

    Args:
        lm: the model with its draft. Where that is trained, the layers it was trained to skip are a
            candidate beside those that the search finds.
        prompts: like those to come. Every other one is predicted from; of the rest up to 8 are what
            predictions are checked on. (A single prompt is used for both.)
        gammas: which γ to consider.
        kind: how sets of layers are looked for; see search.py.
        max_new_tokens: per prompt.
        check: how many settings are measured: half of them the best, the others from all over the
            surface.
        progress: told of each stage and its number of steps, gives what is called after each.

    Raises:
        InputError: no prompt, or the model continues none of them; a model of one layer.
    """
    if not prompts:
        raise InputError("tuning needs a prompt")
    if lm.config.num_layers < 2:
        raise InputError("a model of one layer has none that a draft could skip")
    gammas = sorted(set(gammas))
    calibration, others = prompts[::2], prompts[1::2] or prompts
    others = others[:: -(-len(others) // _CHECK_PROMPTS)]

    step = progress("writing texts", 1)
    texts = write_texts(lm, [p.tokens for p in calibration], max_new_tokens)
    step()
    judge = Judge(lm, texts, gammas[-1])
    found = search(kind, judge, progress("searching", num_judged(kind, lm.config.num_layers)))
    own = lm.draft_config.skip
    timed = list({sum(skip): skip for skip in (found[0], found[-1], own)}.values())
    costs = measure_costs(
        *(lm, timed, gammas, texts, max_new_tokens),
        progress("compiling and timing", num_programs(timed, gammas)),
    )
    candidates = predict(found, own, gammas, judge.acceptance, costs, progress)
    settings = _settings_to_check(candidates, check)
    checks = _measured(lm, settings, others, max_new_tokens, progress) if settings else ()
    return Plan(
        candidates=tuple(candidates),
        costs=costs,
        checks=checks,
        tuning=choose(candidates, costs, checks),
        calibration_prompts=len(calibration),
        calibration_tokens=texts.new_tokens,
        check_prompts=len(others) if checks else 0,
    )


def predict(
    found: Sequence[Skip],
    own: Skip,
    gammas: Sequence[int],
    acceptance: Callable[[Skip, int], Acceptance],
    costs: Costs,
    progress: Progress = lambda what, total: lambda: None,
) -> list[Candidate]:
    """The improvement factor of every set with every γ: τ over what an iteration costs.

    Of many sets, acceptance is measured for some, from the smallest to the largest; that of the
    others is taken to change evenly with the number of layers between these.

    Args:
        found: sets of layers, the smallest first.
        own: the draft's own set, always measured.
        gammas: in their order.
        acceptance: of a set and a γ.
        costs: of the passes.
        progress: as in `tune`.

    Returns:
        One candidate per set, the fewest layers kept first.
    """
    evenly = np.linspace(0, len(found) - 1, _MEASURED_DEPTHS).round().astype(int)
    some = [found[i] for i in np.unique(evenly)]
    known = list(dict.fromkeys([*some, own]))
    step = progress("acceptance", len(known))
    rows: dict[Skip, list[float]] = {}  # τ for each γ, and shares of positions
    for skip in known:
        each = [acceptance(skip, gamma) for gamma in gammas]
        rows[skip] = [*(a.tokens_per_iteration for a in each), *each[-1].per_position]
        step()
    depths, columns = [sum(s) for s in some], list(zip(*(rows[s] for s in some), strict=True))
    candidates = []
    for skip in dict.fromkeys([*found, own]):
        row = rows.get(skip) or [float(np.interp(sum(skip), depths, c)) for c in columns]
        taus = dict(zip(gammas, row, strict=False))
        kept = len(skip) - sum(skip)
        factors = {g: tau / costs.relative(kept, g).iteration(g) for g, tau in taus.items()}
        shares = tuple(row[len(gammas) :])
        candidates.append(Candidate(skip, taus, shares, factors, skip in rows))
    return sorted(candidates, key=lambda candidate: candidate.kept)


def choose(candidates: Sequence[Candidate], costs: Costs, checks: Sequence[Check]) -> Tuning:
    """The fastest of the settings that were measured; the best prediction where none was."""
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


def _settings_to_check(candidates: Sequence[Candidate], count: int) -> list[tuple[Candidate, int]]:
    """Half of them the best, since one of these is chosen; the others from all over the surface."""
    ranking = _ranking(candidates)
    best = (count + 1) // 2
    rest = ranking[best:]
    places = np.linspace(0, max(len(rest) - 1, 0), count - best).astype(int)
    return ranking[:best] + [rest[i] for i in np.unique(places) if rest]


def _measured(
    lm: LM,
    settings: Sequence[tuple[Candidate, int]],
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    progress: Progress,
) -> tuple[Check, ...]:
    """Decodes with each of the settings and plainly, in turns, as `s3d bench` does."""
    contestants = [
        Ours("ar", {}, lm),
        *(Ours("s3d", {"gamma": gamma, "skip": c.skip}, lm) for c, gamma in settings),
    ]
    step = progress("checking", len(contestants) * len(prompts) * (1 + _CHECK_TURNS))
    records = measure.take_turns(contestants, prompts, max_new_tokens, _CHECK_TURNS, step)
    rows = measure.summary(contestants, prompts, records, [0.0] * len(contestants))
    whole = [row for row in rows if row["category"] == "all"][1:]
    return tuple(
        Check(
            gamma=gamma,
            skip=candidate.skip,
            predicted=candidate.improvement_factor[gamma],
            measured=row["improvement_factor"],
            spread=row["improvement_factor_spread"],
            predicted_tau=candidate.tokens_per_iteration[gamma],
            measured_tau=row["tokens_per_iteration"],
            identical_to_ar=row["identical_to_ar"],
        )
        for (candidate, gamma), row in zip(settings, whole, strict=True)
    )
