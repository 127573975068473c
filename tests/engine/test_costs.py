"""What drafting costs is measured while texts are generated, and decides how they begin."""

import copy

import numpy as np
import pytest

from s3d_jax.decoding.adaptive import ALWAYS, BY_BUDGET, NEVER
from s3d_jax.engine.costs import Experience, Pace
from s3d_jax.settings.drafting import DraftConfig, PassCosts, Tuning, symmetric_skip
from tests.tiny import tiny_lm


def run(experience: Experience, plain: float, drafting: float, tau: float = 2.0) -> Pace:
    """A run of 100 iterations on a device with these times in seconds, each second call slower."""
    pace, slow = Pace(1.5, None, experience), False
    pace.budget([100])
    for _ in range(100):
        call = pace.next_call()
        if call.mode == BY_BUDGET:
            break
        each = {NEVER: plain, ALWAYS: drafting}[call.mode]
        slow = not slow if call.most and call.most > 2 else slow
        pace.took(call.most, call.most * each * (5 if slow and call.mode == ALWAYS else 1))
    pace.gained(int(100 * tau), 100)
    return pace


def test_the_cost_is_the_ratio_of_the_fastest_calls():
    experience = Experience()
    first = Pace(1.5, None, experience)
    assert first.cost == 1.5 and first.next_call() == (BY_BUDGET, None)
    first.budget([9])
    pace = Pace(1.5, None, experience)
    assert pace.cost == 1.5 and pace.next_call() == (NEVER, 2)
    pace.took(1, 9.0)  # warming up, in two calls
    assert pace.next_call() == (NEVER, 1)
    pace.took(1, 0.005)
    calls = []
    for slower in (1, 1, 7, 1):  # the first two are fast, then something else runs
        call = pace.next_call()
        calls.append(call)
        pace.took(call.most, call.most * slower * {NEVER: 0.01, ALWAYS: 0.035}[call.mode])
    assert calls == [(NEVER, 2), (ALWAYS, 2)] * 2
    assert pace.cost == pytest.approx(3.5) and pace.next_call() == (BY_BUDGET, None)


@pytest.mark.parametrize("step, size", [(0.0001, 8), (0.004, 5), (0.03, 2)])
def test_fast_steps_are_measured_in_longer_calls(step, size):
    pace = Pace(1.5, None, Experience(runs=1))
    pace.took(2, 2 * step)
    assert pace.next_call() == (NEVER, size)


def test_measured_in_the_first_runs_and_then_ever_more_rarely():
    experience, measured = Experience(), []
    for i in range(200):
        known = len(experience.costs) and list(experience.costs)
        run(experience, 0.01, 0.02 + 0.0001 * i)
        measured += [i] * (list(experience.costs) != known)
    assert measured == [1, 2, 3, 15, 63, 127, 191]
    assert experience.cost == pytest.approx(2 + 0.01 * 63)  # the median of the last five


def test_what_was_gained_decides_how_much_may_be_lost():
    limits = [100, 1000]
    for tau, steps, pause in ((4.0, [12, 12], 8), (3.0, [2, 12], 8), (1.5, [0, 0], 512)):
        experience = Experience()
        for _ in range(4):
            run(experience, 0.01, 0.035, tau)
        pace = Pace(1.5, None, experience)
        budget = pace.budget(limits)
        assert pace.cost == pytest.approx(3.5)
        assert np.asarray(budget.steps).tolist() == steps
        assert np.asarray(budget.pause).tolist() == [pause] * 2
        assert np.asarray(budget.drafting_rows).tolist() == [tau > 2] * 2
    # Even there each eighth run tries, since texts may have changed.
    tries = [float(Pace(1.5, None, experience).budget([100]).steps[0]) for _ in range(16)]
    assert tries.count(2.0) == 2 and tries.count(0.0) == 14


def test_a_model_learns_its_costs_from_its_own_calls():
    lm = tiny_lm()
    expected = lm.generate([5, 9, 2], max_new_tokens=40, method="ar")[0].tokens
    for i in range(4):
        (result,) = lm.generate([5, 9, 2], max_new_tokens=40)
        assert result.tokens == expected
        assert not i or 0 < result.stats.plain_iterations < result.stats.iterations
    (experience,) = lm.experiences
    assert len(experience.costs) == 3 and min(experience.costs) > 0
    assert experience.drafting >= 3 * 2 * 2
    (result,) = lm.generate([5, 9, 2], max_new_tokens=40)
    assert result.stats.iteration_cost == experience.cost
    for _ in range(2):  # with calls of its own size
        assert sum(lm.stream_tokens([5, 9, 2], max_new_tokens=40), []) == expected
    many = lm.generate_many([[5, 9, 2]] * 4, rows=1, max_new_tokens=40)
    assert [result.tokens for _, result in many] == [expected] * 4
    assert [len(e.costs) for e in lm.experiences] == [3, 1]
    assert list(copy.deepcopy(lm).experiences) == []


def test_tuned_costs_are_not_measured_again():
    """So the outcome of a call does not depend on earlier ones."""
    lm = tiny_lm()
    skip = symmetric_skip(lm.config.num_layers, 2)
    lm.tuning = Tuning(4, skip, PassCosts(0.5, (1, 1, 1, 1, 1.2)), 1.3)
    lm.draft_config = DraftConfig(skip)
    first, second = (lm.generate([5, 9, 2], max_new_tokens=40)[0].stats for _ in range(2))
    assert first.iteration_cost == second.iteration_cost == 1.7
    assert first.plain_iterations == second.plain_iterations
    assert lm.generate([5], method="prompt-lookup")[0].stats.iteration_cost is None
