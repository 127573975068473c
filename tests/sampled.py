"""Sweeps of which `make test` runs a sample."""

from collections.abc import Collection, Iterable
from itertools import product
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


def combinations(*axes: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """All combinations of the axes, as `sampled` gives them."""
    return sampled(product(*axes), quick)
