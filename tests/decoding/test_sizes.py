"""One plan answers every question of size."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s3d_jax.decoding.sizes import PREFILL_BUCKETS, SlotPlan, padded_length

lengths = st.lists(st.integers(1, 900), min_size=1, max_size=4)


@given(lengths, st.integers(1, 600), st.integers(0, 20), st.integers(0, 700), st.data())
def test_slots_hold_prompts_outputs_and_slack(prompts, new, gamma, turning, data):
    max_length = max(prompts) + data.draw(st.integers(1, 700))
    ends = [min(n + new, max_length) for n in prompts]
    turning_point = turning or None
    plan = SlotPlan.for_batch(
        prompts, ends, gamma, max_length=max_length, turning_point=turning_point
    )
    assert plan.slots % 64 == 0
    assert plan.slots >= max(ends) + gamma + 1  # a write near the end is never clamped
    assert sum(plan.chunks()) <= plan.slots and set(plan.chunks()) <= set(PREFILL_BUCKETS)
    assert all(padded >= n for padded, n in zip(plan.padded, prompts, strict=True))
    for n, limit, end in zip(prompts, plan.limits, ends, strict=True):
        passes = turning_point is not None and n <= turning_point < end - 1
        assert limit == (turning_point + 1 if passes else end)
    # Rows that stopped early are prefilled again in the same slots.
    again = plan.again(plan.limits, ends)
    assert again.limits == tuple(ends) and again.slots == plan.slots
    running = [limit < end for limit, end in zip(plan.limits, ends, strict=True)]
    assert not any(running) or sum(again.chunks(running)) <= again.slots


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_what_is_read_is_at_most_twice_what_is_used(slots, used):
    plan = SlotPlan((1,), (1,), 0, max(slots, 2))
    visible = plan.visible(used)
    assert visible == plan.slots or used <= visible <= max(256, 2 * used)


def test_prompts_within_one_bucket_share_their_sizes():
    plans = [SlotPlan.for_batch([n], [n + 40], 4, max_length=512) for n in (18, 25, 33)]
    assert {(p.slots, *p.padded, *p.chunks()) for p in plans} == {(128, 33, 32)}
    assert padded_length(33) == 33 and padded_length(34) == 65


def test_a_plan_without_slack_is_refused():
    with pytest.raises(ValueError, match="20 slots cannot hold 17 tokens and 4 of slack"):
        SlotPlan((5,), (17,), 3, 20)
    SlotPlan((5,), (16,), 3, 20)


def test_a_cache_that_grows_has_few_sizes():
    """A conversation's turns begin anywhere; each size of its cache needs all programs again."""
    found = set()
    for known in range(0, 1990, 7):
        for length in range(known + 1, 1999, 31):
            end = min(length + 40, 2000)
            plan = SlotPlan.for_batch([length], [end], 4, max_length=2000, known=known, grows=True)
            found.add(plan.slots)
            assert plan.slots >= max(plan.padded[0], end + 5)
    assert found == {1024, 2048, 2560}
