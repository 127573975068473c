"""The loop: optimizers, accumulation, averages, states that survive a kill, runs that go wrong."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s3d_jax.errors import ConfigError, TrainingError
from s3d_jax.settings.drafting import DraftConfig
from s3d_jax.settings.training import AdapterConfig, LoopConfig, ObjectiveConfig, OptimizerConfig
from s3d_jax.storage import staging
from s3d_jax.texts.documents import read_documents
from s3d_jax.train import folder
from s3d_jax.train.data import Batches, Rows, pack
from s3d_jax.train.draft import DraftTask
from s3d_jax.train.folder import read_metrics
from s3d_jax.train.loop import fit
from s3d_jax.train.objective import Mean
from s3d_jax.train.optimizer import learning_rate_schedule, make_optimizer
from tests.sampled import combinations, sampled
from tests.tiny import tiny_config, tiny_params

ROOT = Path(__file__).resolve().parents[2]


class Line:
    """y = w·x + b by least squares."""

    def __init__(self, noise=0.01):
        self.frozen = {"scale": jnp.float32(1.0)}
        self.loss_weights = {"squares": 1.0}
        self.loss_scale = 4.0
        self.noise = noise

    def init(self, key, frozen):
        return {"w": jax.random.normal(key, (3, 2)), "b": jnp.zeros(2)}

    def losses(self, tree, frozen, batch, key):
        noise = self.noise * jax.random.normal(key, batch["y"].shape)
        error = batch["x"] @ tree["w"] + tree["b"] - frozen["scale"] * batch["y"] + noise
        weights = batch.get("weight", jnp.ones(len(error)))
        total = jnp.sum(weights[:, None] * error**2) / 2
        return {"squares": Mean(total, jnp.sum(weights), len(error))}


def batches(step):
    generator = np.random.default_rng(step)
    x = generator.normal(size=(8, 3)).astype(np.float32)
    return {"x": x, "y": x @ np.arange(6, dtype=np.float32).reshape(3, 2) + 1}


def config(steps=60, **changes):
    optimizer = {k: changes.pop(k) for k in list(changes) if k in OptimizerConfig.__annotations__}
    settings = dict(learning_rate=0.3, warmup_steps=5) | optimizer
    defaults = dict(batch_size=8, log_every=1, save_every=10, validate_every=0, ema_decay=0.0)
    return LoopConfig(OptimizerConfig(steps, **settings), **(defaults | changes))


def losses(run):
    lines = read_metrics(run / "metrics.jsonl")
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.parametrize(
    "optimizer, schedule",
    combinations(
        ["adamw", "lion", "adafactor"],
        ["cosine", "linear", "constant"],
        quick=[("adamw", "cosine"), ("lion", "linear"), ("adafactor", "constant")],
    ),
)
def test_every_optimizer_learns(optimizer, schedule, tmp_path):
    changes = dict(optimizer=optimizer) | ({"learning_rate": 0.2} if optimizer == "lion" else {})
    tree, _ = fit(
        Line(), batches, config(150, schedule=schedule, save_every=0, **changes), tmp_path / "run",
        options={},
    )  # fmt: skip
    curve = losses(tmp_path / "run")
    assert len(curve) == 150 and curve[150] < 0.05 * curve[1]
    if schedule != "constant":
        np.testing.assert_allclose(tree["w"], np.arange(6).reshape(3, 2), atol=0.3)


def test_the_schedule():
    optimizer = OptimizerConfig(
        110, learning_rate=2.0, warmup_steps=10, schedule="linear", final_fraction=0.1
    )
    rate = learning_rate_schedule(optimizer)
    assert float(rate(0)) == pytest.approx(0.2) and float(rate(9)) == pytest.approx(2.0)
    assert float(rate(10)) == pytest.approx(2.0) and float(rate(60)) == pytest.approx(1.1)
    assert float(rate(110)) == pytest.approx(0.2)


def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path):
    """Also where the parts have different weights, as with padding."""

    def weighted(step):
        weight = np.array([0, 0, 0, 0.5, 1, 2, 1, 3], np.float32)
        return batches(step) | {"weight": weight}

    curves, trees = [], []
    for accumulate in (1, 4):
        run = tmp_path / f"run{accumulate}"
        loop = config(20, accumulate=accumulate)
        trees.append(fit(Line(0.0), weighted, loop, run, options={})[0])
        curves.append(list(losses(run).values()))
    np.testing.assert_allclose(*curves, rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3), *trees)


def test_the_average_is_what_is_kept(tmp_path):
    decay, steps = 0.5, 4
    seen = []
    fit(
        Line(), batches, config(steps, validate_every=1, ema_decay=decay), tmp_path / "run",
        options={}, validate=lambda tree: seen.append(np.asarray(tree["b"])) or {},
    )  # fmt: skip
    plain = []
    fit(
        Line(), batches, config(steps, validate_every=1), tmp_path / "plain",
        options={}, validate=lambda tree: plain.append(np.asarray(tree["b"])) or {},
    )  # fmt: skip
    average = plain[0]
    for age, value in enumerate(plain[1:]):
        d = min(decay, (1 + age) / (10 + age))
        average = d * average + (1 - d) * value
        np.testing.assert_allclose(seen[age + 1], average, atol=1e-6)


def test_a_run_resumes_bit_for_bit(tmp_path):
    loop = config(ema_decay=0.9)
    whole, _ = fit(Line(), batches, loop, tmp_path / "whole", options={"a": 1})

    class Killed(Exception):
        pass

    def dying(step):
        if step == 37:
            raise Killed
        return batches(step)

    with pytest.raises(Killed):
        fit(Line(), dying, loop, tmp_path / "run", options={"a": 1})
    assert max(losses(tmp_path / "run")) > 30  # after the last state: they are computed again
    resumed, _ = fit(Line(), batches, loop, tmp_path / "run", options={"a": 1}, resume=True)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    assert states(tmp_path / "run") == [50, 60]
    again, _ = fit(Line(), batches, loop, tmp_path / "run", options={"a": 1}, resume=True)
    jax.tree.map(np.testing.assert_array_equal, again, whole)


def test_another_run_is_not_touched(tmp_path):
    run, options = tmp_path / "run", {"draft": {"rank": 4}, "loop": {"steps": 5}}
    fit(Line(), batches, config(5), run, options=options)
    with pytest.raises(TrainingError, match="holds a run already: continue it with --resume"):
        fit(Line(), batches, config(5), run, options=options)
    other = options | {"draft": {"rank": 8}}
    with pytest.raises(TrainingError, match=r"other options: draft/rank was 4, is now 8\."):
        fit(Line(), batches, config(5), run, options=other, resume=True)


def test_the_pace_may_change_at_a_resume_and_the_change_is_noted(tmp_path):
    run = tmp_path / "run"
    fit(Line(), batches, config(5), run, options={"loop": {"steps": 5}})
    fit(Line(), batches, config(8), run, options={"loop": {"steps": 8}}, resume=True)
    assert sorted(losses(run)) == list(range(1, 9))
    changed = [x for x in read_metrics(run / "metrics.jsonl") if "changed" in x]
    assert changed == [{"step": 5, "changed": {"loop/steps": [5, 8]}}]


@pytest.mark.parametrize("name", ["metrics.jsonl", "options.json"])
def test_a_kill_while_a_change_is_noted_does_not_hide_it(name, tmp_path, monkeypatch):
    run = tmp_path / "run"
    fit(Line(), batches, config(5), run, options={"loop": {"steps": 5}})

    def killed(path, text):
        if path.name == name:
            raise KeyboardInterrupt
        staging.write_atomically(path, text)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(folder, "write_atomically", killed)
        fit(Line(), batches, config(8), run, options={"loop": {"steps": 8}}, resume=True)
    fit(Line(), batches, config(8), run, options={"loop": {"steps": 8}}, resume=True)
    changed = [x["changed"] for x in read_metrics(run / "metrics.jsonl") if "changed" in x]
    assert changed == [{"loop/steps": [5, 8]}]
    assert json.loads((run / "options.json").read_text()) == {"loop": {"steps": 8}}


class Overflowing(Line):
    """Its loss is finite, its gradient is not."""

    def losses(self, tree, frozen, batch, key):
        means = super().losses(tree, frozen, batch, key)
        infinite = jnp.sqrt(jnp.sum(0 * tree["b"]))
        return {"squares": means["squares"].replace(total=means["squares"].total + infinite)}


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_overflowing_gradients_are_not_reported_as_a_loss(scale, tmp_path):
    task = Overflowing()
    task.loss_scale = scale
    message = r"gradients are not finite at step 1, though the loss is, [\d.]+"
    message += {1.0: "; no state", 1024.0: r": they overflowed float16 .*bfloat16"}[scale]
    with pytest.raises(TrainingError, match=message):
        fit(task, batches, config(5), tmp_path / "run", options={})


def test_weight_decay_follows_the_learning_rate():
    for name in ("adamw", "adafactor", "lion"):
        settings = dict(optimizer=name, warmup_steps=0, schedule="constant", learning_rate=1e-2)
        optimizer = make_optimizer(OptimizerConfig(10, weight_decay=0.5, **settings))
        tree = {"matrix": jnp.ones((9, 9)), "vector": jnp.ones(2)}
        zero = jax.tree.map(jnp.zeros_like, tree)
        updates, _ = optimizer.update(zero, optimizer.init(tree), tree)
        np.testing.assert_allclose(updates["matrix"], -0.5 * 1e-2, rtol=1e-5)
        np.testing.assert_array_equal(updates["vector"], 0.0)


@pytest.mark.parametrize("what", ["nan", "diverging"])
def test_a_run_that_goes_wrong_stops_with_the_last_good_state(what, tmp_path):
    def spoilt(step):
        batch = batches(step)
        if what == "nan" and step == 25:
            batch["y"][0, 0] = np.nan
        if what == "diverging" and step >= 25:
            batch["y"] = batch["y"] * 10.0 ** (step - 24)
        return batch

    message = "not a number at step 26; the states of the steps 10, 20 are kept"
    with pytest.raises(
        TrainingError, match=message if what == "nan" else "diverged.*steps 10, 20 are kept"
    ):
        fit(Line(), spoilt, config(), tmp_path / "run", options={})
    assert max(losses(tmp_path / "run")) < 30
    fit(Line(), batches, config(), tmp_path / "run", options={}, resume=True)
    assert losses(tmp_path / "run")[60] < 0.1


@pytest.mark.parametrize("name", ["lion", "adafactor"])
def test_other_optimizers_teach_a_real_draft(name, model):
    config_ = tiny_config()
    rows = pack(read_documents([model / "own.jsonl"], None, None), 32)
    task = DraftTask(
        config_,
        tiny_params(config_),
        DraftConfig((False, True, True, False), gamma=3),
        objective=ObjectiveConfig(anchors=4, hop=False),
        adapter=AdapterConfig(4, 8),
    )
    loop = config(
        80, optimizer=name, learning_rate={"lion": 3e-3, "adafactor": 3e-2}[name], save_every=0
    )
    fit(task, Batches(rows, 8, seed=0), loop, model / f"run-{name}", options={})
    lines = [x for x in read_metrics(model / f"run-{name}/metrics.jsonl") if "loss" in x]
    first, last = (np.mean([x["agreement"] for x in part]) for part in (lines[:5], lines[-5:]))
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"] and last > first + 0.1, (first, last)


class Scripted(Line):
    """Its loss at each step is given by the batch."""

    def losses(self, tree, frozen, batch, key):
        return {"squares": Mean(jnp.sum(batch["loss"]) + 0 * jnp.sum(tree["w"]), 8.0, 8.0)}


def scripted(curve, noise):
    values = np.asarray(curve) + noise * np.random.default_rng(0).normal(size=len(curve))
    return lambda step: {"loss": np.full(8, values[step], np.float32)}


def states(run):
    return sorted(int(p.name) for p in (run / "states").iterdir() if p.name.isdigit())


@pytest.mark.parametrize("lowest", [0.5, 0.85])
def test_a_bounded_loss_that_rises_again_is_noticed_before_its_states_replace_the_good_ones(
    lowest, tmp_path
):
    """Total variation is at most 1, so it never gets far above its first value."""
    curve = [*np.linspace(0.95, lowest, 100), *np.linspace(lowest, 0.97, 30), *[0.97] * 100]
    loop = config(230, save_every=5, warmup_steps=50)
    with pytest.raises(TrainingError, match=r"diverged: .* the steps (\d+), (\d+) are") as caught:
        fit(Scripted(), scripted(curve, 0.01), loop, tmp_path / "run", options={})
    kept = states(tmp_path / "run")
    assert f"steps {kept[0]}, {kept[1]} are kept" in str(caught.value)
    assert kept[1] <= 115 and max(losses(tmp_path / "run")) < 145
    skipped = [x for x in read_metrics(tmp_path / "run/metrics.jsonl") if "not_saved" in x]
    assert skipped and all(x["not_saved"]["gain_lost"] > 0.3 for x in skipped)


@pytest.mark.parametrize("seed", range(3))
def test_noise_is_not_divergence(seed, tmp_path):
    """A run that gains nothing keeps its states and finishes; so does a short one."""
    values = 0.9 + 0.1 * np.random.default_rng(seed).standard_t(4, 1000)
    steps = 1000 if seed else 8
    loop = config(steps, save_every=100, keep_states=20, log_every=100, warmup_steps=3)
    batch = lambda step: {"loss": np.full(8, values[step], np.float32)}  # noqa: E731
    fit(Scripted(), batch, loop, tmp_path / "run", options={})
    assert states(tmp_path / "run") == (list(range(100, 1001, 100)) if seed else [8])


def test_an_explosion_in_the_warm_up_is_noticed(tmp_path):
    """Also where the run is shorter than the default warm-up of 50 steps."""
    with pytest.raises(TrainingError, match=r"diverged.*no state was saved yet"):
        fit(Scripted(), scripted([1.0] * 20 + [9.0] * 20, 0.01),
            config(40, warmup_steps=50, save_every=0), tmp_path / "run", options={})  # fmt: skip
    assert OptimizerConfig(40).warmup == 39 and OptimizerConfig(400).warmup == 50


def test_a_run_goes_back_to_a_named_state(tmp_path):
    run, loop = tmp_path / "run", config(30, keep_states=3)
    whole, _ = fit(Line(), batches, loop, run, options={})
    curve = losses(run)
    with pytest.raises(TrainingError, match="no state of step 15; the states it has: 10, 20, 30"):
        fit(Line(), batches, loop, run, options={}, resume=15)
    seen = []

    def watched(step):
        seen.append((step, states(run), max(losses(run))))
        return batches(step)

    again, _ = fit(Line(), watched, loop, run, options={}, resume=10)
    assert seen[0] == (10, [10], 10)  # newer states are gone
    assert losses(run) == curve and states(run) == [10, 20, 30]
    jax.tree.map(np.testing.assert_array_equal, again, whole)


@pytest.mark.parametrize(
    "changes",
    [
        dict(steps=0),
        dict(optimizer="sgd"),
        dict(schedule="step"),
        dict(learning_rate=-1.0),
        dict(learning_rate=float("nan")),
        dict(clip_norm=0.0),
        dict(warmup_steps=-1),
        dict(final_fraction=2.0),
        dict(batch_size=0),
        dict(accumulate=3),
        dict(ema_decay=1.0),
        dict(keep_states=0),
        dict(seed=-1),
        dict(weight_decay=-0.1),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        config(**changes)


def test_curves_are_drawn(tmp_path):
    reports = [
        {"tokens_per_iteration": 1.0 + i, "acceptance_per_position": [0.2, 0.1]} for i in range(3)
    ]
    left = iter(reports)
    _, validations = fit(
        Line(), batches, config(20, validate_every=10), tmp_path / "run", options={},
        validate=lambda tree: next(left),
    )  # fmt: skip
    assert validations == reports
    data = (tmp_path / "run" / "curves.png").read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 5000
    kinds = [("validation" in x, x["step"]) for x in read_metrics(tmp_path / "run/metrics.jsonl")]
    assert [step for validation, step in kinds if validation] == [0, 10, 20]


def draft_run(run, resume):
    """Trains the adapter of a tiny model; a state every third step."""
    model = tiny_config()
    task = DraftTask(
        model,
        tiny_params(model),
        DraftConfig((False, True, True, False), gamma=3),
        objective=ObjectiveConfig(anchors=2),
        adapter=AdapterConfig(2, 2),
    )
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (64, 12)).astype(np.int32)
    rows = Batches(Rows(tokens, np.ones(tokens.shape, bool)), 4, seed=0)
    loop = config(400, save_every=3, ema_decay=0.9, batch_size=4, learning_rate=1e-3)
    return fit(task, rows, loop, run, options={"what": "draft"}, resume=resume)[0]


KILLED = """
import itertools, os, pathlib, signal, sys
sys.path.insert(0, {root!r})
from tests.train.test_loop import draft_run
kill_at, count = {kill_at}, itertools.count(1)

def die_in_saving(event, arguments):
    if event in ("os.mkdir", "os.rename", "os.remove", "shutil.rmtree", "open"):
        writes = event != "open" or (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        if writes and "/states/" in str(arguments[0]) and next(count) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(die_in_saving)
draft_run({run!r}, resume=pathlib.Path({run!r}, "options.json").exists())
"""


KILLS = {"two": (0, 16), "ten": (0, 5, 0, 12, 0, 16, 0, 17, 0, 35)}


@pytest.mark.parametrize("count", sampled(list(KILLS), []))
def test_kills_leave_the_curve_as_it_is(count, tmp_path):
    """SIGKILL at random moments (0), and between two files of a save or of a removal.

    A save writes or renames some 16 times, then removes an old state in two steps.
    """
    whole = draft_run(tmp_path / "whole", resume=False)
    expected = losses(tmp_path / "whole")
    generator, run, kills = random.Random(0), tmp_path / "run", 0
    # A cache of their own: a kill may leave half an entry.
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    for kill_at in KILLS[count]:
        code = KILLED.format(root=str(ROOT), run=str(run), kill_at=kill_at)
        process = subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=ROOT)
        if kill_at:
            assert process.wait(600) == -signal.SIGKILL
            kills += 1
            continue
        before = losses(run)
        # Wait until it makes progress, then kill at a random moment shortly after.
        deadline = time.monotonic() + 600
        while losses(run) == before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.25))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills == len(KILLS[count]), f"it finished after {kills} kills: more steps are needed"
    assert 0 < max(losses(run)) < 400
    resumed = draft_run(run, resume=True)
    assert losses(run) == expected
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == len(expected) and all(json.loads(line) for line in lines)
