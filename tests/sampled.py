"""Sweeps of which `make test` runs a sample."""

import itertools
from collections.abc import Collection, Iterable
from typing import Any

import pytest


def sampled(cases: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """Parameters for `pytest.mark.parametrize`; all but `quick` are left to `make test-all`.

    Args:
        cases: values, tuples of values for several arguments, or a dict of values by their ids.
        quick: the cases, or their ids, that `make test` runs.
    """
    names = list(cases)
    unknown = [case for case in quick if case not in names]
    assert not unknown, f"no such cases: {unknown}"
    parameters = []
    for name in names:
        marks = () if name in quick else pytest.mark.exhaustive
        if isinstance(cases, dict):
            parameters.append(pytest.param(cases[name], id=name, marks=marks))
        else:
            values = name if isinstance(name, tuple) else (name,)
            parameters.append(pytest.param(*values, marks=marks))
    return parameters


def combinations(*axes: Iterable[Any], quick: Collection[tuple[Any, ...]]) -> list[Any]:
    """Combinations in which each two values of two axes meet, as `sampled` gives them.

    Faults seldom need more than two values together. With two axes these are all combinations.
    `quick` comes first, then whatever adds the most pairs.
    """
    left = list(itertools.product(*axes))
    assert all(len(case) > 1 for case in left), "one axis has no pairs; take `sampled`"
    chosen: list[tuple[Any, ...]] = []
    met: set[Any] = set()

    def take(case: tuple[Any, ...]) -> None:
        assert case in left, f"no such case: {case}"
        left.remove(case)
        chosen.append(case)
        met.update(_pairs(case))

    for case in quick:
        take(case)
    while left and _pairs(case := max(left, key=lambda case: len(_pairs(case) - met))) - met:
        take(case)
    return sampled(chosen, quick)


def _pairs(case: tuple[Any, ...]) -> set[Any]:
    """Each two of its values, with their axes."""
    return set(itertools.combinations(enumerate(case), 2))
