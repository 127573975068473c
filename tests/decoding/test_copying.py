"""Copying: what followed where a text repeats itself is proposed, and the output stays the same."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
import pytest

from s3d_jax.decoding.adaptive import ALWAYS, NEVER
from s3d_jax.decoding.copying import continuation, new_copying, repetition
from s3d_jax.decoding.state import Proposal
from s3d_jax.decoding.step import statistics
from s3d_jax.drafters import registry
from s3d_jax.drafters.s3d import S3D
from s3d_jax.errors import ConfigError
from s3d_jax.settings.drafting import DraftConfig, PassCosts, symmetric_skip
from s3d_jax.settings.sampling import SamplingConfig
from tests.sampled import sampled
from tests.tiny import outputs, run, tiny_config, tiny_lm, tiny_params

CONFIG = tiny_config()
PARAMS = tiny_params(CONFIG)
DRAFT = DraftConfig(symmetric_skip(4, 2), 3)
NEW = 48
# The first row's text repeats itself at once, the second one's does not.
PROMPTS = [[4, 9, 2, 7, 4, 9, 2, 7, 4, 9], list(range(1, 18)), [5, 5, 5, 5]]
ROWS = {
    "greedy": [SamplingConfig()] * 3,
    "sampled": [SamplingConfig(temperature=0.8), SamplingConfig(temperature=0.3), SamplingConfig()],
    "penalized": [SamplingConfig(repetition_penalty=1.2, presence_penalty=0.5)] * 3,
}


def counts(state, gamma=3):
    rows = zip(np.asarray(state.passes), PROMPTS, outputs(state, PROMPTS), strict=True)
    return [statistics(row, len(p), len(out), gamma) for row, p, out in rows]


def test_the_longest_and_latest_match_counts():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 4, (40, 24)).astype(np.int32)
    n = rng.integers(0, 24, 40).astype(np.int32)
    matched, period = repetition(jnp.asarray(tokens), jnp.asarray(n), 4)
    copies = continuation(jnp.asarray(tokens), jnp.asarray(n), period, 5)
    for row, end, length, back, copied in zip(tokens, n, matched, period, copies, strict=True):
        text, best = row[: end + 1].tolist(), (0, 0)
        for place in range(end):
            same = 0
            while same < 4 and same <= place and text[place - same] == text[end - same]:
                same += 1
            if same:
                best = max(best, (same, place))
        assert (length, back) == (best[0], end - best[1] if best[0] else 0)
        for token in copied.tolist():
            assert token == text[-back if back else -1]
            text.append(token)


@pytest.mark.parametrize("name", sampled(list(ROWS), ["sampled"]))
@pytest.mark.parametrize("adaptive", [False, True])
def test_the_output_is_that_of_plain_decoding(name, adaptive):
    plain = outputs(run(CONFIG, PARAMS, PROMPTS, NEW, rows=ROWS[name]), PROMPTS)
    costs = PassCosts(0.5, (1, 1.2, 1.2, 1.2)) if adaptive else None
    options = dict(rows=ROWS[name], draft=DRAFT, costs=costs, copies=True)
    state = run(CONFIG, PARAMS, PROMPTS, NEW, **options)
    assert outputs(state, PROMPTS) == plain
    found = counts(state)
    assert found[0].copying > 0
    for row in found:
        tokens = sum(row.accepted) + row.copied + row.iterations
        assert tokens in (NEW, NEW + 1)  # the limit may cut the last bonus
        assert row.copied <= 3 * row.copying
        assert adaptive or row.plain == 0


@dataclasses.dataclass(frozen=True)
class _Counted(S3D):
    """S3D that counts its draft passes in its state."""

    name: ClassVar[str] = "counted"

    def init(self, plan) -> Any:
        return jnp.zeros(len(plan.lengths), jnp.int32)

    def propose(self, inputs) -> Proposal:
        found = super().propose(inputs)
        return found._replace(drafter_state=inputs.state.drafter_state + 1)


@pytest.mark.parametrize("row", range(3))
def test_where_all_rows_copy_there_is_no_draft_pass(row):
    options = dict(draft=DRAFT, drafter=_Counted, copies=True)
    state = run(CONFIG, PARAMS, PROMPTS[row : row + 1], NEW, **options)
    (text,) = outputs(state, PROMPTS[row : row + 1])
    found = statistics(np.asarray(state.passes)[0], len(PROMPTS[row]), len(text), 3)
    assert found.drafting == int(state.drafter_state[0])
    assert found.copying > 0


def test_a_row_copies_beside_one_that_drafts():
    options = dict(draft=DRAFT, drafter=_Counted, copies=True)
    state = run(CONFIG, PARAMS, PROMPTS, NEW, **options)
    found, passes = counts(state), int(state.drafter_state[0])
    assert any(row.copying and row.drafting < passes for row in found)
    # Draft passes are shared, and there is one wherever a row drafts.
    assert max(row.drafting for row in found) <= passes <= sum(row.drafting for row in found)


def test_copies_that_are_not_accepted_need_more_of_the_text_to_match():
    copying = new_copying(2, 1.5).replace(matched=jnp.array([2, 4]))
    yes = jnp.array([True, True])
    steps = []
    for _ in range(9):
        assert copying.rows.tolist() == [float(copying.steps[0]) > 0, True]
        copying = copying.settle(yes, jnp.array([0, 2]))
        steps.append(copying.steps.tolist())
    assert steps[0] == [3.5, 5.5] and steps[6] == [0.5, 12.0] and steps[8] == [0.0, 12.0]
    assert copying.rows.tolist() == [False, True]
    again = copying.settle(yes, jnp.array([2, 2]))
    assert again.rows.tolist() == [True, True]
    others = copying.settle(jnp.array([False, False]), jnp.array([3, 3]))
    assert others.steps.tolist() == copying.steps.tolist()
    for mode, rows in ((NEVER, [False, False]), (ALWAYS, [True, True])):
        measuring = copying.replace(mode=jnp.full(2, mode))
        assert measuring.rows.tolist() == rows
        assert measuring.settle(yes, jnp.array([0, 0])).steps.tolist() == copying.steps.tolist()
    free = new_copying(1).replace(matched=jnp.array([2]))
    for _ in range(20):
        free = free.settle(yes[:1], jnp.array([0]))
    assert free.rows.tolist() == [True]


def test_attempts_to_draft_come_before_copies():
    """Else a row whose text repeats itself would never see that drafts pay again."""
    dear = PassCosts(30.0, (1, 1, 1, 1))
    state = run(CONFIG, PARAMS, PROMPTS[:1], 90, draft=DRAFT, costs=dear, copies=True)
    (text,) = outputs(state, PROMPTS[:1])
    assert text == outputs(run(CONFIG, PARAMS, PROMPTS[:1], 90), PROMPTS[:1])[0]
    found = statistics(np.asarray(state.passes)[0], len(PROMPTS[0]), 90, 3)
    assert found.copying > found.drafting
    assert found.drafting == sum(at < found.iterations for at in (0, 16, 32, 64))


def test_it_is_an_option_of_s3d():
    lm = tiny_lm()
    assert registry.choose(lm.target, "s3d").copies
    assert not registry.choose(lm.target, "s3d", adaptive=False).copies
    assert registry.choose(lm.target, "s3d", adaptive=False, copies=True).copies
    assert not registry.choose(lm.target, "s3d", copies=False).copies
    with pytest.raises(ConfigError, match="copies must be True or False, got 7"):
        lm.generate([5], copies=7)
    with pytest.raises(ConfigError, match=r"prompt-lookup.* has no copies"):
        lm.generate([5], method="prompt-lookup", copies=True)
    lm.draft_config = DraftConfig((False,) * 4, 2, mode="merged")
    with pytest.raises(ConfigError, match=r"leave out copies \(--copies\)"):
        lm.generate([5], copies=True)


def test_statistics_say_what_was_copied():
    lm = tiny_lm()
    prompt = PROMPTS[0]
    plain = lm.generate(prompt, max_new_tokens=NEW, method="ar")[0]
    (result,) = lm.generate(prompt, max_new_tokens=NEW, gamma=3, adaptive=False, copies=True)
    stats = result.stats
    assert result.tokens == plain.tokens
    assert stats.copying_iterations > 0 and stats.plain_iterations == 0
    assert stats.drafted == 3 * stats.iterations
    drafted = sum(stats.accepted_per_position)
    assert drafted < stats.accepted < drafted + 3 * stats.copying_iterations + 1
    assert stats.accepted + stats.iterations in (NEW, NEW + 1)
    assert stats.to_dict()["copying_iterations"] == stats.copying_iterations
