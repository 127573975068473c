"""Costs, predictions and the choice, where the truth is known."""

from collections import Counter

import numpy as np
import pytest

from s3d_jax.bench import measure
from s3d_jax.bench.contestants import Run
from s3d_jax.errors import InputError
from s3d_jax.lm import LM
from s3d_jax.settings.drafting import symmetric_skip
from s3d_jax.texts.suites import Prompt
from s3d_jax.tune.acceptance import (
    Acceptance,
    Expected,
    Judge,
    Texts,
    fit_acceptance,
    replay,
    write_texts,
)
from s3d_jax.tune.costs import Clock, Costs, _mean_visible, num_programs
from s3d_jax.tune.plan import Check, _to_check, choose, predict, split, tune
from tests.tiny import tiny_config, tiny_lm, tiny_params

LAYERS, GAMMAS = 8, (1, 2, 4)
FOUND = [symmetric_skip(LAYERS, size) for size in range(1, LAYERS)]
# A step takes 2 s, of which each token more adds 0.1 s, and each layer of the draft 0.25 s.
COSTS = Costs(
    verify=(2.0, 2.1, 2.2, 2.3, 2.4),
    draft={g: {1: 0.25 + 0.05 * g, 7: 1.75 + 0.05 * g} for g in GAMMAS},
    visible=256,
)


def alpha(skip) -> float:
    return 0.9 - 0.1 * sum(skip)


def acceptance(skip, gamma) -> Acceptance:
    """Independent tokens: the i-th is accepted in α^i of the iterations."""
    shares = [round(10**6 * alpha(skip) ** (i + 1)) for i in range(gamma)]
    return Acceptance(10**6 + sum(shares), 10**6, tuple(shares))


@pytest.fixture
def expected() -> list[Expected]:
    return fit_acceptance(FOUND, FOUND[0], GAMMAS, acceptance)


def test_costs_between_depths():
    costs = COSTS.relative(4, 2)
    assert costs.verify == (1, 1.05, 1.1)
    assert costs.draft == pytest.approx((4 * 0.25 + 0.1) / 2)
    assert costs.iteration(1) == pytest.approx(costs.draft + 1.05)


def test_times_of_real_decoding_set_the_scale():
    costs = COSTS.scaled(2.5, 4, 2, 2 * 3.3)  # of 1.1 + 2.2 s
    assert costs.verify == pytest.approx((2.5, 4.2, 4.4, 4.6, 4.8))
    assert costs.relative(4, 2).iteration(2) == pytest.approx(6.6 / 2.5)
    assert costs.relative(7, 4).draft == pytest.approx(2 * 1.95 / 2.5)
    assert costs.relative(4, 2).verify[0] == 1


def test_the_prediction_is_the_formula_and_its_best_the_optimum(expected):
    truth = {}
    for skip in FOUND:
        for g in GAMMAS:
            a, kept = alpha(skip), LAYERS - sum(skip)
            tau = (1 - a ** (g + 1)) / (1 - a)
            truth[skip, g] = tau / ((2 + 0.1 * g + 0.25 * kept + 0.05 * g) / 2)
    candidates = predict(expected, COSTS)
    found = {(c.skip, g): f for c in candidates for g, f in c.improvement_factor.items()}
    assert found == pytest.approx(truth, rel=1e-5)
    best = max(truth, key=truth.__getitem__)
    chosen = choose(candidates, COSTS, ())
    assert (chosen.skip, chosen.gamma) == best
    assert chosen.improvement_factor == pytest.approx(truth[best], rel=1e-5)
    assert chosen.costs == COSTS.relative(LAYERS - sum(best[0]), best[1])


def test_a_measurement_is_believed_more_than_a_prediction(expected):
    def check(gamma, skip, measured):
        return Check(gamma, skip, 9.9, measured, 0.01, 2.0, 2.1, 1.0)

    checks = [check(2, FOUND[1], 1.1), check(4, FOUND[3], 1.3), check(1, FOUND[0], 0.8)]
    chosen = choose(predict(expected, COSTS), COSTS, checks)
    assert (chosen.gamma, chosen.skip, chosen.improvement_factor) == (4, FOUND[3], 1.3)
    assert checks[0].error == pytest.approx(8)


@pytest.mark.parametrize("count", [0, 1, 2, 5, 6, 21, 99])
def test_what_is_checked(count, expected):
    candidates = predict(expected, COSTS)
    ranking = sorted(
        ((f, c.skip, g) for c in candidates for g, f in c.improvement_factor.items()), reverse=True
    )
    settings = _to_check(candidates, count)
    assert len(set(settings)) == len(settings) == min(count, len(ranking))
    best = (count + 1) // 2
    assert {(s, g) for _, s, g in ranking[:best]} <= set(settings)
    if count >= 5:  # the worst is among those from all over
        assert ranking[-1][1:] in settings


def test_the_clock_times_all_passes(monkeypatch):
    lm = tiny_lm(num_layers=2)
    texts = write_texts(lm, [Prompt("a", np.arange(1, 9, dtype=np.int32))], 16)
    skips = [symmetric_skip(2, 1), symmetric_skip(2, 0)]
    compiled = []
    clock = Clock(lm, skips, (2,), texts, 16, 1, lambda: compiled.append(1))
    assert len(compiled) == num_programs(skips, (2,), 1) == 1 + 2 + 1 + 2
    clock.take_turns(2)
    costs = clock.costs()
    assert len(costs.verify) == 4 and min(costs.verify) > 0
    assert {g: set(by_depth) for g, by_depth in costs.draft.items()} == {2: {1, 2}}
    # It looked at the clock for all; now it is told what it sees, 3 s too much in one turn of each.
    seconds = {0: 2.0, 1: 2.1, 2: 2.5, 3: 2.6, (0, 2): 4.5, (1, 2): 3.0}
    turns = Counter()

    def told(name):
        turns[name] += 1
        return seconds[name] + 3 * (turns[name] == 2)

    monkeypatch.setattr(clock, "_time", told)
    clock.take_turns(9)
    assert turns == dict.fromkeys(seconds, 9)
    costs = clock.costs()
    assert costs.verify == (2.0, 2.1, 2.5, 2.6) and costs.draft == {2: {1: 0.5, 2: 2.0}}
    short = Texts(np.ones((1, 2), np.int32), (1,), (2,))
    assert clock.visible == 64 and _mean_visible(lm, short, 1, 40) == 96  # 2 · 40 + 3 and the rest


def test_a_plan_of_a_tiny_model(monkeypatch):
    lm = tiny_lm(num_layers=2)
    prompts = [Prompt("a", np.arange(1, n, dtype=np.int32)) for n in (3, 5, 9, 12)]
    stages = []

    def progress(what, total):
        stages.append([what, total, 0])

        def step():
            stages[-1][2] += 1

        return step

    monkeypatch.setattr("s3d_jax.tune.plan.worth_trying", lambda *_: [])  # whatever the times are
    plan = tune(lm, prompts, gammas=(1, 2), max_new_tokens=12, check=2, progress=progress)
    assert [s[0] for s in stages] == [
        *("writing", "searching", "compiling", "accepting", "timing", "checking")
    ]
    assert all(total == done for _, total, done in stages)
    assert len(plan.candidates) == 1 and plan.candidates[0].skip == lm.draft_config.skip
    assert len(plan.checks) == 2 and plan.held_out
    assert plan.check_prompts == plan.calibration_prompts == 2
    for check in plan.checks:
        # Greedy texts are the same, so τ of the check is that of its own prompts to the token.
        texts = write_texts(lm, prompts[1::2], 12)
        right = Judge(lm, texts, 2).right(check.skip, check.gamma)
        assert check.measured_tau == replay(right, check.gamma).tokens_per_iteration
        assert check.identical_to_ar == 1
    fastest = max(plan.checks, key=lambda c: c.measured)
    assert (plan.tuning.gamma, plan.tuning.skip) == (fastest.gamma, fastest.skip)
    assert plan.pays == (fastest.measured > 1)
    assert plan.to_dict()["tuning"]["costs"]["verify"][0] == 1


def test_each_category_is_split():
    rows = [Prompt(c, np.full(1, i, np.int32)) for i, c in enumerate("abbacaac")]
    calibration, others = split(rows)
    assert [(p.category, int(p.tokens[0])) for p in calibration] == [
        *(("a", 0), ("a", 5), ("b", 1), ("c", 4))
    ]
    assert [(p.category, int(p.tokens[0])) for p in others] == [
        *(("a", 3), ("a", 6), ("b", 2), ("c", 7))
    ]
    assert split(rows[3:5]) == ([rows[3], rows[4]], [])


@pytest.mark.exhaustive
def test_predictions_are_what_is_measured_where_time_follows_a_law(monkeypatch):
    """Decodes for real with simulated seconds; the clock's loop is faster than decoding."""
    layers, gammas, new = 6, (1, 3), 24
    config = tiny_config(num_layers=layers, vocab_size=13)
    params = tiny_params(config, 3)
    for i in range(layers):
        params[f"layers_{i}"]["attention"]["out"]["weight"] *= 0.1
        params[f"layers_{i}"]["mlp"]["down"]["weight"] *= 0.1
    lm = LM(config, params)

    def iteration(kept, gamma):
        return 2 + 0.1 * gamma + 0.05 * kept + 0.02 * kept * gamma

    class Law:
        def __init__(self, lm, skips, gammas, *_):
            self.kept = [layers - sum(skip) for skip in skips]

        def take_turns(self):
            pass

        def costs(self):
            verify = tuple(0.8 * (2 + 0.1 * w) for w in range(gammas[-1] + 1))
            by_gamma = {
                g: {k: 0.8 * (iteration(k, g) - 2 - 0.1 * g) for k in self.kept} for g in gammas
            }
            return Costs((0.9 * 2, *verify[1:]), by_gamma, 64)

    def turns(contestants, prompts, max_new_tokens, repeats, step):
        records = []
        for c, contestant in enumerate(contestants):
            options = dict(method=contestant.method, max_new_tokens=max_new_tokens)
            rows = lm.generate([p.tokens for p in prompts], **options, **contestant.settings)
            seconds = 2.0
            if contestant.settings:
                kept = layers - sum(contestant.settings["skip"])
                seconds = iteration(kept, contestant.settings["gamma"])
                seconds += 0.1 * sum(contestant.settings.get("leaves", ()))
            for p, row in enumerate(rows):
                n, count = len(row.tokens), row.stats.iterations
                accepted = row.stats.accepted_per_position
                run = Run(row.tokens, 1.0, 0.1, count * seconds, n, 0.0, count, 0, accepted)
                records += [measure.Record(c, p, repeat, run, 1) for repeat in range(repeats + 1)]
        return records

    monkeypatch.setattr("s3d_jax.tune.plan.Clock", Law)
    monkeypatch.setattr(measure, "take_turns", turns)
    ids = ([3], [5, 9, 2], [*range(1, 12)])
    prompts = [Prompt(str(i), np.array(p, np.int32)) for i, p in enumerate(ids)]
    plan = tune(lm, prompts, gammas=gammas, max_new_tokens=new, check=99)
    assert not plan.held_out and plan.check_prompts == plan.calibration_prompts == 3
    truth = {(check.skip, check.gamma): check.measured for check in plan.checks}
    assert len(truth) == (layers - 1) * len(gammas) and len(set(truth.values())) == len(truth)
    for check in plan.checks:
        assert check.predicted == pytest.approx(check.measured)
        assert check.predicted_tau == pytest.approx(check.measured_tau)
    best = max(truth, key=truth.__getitem__)
    unchecked = choose(plan.candidates, plan.costs, ())
    for chosen in (plan.tuning, unchecked):
        assert (chosen.skip, chosen.gamma) == best
    assert unchecked.improvement_factor == pytest.approx(truth[best])
    assert plan.combs[0].leaves == () and plan.combs[0].measured == pytest.approx(truth[best])
    fastest = max(plan.combs, key=lambda comb: comb.measured)
    assert plan.tuning.leaves == fastest.leaves
    assert plan.tuning.improvement_factor == pytest.approx(fastest.measured)
    kept = layers - sum(best[0])
    assert unchecked.costs.iteration(best[1]) == pytest.approx(iteration(kept, best[1]) / 2)


def test_what_cannot_be_tuned():
    with pytest.raises(InputError, match="needs a prompt"):
        tune(tiny_lm(), [])
    with pytest.raises(InputError, match="one layer"):
        tune(tiny_lm(num_layers=1), [Prompt("a", np.ones(3, np.int32))])
