"""Combs are tried where rows are cheap, and the fastest is kept."""

import dataclasses

import numpy as np
import pytest

from s3d_jax.lm import LM
from s3d_jax.settings.drafting import PassCosts, Tuning
from s3d_jax.texts.suites import Prompt
from s3d_jax.tune import plan
from s3d_jax.tune.combs import Comb, with_fastest, worth_trying
from s3d_jax.tune.costs import Costs
from s3d_jax.tune.report import table
from s3d_jax.weights.trees import store_tree
from tests.tiny import tiny_config, tiny_lm, tiny_params

SKIP = (False, True, True, False)


def costs_of(row: float, rows: int = 8) -> Costs:
    """A step takes 2 s, each row more `row` s, and a draft pass 1 s."""
    verify = tuple(2 + row * i for i in range(rows + 1))
    return Costs(verify, {g: {2: 1.0} for g in range(1, rows + 1)}, 64)


def tuning_of(costs: Costs, gamma: int) -> Tuning:
    return Tuning(gamma, SKIP, costs.relative(2, gamma), 1.4)


@pytest.mark.parametrize(
    "row, gamma, rows, expected",
    [
        (0.0, 3, 8, [(2, 1), (2,), (1,)]),
        (0.0, 3, 5, [(2,), (1,)]),  # nothing was measured with six rows
        (0.0, 1, 8, [(2,), (1,)]),  # there is no second draft token
        (0.1, 3, 8, [(1,)]),  # one row costs 3 % of the 3.3 s of an iteration, two 6 %
        (0.3, 3, 8, []),
    ],
)
def test_a_comb_is_tried_where_it_can_pay(row, gamma, rows, expected):
    costs = costs_of(row, rows)
    assert worth_trying(costs, tuning_of(costs, gamma)) == expected


def test_the_fastest_comb_is_kept():
    costs = costs_of(0.1)
    tuning = tuning_of(costs, 3)
    tried = [Comb((), 1.4, 0.01, 2.1, 1.0), Comb((1,), 1.45, 0.01, 2.2, 1.0)]
    chosen = with_fastest(tuning, tried, costs)
    assert chosen.leaves == (1,) and chosen.improvement_factor == 1.45
    assert chosen.costs == PassCosts(0.5, (1.0, 1.05, 1.1, 1.2))  # of four rows after x_n
    slower = dataclasses.replace(tried[1], measured=1.3)
    assert with_fastest(tuning, [tried[0], slower], costs) == tuning


def test_tuning_decodes_with_leaves_and_shows_it(monkeypatch):
    """The times are of a clock that favours one comb."""
    monkeypatch.setattr(plan, "worth_trying", lambda *_: [(2, 1), (2,)])
    monkeypatch.setattr(plan, "extra_rows", lambda _: 3)
    real = plan.decoded
    seen = []

    def timed(contestants, prompts, max_new_tokens, what, progress):
        rows = real(contestants, prompts, max_new_tokens, what, progress)
        if what == "trying leaves":
            for contestant, row in zip(contestants, rows, strict=True):
                seen.append(contestant.settings.get("leaves"))
                row["seconds"] = {None: 4.0, (2,): 1.0}.get(seen[-1], 2.0)
        return rows

    monkeypatch.setattr(plan, "decoded", timed)
    prompts = [Prompt("a", np.arange(1, n, dtype=np.int32)) for n in (3, 6)]
    lm = tiny_lm(num_layers=2)
    found = plan.tune(lm, prompts, gammas=(3,), max_new_tokens=6, check=1)
    assert seen == [None, (), (2, 1), (2,)]
    assert found.tuning.leaves == (2,) and found.tuning.improvement_factor == 4.0
    assert found.tuning.costs.verify[3] == found.costs.verify[5] / found.costs.step
    assert [comb.identical_to_ar for comb in found.combs] == [1.0, 1.0, 1.0]
    report = {**found.to_dict(), "model": "m", "precision": "float32", "draft": None}
    shown = table({**report, "search": "symmetric", "suites": ["a"]})
    assert "| 2+1 " in shown and "skipped, leaves 2; improvement factor 4.00" in shown


def test_an_int8_model_on_a_cpu_is_tuned_without_leaves(monkeypatch):
    """Cheap as its rows may be: it refuses leaves."""
    monkeypatch.setattr(plan, "worth_trying", lambda *_: [(1,)])
    config = tiny_config(num_layers=2, quantization="int8")
    lm = LM(config, store_tree(config, tiny_params(config.unquantized())))
    prompts = [Prompt("a", np.arange(1, n, dtype=np.int32)) for n in (3, 6)]
    found = plan.tune(lm, prompts, gammas=(1, 2), max_new_tokens=6, check=1)
    assert found.checks and found.combs == () and found.tuning.leaves == ()
