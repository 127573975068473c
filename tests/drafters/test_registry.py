"""A drafter from outside becomes a method everywhere, with no file of the package changed."""

import dataclasses
import importlib.metadata
import json
import subprocess
import sys
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import pytest

import s3d_jax
from s3d_jax.commands import main as cli
from s3d_jax.decoding.state import Proposal, last_token
from s3d_jax.drafters import registry
from s3d_jax.drafters.base import Drafter
from s3d_jax.errors import ConfigError
from s3d_jax.settings.records import Record
from tests.tiny import tiny_lm

PROMPTS = [[1, 2, 3], [4, 5], [6]]
BUILT_IN = (
    "s3d", "ar", "prompt-lookup", "self-spec", "early-exit", "eagle", "medusa", "two-model",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class CountingConfig(Record):
    gamma: int = 3
    step: int = 1


class Counting(Drafter):
    """Proposes x_n + step, x_n + 2 step, …; counts its iterations and prefilled tokens."""

    name: ClassVar[str] = "counting"
    options: ClassVar[tuple[str, ...]] = ("gamma", "step")

    @classmethod
    def default_settings(cls, target):
        return CountingConfig()

    @classmethod
    def candidates(cls, target):
        return [{"gamma": 2}, {"gamma": 3}]

    def params(self, target):
        return {"vocab": jnp.int32(target.config.vocab_size)}

    def init(self, plan):
        return {"iterations": jnp.int32(0), "prefilled": jnp.zeros(len(plan.lengths), jnp.int32)}

    def prefill(self, state, chunk):
        return state | {"prefilled": state["prefilled"] + chunk.tokens.shape[1]}

    def propose(self, inputs):
        state = inputs.state
        steps = jnp.arange(1, self.gamma + 1) * self.settings.step
        tokens = (last_token(state) + steps) % inputs.drafter_params["vocab"]
        return Proposal(tokens, state.cache)

    def update(self, inputs, verified, accepted):
        state = inputs.state.drafter_state
        return state | {"iterations": state["iterations"] + 1}


@pytest.fixture
def counting():
    registry.register(Counting)
    yield
    registry.unregister("counting")


def test_the_names_stand_in_the_registry():
    assert registry.method_names() == BUILT_IN
    assert tuple(registry.summaries()) == BUILT_IN


@pytest.mark.usefixtures("counting")
def test_in_batches_and_streams():
    lm = tiny_lm()
    expected = [r.tokens for r in lm.generate(PROMPTS, max_new_tokens=12, method="ar")]
    results = lm.generate(PROMPTS, max_new_tokens=12, method="counting", gamma=2, step=3)
    assert [r.tokens for r in results] == expected
    assert results[0].stats.drafted == 2 * results[0].stats.iterations
    # Rows share the number of iterations; each has its own number of prefilled tokens.
    many = lm.generate_many(PROMPTS, rows=2, max_new_tokens=12, method="counting")
    assert [result.tokens for _, result in sorted(many, key=lambda found: found[0])] == expected
    stream = lm.stream_tokens(PROMPTS[0], max_new_tokens=12, method="counting")
    assert sum(stream, []) == expected[0]
    # A text that counts is proposed completely.
    (counted,) = lm.generate([1], max_new_tokens=8, method="counting", step=0, logit_bias={1: 1e9})
    assert counted.tokens == [1] * 8
    assert (counted.stats.iterations, counted.stats.accepted_per_position) == (2, (2, 2, 2))


@pytest.mark.usefixtures("counting")
def test_its_state_goes_through_prefill_and_iterations():
    from s3d_jax.engine.batch import Batch

    batch = Batch(
        tiny_lm().engine, [np.arange(20, dtype=np.int32)], max_new_tokens=5, method="counting"
    )
    list(batch.run())
    assert batch._state.drafter_state["prefilled"].tolist() == [32]
    assert int(batch._state.drafter_state["iterations"]) == batch.results()[0].stats.iterations
    assert batch.kept() is not None


def test_an_entry_point_names_a_drafter_of_another_package(monkeypatch):
    """Known by its name at once, and imported when it is chosen."""
    group = registry.ENTRY_POINTS
    point = importlib.metadata.EntryPoint("counting", "elsewhere:Counting", group)
    monkeypatch.setattr(registry, "_entry_points", lambda: {"counting": point})
    monkeypatch.setattr(importlib.metadata.EntryPoint, "load", lambda self: Counting)
    assert registry.method_names() == (*BUILT_IN, "counting")
    lm = tiny_lm()
    (ar,) = lm.generate([1, 2], max_new_tokens=6, method="ar")
    (ours,) = lm.generate([1, 2], max_new_tokens=6, method="counting", step=2)
    assert ours.tokens == ar.tokens
    registry.unregister("counting")


@pytest.mark.usefixtures("counting")
def test_in_the_command_line_and_bench(capsys):
    words = ["Once upon a time", "--max-new-tokens", "8", "--json"]
    assert cli.main(["generate", *words, "--method", "counting", "--gamma", "2"]) == 0
    ours = json.loads(capsys.readouterr().out)
    assert ours["tokens"] == s3d_jax.load().generate(words[0], max_new_tokens=8)[0].tokens
    assert ours["stats"]["drafted"] == 2 * ours["stats"]["iterations"]
    options = ["--suite", "stories", "--limit", "1", "--repeats", "1", "--max-new-tokens", "8"]
    methods = "counting,counting:gamma=1:step=5"
    assert cli.main(["bench", *options, "--methods", methods, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["method"] for row in rows] == ["ar", "counting", "counting"]
    assert rows[1]["settings"]["gamma"] in (2, 3)
    assert rows[2]["settings"] == {"gamma": 1, "step": 5}
    assert [row["identical_to_ar"] for row in rows] == [1, 1, 1]


@pytest.mark.usefixtures("counting")
def test_wrong_use_is_refused():
    lm = tiny_lm()
    for options, message in (
        (dict(method="counting", ngram=2), "'counting' has no ngram; it has gamma, step"),
        (dict(method="s3d", step=2), r"unknown generation options \['step'\]"),
        (dict(method="nobody"), "method must be one of"),
    ):
        with pytest.raises(ConfigError, match=message):
            lm.generate([1], **options)

    class Impostor(Counting):
        name = "s3d"

    with pytest.raises(ConfigError, match="there is a method 's3d' already"):
        registry.register(Impostor)


def test_the_names_are_known_without_jax():
    program = (
        "import sys; from s3d_jax.drafters import registry; names = registry.method_names();"
        "print('jax' in sys.modules, *names)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.stdout.split() == ["False", *BUILT_IN]
