"""Sets of layers to skip: against all sets there are, and against layers that do nothing."""

import dataclasses
import itertools
from typing import get_args

import numpy as np
import pytest

from s3d_jax.errors import InputError
from s3d_jax.lm import LM
from s3d_jax.texts.suites import Prompt
from s3d_jax.tune import acceptance
from s3d_jax.tune.acceptance import Judge, write_texts
from s3d_jax.tune.search import SEARCHES, num_judged, search
from tests.tiny import tiny_config, tiny_params

LAYERS, USELESS = 6, {1, 3, 4}
PROMPTS = [Prompt("a", np.array(p, np.int32)) for p in ([3], [5, 9, 2], [*range(1, 18)])]


def judge_of(useless) -> Judge:
    config = tiny_config(num_layers=LAYERS)
    params = tiny_params(config, 1)
    for i in useless:
        layer = params[f"layers_{i}"]
        layer["attention"]["out"]["weight"] *= 0
        layer["mlp"]["down"]["weight"] *= 0
    lm = LM(config, params)
    return Judge(lm, write_texts(lm, PROMPTS, 40), 3)


@pytest.fixture(scope="module")
def planted() -> Judge:
    return judge_of(USELESS)


def skipped(skip) -> set[int]:
    return {i for i, s in enumerate(skip) if s}


@pytest.mark.parametrize("kind", ["greedy", "dp"])
def test_useless_layers_are_the_first_to_go(kind, planted):
    found = search(kind, planted)
    assert [sum(skip) for skip in found] == [*range(1, LAYERS)]
    assert skipped(found[0]) < USELESS and skipped(found[1]) < USELESS
    assert skipped(found[2]) == USELESS
    assert all(skipped(skip) > USELESS for skip in found[3:])
    every = [
        tuple(i in chosen for i in range(LAYERS))
        for chosen in itertools.combinations(range(LAYERS), 3)
    ]
    assert found[2] == max(every, key=lambda skip: planted.score(skip, 1))


def test_states_that_do_not_fit(planted, monkeypatch):
    slots = planted.texts.tokens.shape[1] + 8 * 3
    each = (1 + LAYERS) * acceptance.context_bytes(planted.lm, slots)
    monkeypatch.setattr(acceptance, "MOST_BYTES", each)  # one text's
    assert [sum(skip) for skip in search("dp", planted)] == [*range(1, LAYERS)]
    monkeypatch.setattr(acceptance, "MOST_BYTES", each - 1)
    with pytest.raises(InputError, match=r"dp would hold .* GiB .*take another search"):
        search("dp", planted)


def test_greedy_takes_one_layer_more_at_a_time():
    judge = judge_of(())
    calls = []
    found = search("greedy", judge, lambda: calls.append(1))
    assert len(calls) == num_judged("greedy", LAYERS)
    before: set[int] = set()
    for skip in found:
        assert before < skipped(skip) and len(skipped(skip)) == len(before) + 1
        larger = [tuple(i in {*before, j} for i in range(LAYERS)) for j in range(LAYERS)]
        rivals = [judge.score(other, 4) for other in larger if sum(other) == sum(skip)]
        assert judge.score(skip, 4) == max(rivals)
        before = skipped(skip)


def test_the_best_band_of_all():
    judge = judge_of({0, 1})
    calls = []
    found = search("band", judge, lambda: calls.append(1))
    assert len(calls) == num_judged("band", LAYERS)
    assert skipped(found[1]) == {0, 1}
    for skip in found:
        size = sum(skip)
        bands = [tuple(a <= i < a + size for i in range(LAYERS)) for a in range(LAYERS - size + 1)]
        assert skip in bands
        assert judge.score(skip, 4) == max(judge.score(band, 4) for band in bands)


def test_the_middle_needs_no_judge(planted):
    found = search("symmetric", planted, lambda: pytest.fail("nothing is judged"))
    assert [skipped(skip) for skip in found] == [
        {3}, {2, 3}, {2, 3, 4}, {1, 2, 3, 4}, {1, 2, 3, 4, 5},
    ]  # fmt: skip
    assert num_judged("symmetric", LAYERS) == num_judged("dp", LAYERS) == 0


def test_the_command_names_the_same_searches():
    from s3d_jax.commands.tune import _Options

    (field,) = (f for f in dataclasses.fields(_Options) if f.name == "search")
    assert get_args(field.type) == SEARCHES
