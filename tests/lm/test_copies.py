"""A model that has generated can be copied and pickled; its programs stay."""

import copy
import pickle

import pytest

from tests.tiny import tiny_lm


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_generates_the_same(copied):
    lm = tiny_lm()
    lm.draft_model = tiny_lm(seed=1)
    options = dict(max_new_tokens=8, temperature=0.8, seed=3, method="two-model")
    expected = lm.generate([[1, 2, 3], [4]], **options)
    for other in (copied(lm), copied(lm.engine)):
        assert len(other.programs) == 0 < len(lm.programs)
    tokens = [r.tokens for r in copied(lm).generate([[1, 2, 3], [4]], **options)]
    assert tokens == [r.tokens for r in expected] == [r.tokens for r in copied(expected)]
