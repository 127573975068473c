"""A draft with a vocabulary of its own and a chain drafts other tokens, and changes no output."""

import jax.numpy as jnp
import numpy as np
import pytest

from s3d_jax.lm import LM
from s3d_jax.nn.draft import with_head
from s3d_jax.settings.drafting import DraftConfig
from s3d_jax.weights.trees import store_tree
from tests.tiny import tiny_config, tiny_params
from tests.train.test_objective import noisy_draft

PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7], [9, 9]]
DRAFT = DraftConfig((False, True, True, False), 4)


def model(chain=True, vocabulary=True, **changes) -> LM:
    config = tiny_config(**changes)
    params = tiny_params(config)
    draft = noisy_draft(config, params, DRAFT, 0.1, chain_rank=4 if chain else 0, recall=2)
    if vocabulary:
        draft = draft.replace(vocabulary=jnp.arange(1, config.vocab_size, 3))
    if config.quantization:
        params = store_tree(config, params)
    return LM(config, params, draft_config=DRAFT, draft_params=with_head(config, params, draft))


@pytest.mark.parametrize(
    "parts", [dict(chain=True), dict(vocabulary=False), dict(quantization="int8", exact_sums=True)]
)
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(temperature=0.9, seed=[3, 4, 5]),
        dict(temperature=[0.0, 0.8, 1.2], top_k=9, top_p=0.9, repetition_penalty=1.3, seed=7),
        dict(logit_bias={4: 5.0, 6: -100.0}, presence_penalty=0.5),
    ],
    ids=["greedy", "sampled", "warped", "biased"],
)
def test_every_text_is_that_of_plain_decoding(parts, options):
    lm = model(**parts)
    results = lm.generate(PROMPTS, max_new_tokens=24, adaptive=False, **options)
    expected = lm.generate(PROMPTS, max_new_tokens=24, method="ar", **options)
    assert [r.tokens for r in results] == [r.tokens for r in expected]


@pytest.mark.parametrize("temperature", [0.0, 0.01, 1.0])
def test_what_it_cannot_draft_is_never_accepted_and_the_rest_may_be(temperature):
    """The draft is the target itself, so each of its tokens is right, as far as it knows it."""
    config = tiny_config()
    params = tiny_params(config)
    every_layer = DraftConfig((False,) * 4, 1)
    vocabulary = jnp.arange(0, 31, 2)
    lm = LM(config, params, draft_config=every_layer)
    options = dict(max_new_tokens=60, temperature=temperature, seed=5, adaptive=False)
    ar = lm.generate(PROMPTS, method="ar", **options)
    draft = with_head(config, params, lm.draft_params.replace(vocabulary=vocabulary))
    lm = LM(config, params, draft_config=every_layer, draft_params=draft)
    found = []
    for result, expected in zip(lm.generate(PROMPTS, **options), ar, strict=True):
        assert result.tokens == expected.tokens
        # Replayed: an iteration drafts its first token, and the bonus token follows if it is right.
        position = iterations = accepted = 0
        while position < len(expected.tokens):
            right = expected.tokens[position] % 2 == 0
            accepted, iterations = accepted + right, iterations + 1
            position += 1 + right
        found.append((accepted, iterations))
        assert result.stats.iterations == iterations
        assert result.stats.accepted_per_position == (accepted,)
    accepted, iterations = map(sum, zip(*found, strict=True))
    assert 0 < accepted < iterations


def test_the_head_s_rows_are_copied_once():
    lm = model()
    (head,) = lm.draft_params.head
    rows = np.asarray(lm.params["lm_head"]["weight"])[np.asarray(lm.draft_params.vocabulary)]
    np.testing.assert_array_equal(head, rows)
    assert with_head(lm.config, lm.params, lm.draft_params) is lm.draft_params
    int8 = model(quantization="int8")
    assert [x.dtype.name for x in int8.draft_params.head] == ["int8", "float32"]
