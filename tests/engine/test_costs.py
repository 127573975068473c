"""What drafting costs is measured while texts are generated, and decides how they begin."""

import copy
import math

import jax.numpy as jnp
import numpy as np
import pytest

from s3d_jax.decoding.adaptive import ALWAYS, new_budget, settle
from s3d_jax.engine.costs import BY_BUDGETS, COPYING, DRAFTING, PLAIN, Experience, Pace
from s3d_jax.settings.drafting import DraftConfig, PassCosts, Tuning, symmetric_skip
from tests.tiny import tiny_lm

SLOTS = 256


def new_pace(gain: float | None, experience: Experience, copies: bool = False) -> Pace:
    """Of a draft that is estimated to cost 1.5 steps, and a copy 1."""
    return Pace(PassCosts(0.5, (1, 1, 1, 1, 1)), 4, copies, gain, experience)


def decode(
    pace: Pace, plain: float, drafting: float, tau: float = 2.0, limit: int = 100, slower: int = 5
) -> None:
    """A text on a device that takes these times in seconds, each second drafting call longer."""
    pace.budget([limit])
    tokens, slow = 0.0, False
    while tokens < limit and (call := pace.next_call()).kind != BY_BUDGETS:
        count = min(call.most, math.ceil((limit - tokens) / (tau if call.kind == DRAFTING else 1)))
        slow = not slow if call.kind == DRAFTING else slow
        each = {PLAIN: plain, DRAFTING: slower * drafting if slow else drafting}[call.kind]
        pace.took(count, count * each, SLOTS)
        tokens += count * (tau if call.kind == DRAFTING else 1)
    pace.gained(int(50 * tau), 50)


def begun(texts: int = 1) -> Experience:
    """The experience with some texts, of which nothing was measured."""
    return Experience(texts=texts)


def test_the_cost_is_the_ratio_of_the_fastest_calls():
    experience = Experience()
    pace = new_pace(None, experience)
    pace.budget([9])  # of the first text, which may be the only one
    assert pace.cost == 1.5 and pace.next_call() == (BY_BUDGETS, None)
    pace.budget([9])
    assert pace.cost == 1.5 and pace.next_call() == (PLAIN, 2)
    pace.took(1, 9.0, SLOTS)  # warming up, in two calls
    assert pace.next_call() == (PLAIN, 1)
    pace.took(1, 0.005, SLOTS)
    calls = []
    for slower in (1, 1, 7, 1):  # the first two are fast, then something else runs
        call = pace.next_call()
        calls.append(call)
        pace.took(call.most, call.most * slower * {PLAIN: 0.01, DRAFTING: 0.035}[call.kind], SLOTS)
    assert calls == [(PLAIN, 2), (DRAFTING, 2)] * 2
    assert pace.cost == pytest.approx(3.5) and pace.next_call() == (BY_BUDGETS, None)


def test_a_copy_is_measured_at_first_and_costs_what_a_draft_would_gain():
    experience, kinds = begun(), []
    for tau in (2.0, 3.0, 4.0):
        pace = new_pace(None, experience, copies=True)
        pace.budget([9])
        while (call := pace.next_call()).kind != BY_BUDGETS:
            kinds.append(call.kind)
            pace.took(call.most, call.most * {PLAIN: 1, DRAFTING: 2, COPYING: 1.5}[call.kind], 1)
        pace.gained(int(64 * tau), 64)
    assert kinds == [PLAIN, *(PLAIN, DRAFTING, COPYING) * 2] * 2 + [PLAIN, *(PLAIN, DRAFTING) * 2]
    # Three tokens in two steps; a copy takes one and a half, so it must have 2.25.
    assert (pace.cost, pace.copy_cost) == (2, pytest.approx(1.5 * 1.5))
    assert new_pace(1.2, experience, copies=True).copy_cost == pytest.approx(1.2)
    assert new_pace(0.5, experience, copies=True).copy_cost == 1  # at least what AR decodes
    assert new_pace(None, experience).copy_cost == 0


@pytest.mark.parametrize("step, size", [(0.0001, 8), (0.004, 5), (0.03, 2)])
def test_fast_steps_are_measured_in_longer_calls(step, size):
    pace = new_pace(None, begun())
    pace.budget([9])
    pace.took(2, 2 * step, SLOTS)
    assert pace.next_call() == (PLAIN, size)


def test_calls_that_read_other_slots_are_not_compared():
    for slots, cost in (((1, 1, 2, 2), 2.0), ((1, 2, 1, 2), 1.5)):  # 1.5 is the estimate
        pace = new_pace(None, begun())
        pace.budget([9])
        pace.took(2, 0.1, 1)
        for visible in slots:
            call = pace.next_call()
            pace.took(call.most, call.most * (2 if call.kind == DRAFTING else 1) * visible, visible)
        assert pace.cost == pytest.approx(cost) and pace.next_call() == (BY_BUDGETS, None)


def test_measured_after_the_first_text_and_then_ever_more_rarely():
    experience, measured = Experience(), []
    for i in range(400):
        known = list(experience.costs[DRAFTING])
        decode(new_pace(None, experience), 0.01, 0.02 + 0.0001 * i)
        measured += [i] * (list(experience.costs[DRAFTING]) != known)
    assert measured == [1, 2, 3, 7, 15, 31, 63, 127, 255, 383]
    assert experience.cost(DRAFTING) == pytest.approx(
        2 + 0.01 * 383
    )  # the highest of the last five


def test_short_texts_measure_together_and_draft():
    experience, begins = Experience(), []
    for _ in range(100):
        pace = new_pace(None, experience)
        decode(pace, 0.001, 0.0015, limit=8, slower=1)
        begins.append(pace.next_call().kind)
    assert len(experience.costs[DRAFTING]) >= 3 and experience.cost(DRAFTING) == pytest.approx(1.5)
    assert begins.count(BY_BUDGETS) > 60


def test_what_was_gained_decides_how_much_may_be_lost():
    limits = [100, 1000]
    for tau, steps, pause in ((4.0, [12, 12], 8), (3.0, [2, 12], 8), (1.5, [0, 0], 512)):
        experience = Experience()
        for _ in range(4):
            decode(new_pace(None, experience), 0.01, 0.035, tau)
        pace = new_pace(None, experience)
        budget = pace.budget(limits)
        assert pace.cost == pytest.approx(3.5)
        assert np.asarray(budget.steps).tolist() == steps
        assert np.asarray(budget.pause).tolist() == [pause] * 2
        assert np.asarray(budget.drafting_rows).tolist() == [tau > 2] * 2
        assert pace.drafts
    # Even there each sixteenth text tries, since texts may have changed.
    tries = []
    for _ in range(32):
        steps, drafts = float(pace.budget([100]).steps[0]), pace.drafts
        if pace.next_call().kind == BY_BUDGETS:
            tries.append((steps, drafts))
        else:  # the cost is measured again
            assert drafts
            decode(pace, 0.01, 0.035, 1.5)
    # After sixteen other texts it is worth compiling the loop of plain decoding.
    assert tries.count((2.0, True)) == 2 and tries.count((0.0, True)) == 15
    assert tries.count((0.0, False)) == len(tries) - 17 > 8
    for gain, drafts in ((0.69, False), (0.7, True)):  # measured by tuning
        pace = new_pace(gain, Experience())
        pace.budget([100])
        assert pace.drafts == drafts


def test_a_text_without_drafts_runs_the_loop_of_plain_decoding():
    lm = tiny_lm()
    options = dict(max_new_tokens=40, temperature=[0.0, 0.9], seed=3)
    prompts = [[5, 9, 2], [7]]
    expected = lm.generate(prompts, method="ar", **options)
    lm.generate(prompts, **options)
    (experience,) = lm.experiences
    experience.costs[DRAFTING].append(30.0)
    experience.gained(64, 64)
    experience.next_measurement, experience.hopeless = 100, 16
    programs = len(lm.programs)
    for _ in range(2):
        results = lm.generate(prompts, **options)
        for result, plain in zip(results, expected, strict=True):
            assert result.tokens == plain.tokens
            assert result.stats.plain_iterations == result.stats.iterations == 40
            assert (result.stats.drafted, result.stats.accepted_per_position) == (0, (0,) * 4)
        assert len(lm.programs) == programs  # the one of method "ar"
    experience.texts = 15
    tried = lm.generate(prompts, **options)
    assert [r.tokens for r in tried] == [r.tokens for r in expected]
    assert any(r.stats.drafted for r in tried)


def test_measuring_is_not_charged_to_the_rows():
    budget = new_budget(1, 3.0)
    measuring = budget.replace(mode=jnp.array([ALWAYS]))
    for _ in range(20):
        measuring = settle(measuring, jnp.array([True]), jnp.array([0]), jnp.array([False]))
        budget = settle(budget, jnp.array([True]), jnp.array([0]), jnp.array([False]))
    assert (measuring.steps[0], measuring.pause[0]) == (12, 8)
    assert budget.steps[0] == 0 and budget.pause[0] > 8


def test_a_model_learns_its_costs_from_its_own_calls():
    # Without copies: whether they leave iterations to decode plainly depends on the device.
    lm, options = tiny_lm(), dict(max_new_tokens=40, copies=False)
    expected = lm.generate([5, 9, 2], max_new_tokens=40, method="ar")[0].tokens
    for i in range(4):
        (result,) = lm.generate([5, 9, 2], **options)
        assert result.tokens == expected
        assert not i or 0 < result.stats.plain_iterations < result.stats.iterations
    (experience,) = lm.experiences
    assert experience.texts == 4 and min(experience.costs[DRAFTING]) > 0
    assert result.stats.iteration_cost == experience.cost(DRAFTING)
    for _ in range(2):  # with calls of its own size
        assert sum(lm.stream_tokens([5, 9, 2], **options), []) == expected
    many = lm.generate_many([[5, 9, 2]] * 4, rows=1, **options)
    assert [result.tokens for _, result in many] == [expected] * 4
    assert [e.texts for e in lm.experiences] == [8, 2]
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
