"""Training on four devices that XLA makes of a CPU: `test_mesh.py` runs this file.

Not collected by itself, since the number of devices is fixed before jax begins.
"""

import json
import re

import jax
import numpy as np
import pytest

import s3d_jax
from benchmarks.sharding import collectives
from s3d_jax.commands.main import main
from s3d_jax.drafters.stored import read_draft
from s3d_jax.mesh import on_mesh
from s3d_jax.nn.sharding import bytes_here, num_bytes, on_host
from s3d_jax.settings.training import AdapterConfig, LoopConfig, TrainDraftConfig
from s3d_jax.storage import native
from s3d_jax.storage.trees import flatten
from s3d_jax.train import loop as training_loop
from s3d_jax.train import runs
from s3d_jax.train.bridges import fitted_draft
from s3d_jax.train.loop import begin, make_step
from s3d_jax.train.placement import mesh_for
from tests.mesh.tiny_run import (
    DRAFT,
    assert_close,
    batch_of,
    config_of,
    loop_of,
    losses,
    make_task,
    train,
)
from tests.tiny import tiny_params
from tests.train.test_objective import noisy_draft

MESHES = ("data=2", "data=2,model=2", "model=2")


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "model"
    native.save(folder, config_of(), tiny_params(config_of()))
    return folder


@pytest.fixture(scope="session")
def one(model, tmp_path_factory):
    """The losses of one device, and what it has learnt."""
    run = tmp_path_factory.mktemp("one") / "run"
    tree = train(model, run)
    return losses(run), tree


@pytest.mark.parametrize("mesh", ["model=2", "data=2,model=2"])
def test_a_fit_that_starts_from_a_draft_is_that_of_one_device(mesh, model):
    """Its deltas are divided as the model's matrices are."""
    loaded = native.load(model)
    start = noisy_draft(loaded.config, loaded.params, DRAFT).replace(bridges={})

    def bridged(mesh: str | None) -> np.ndarray:
        devices = mesh_for(mesh, loaded.config, loop_of())
        lm = native.load(model, mesh=devices, over_data=devices is not None)
        fit = fitted_draft(
            lm.config, lm.params, DRAFT, AdapterConfig(bridge_rank=32), batch_of, 6, start=start
        )
        bridge = fit.bridges["final_norm"]
        x = np.random.default_rng(0).normal(size=(20, 32)).astype(np.float32)
        return np.asarray(jax.nn.silu(x @ bridge["down"]) @ bridge["up"])

    np.testing.assert_allclose(bridged(mesh), bridged(None), atol=1e-3)


@pytest.mark.parametrize("mesh", MESHES)
def test_ten_steps_give_the_losses_of_one_device(mesh, model, one, tmp_path, monkeypatch):
    programs = []

    def make_and_keep(*arguments):
        programs.append(make_step(*arguments))
        return programs[-1]

    monkeypatch.setattr(training_loop, "make_step", make_and_keep)
    tree = train(model, tmp_path / "run", mesh)
    expected, learnt = one
    assert_close(losses(tmp_path / "run"), expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), on_host(tree), learnt)
    assert [program._cache_size() for program in programs] == [1]


def test_a_killed_run_resumes_on_other_devices(model, one, tmp_path):
    """From one device onto four, onto two, and back; each dies one or two steps after a state."""
    places = [(None, 6), ("data=2,model=2", 9), (None, None)]
    for mesh, dies_at in places:
        loop = loop_of(save_every=4)
        resume = mesh is not None or dies_at is None
        if dies_at is None:
            train(model, tmp_path / "run", mesh, loop=loop, resume=resume)
            continue
        with pytest.raises(KeyboardInterrupt):
            train(model, tmp_path / "run", mesh, loop=loop, resume=resume, dies_at=dies_at)
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    notes = [(line["step"], line["changed"]) for line in lines if "changed" in line]
    there, back = [None, "data=2,model=2"], ["data=2,model=2", None]
    assert notes == [(4, {"mesh": there}), (8, {"mesh": back})]
    assert_close(losses(tmp_path / "run"), one[0])


def test_a_model_from_scratch(tmp_path):
    """Its key head is on each of two devices: both copies' gradients belong to it."""
    config, loop = config_of(num_kv_heads=1), loop_of(steps=4, accumulate=1)
    found = []
    for mesh in (None, "data=2,model=2"):
        run = tmp_path / f"run-{mesh}"
        train(None, run, mesh, mode="pretrain", config=config, loop=loop)
        found.append(losses(run))
    assert_close(*found)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "mesh, mode, optimizer",
    [("data=4", "mask", "lion"), ("model=4", "full", "adafactor"), ("data=4", "pretrain", "adamw")],
)
def test_modes_and_optimizers(mesh, mode, optimizer, model, tmp_path):
    found = []
    for where in (None, mesh):
        run = tmp_path / f"run-{where}"
        train(model, run, where, mode=mode, loop=loop_of(optimizer, steps=6))
        found.append(losses(run))
    assert_close(*found)


# --- where arrays lie, and what is sent -----------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "mesh", "whole", "each"),
    [
        ("adamw", "data=2,model=2", 210440, 56328),
        ("adamw", "data=4", 210440, 53576),
        ("adafactor", "data=4", 13240, 7384),
    ],
)
def test_each_device_holds_its_share_of_the_state(optimizer, mesh, whole, each):
    """All but norms and counters. Adafactor keeps vectors, which are small, and lie whole."""
    loop = loop_of(optimizer)
    devices = mesh_for(mesh, config_of(), loop)
    task, place = make_task(None, devices, "pretrain", config_of())
    state = begin(task, loop, place)
    there = {d: 0 for d in devices.devices.flat}
    for x in jax.tree.leaves(state.optimizer):
        for share in x.addressable_shards:
            there[share.device] += share.data.nbytes
    assert set(there.values()) == {each} and num_bytes(state.optimizer) == whole
    assert bytes_here(state.tree) == bytes_here(state.average) < 0.28 * num_bytes(state.tree)
    if optimizer == "adamw":
        down = flatten(state.optimizer[1][0].mu["params"])["layers_1/mlp/down/weight"]
        (shape,) = {share.data.shape for share in down.addressable_shards}
        assert shape == ((32, 12) if mesh == "data=4" else (16, 24))
    else:
        assert whole < 0.2 * num_bytes(state.tree)


@pytest.mark.parametrize("mode", ["adapter", "pretrain"])
def test_no_state_of_the_optimizer_is_sent(mode, model):
    """What is sent: weights that a product needs, gradients, activations, and single numbers."""
    loop = loop_of(accumulate=1)
    mesh = mesh_for("data=2,model=2", config_of(), loop)
    task, place = make_task(model, mesh, mode, config_of())
    state, batch = begin(task, loop, place), place.batch(batch_of(0))
    with on_mesh(mesh):
        compiled = make_step(task, loop, place).lower(state, task.frozen, batch).compile()
    found = collectives(compiled.as_text())
    outside = [sent for sent in found if "jvp(" not in sent.where]  # not of losses and gradients
    assert len(found) > 50 and outside
    # Sums alone: the norm of the gradient; with jax 0.7.2 more, which are not named as gradients.
    # A state that is sent would be gathered, or permuted.
    assert {sent.how for sent in outside} == {"all-reduce"}
    before = jax.tree.map(lambda x: x.sharding, state)
    after = compiled.output_shardings[0]
    jax.tree.map(lambda a, b, x: _same(a, b, x.ndim), before, after, state)


def _same(before, after, ndim) -> None:
    assert after.is_equivalent_to(before, ndim), (before, after)


# --- as users do it -------------------------------------------------------------------------------


SETTINGS = """--steps 3 --warmup-steps 1 --batch-size 4 --validate-every 0 --valid-prompts 2
    --valid-tokens 4 --gamma 2 --skip 1 --rank 2 --bridge-rank 4 --row-length 16 --anchors 2
    --log-every 1 --overwrite"""


@pytest.fixture
def data(tmp_path):
    generator = np.random.default_rng(0)
    lines = [
        {"prompt_tokens": [i], "tokens": generator.integers(0, 64, 14).tolist()} for i in range(40)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(tmp_path / "data.jsonl")


def test_the_command_stores_the_draft_of_one_device(model, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "made_worse", lambda *_: None)
    monkeypatch.setattr(runs, "warn_if_useless", lambda *_: None)
    drafts = []
    for name, more in (("one", []), ("four", ["--mesh", "data=2,model=2"])):
        files = ["--model", str(model), "--data", data, "--run", str(tmp_path / name)]
        command = ["train", *files, "--name", name, *SETTINGS.split(), *more]
        assert main(command) == 0, capsys.readouterr().err
        drafts.append(read_draft(model, name, config_of()))
    ours, theirs = (flatten(on_host(vars(draft.params)["deltas"])) for draft in drafts)
    assert ours.keys() == theirs.keys() and len(ours) == 8
    for path, x in ours.items():
        np.testing.assert_allclose(theirs[path], x, atol=2e-5, err_msg=path)
    a, b = (draft.training["reached"] for draft in drafts)
    assert a == b and a["new_tokens"] == 4 * a["prompts"]
    assert drafts[1].training["mesh"] == "data=2,model=2" and drafts[0].training["mesh"] is None


@pytest.mark.parametrize(
    ("mesh", "batch", "error", "words"),
    [
        ("data=8", 8, s3d_jax.DeviceError, "needs 8 devices, and jax has 4"),
        ("rows=2", 8, s3d_jax.ConfigError, "'rows' is none"),
        ("model=5", 8, s3d_jax.DeviceError, "needs 5 devices"),
        (
            "data=4",
            12,
            s3d_jax.ConfigError,
            "batch_size (--batch-size) 12 in 2 parts gives 6 rows at once: take a multiple of 8, "
            "such as 16",
        ),
        ("data=3", 8, s3d_jax.ConfigError, "take a multiple of 6, such as 12"),
    ],
)
def test_a_bad_mesh_is_refused_before_anything_is_loaded(
    mesh, batch, error, words, model, data, tmp_path, monkeypatch
):
    monkeypatch.setattr(native, "read_array", None)
    monkeypatch.setattr(runs, "read_corpus", None)
    loop = LoopConfig(batch_size=batch, accumulate=2)
    with pytest.raises(error, match=re.escape(words)):
        config = TrainDraftConfig(name="bad", loop=loop)
        runs.train_draft(model, [data], tmp_path / "run", config, mesh=mesh)
    with pytest.raises(error, match=re.escape(words)):
        out, config = tmp_path / "out", runs.PretrainConfig(loop=loop, row_length=16)
        runs.pretrain([data], out, tmp_path / "run", config_of(), config, mesh=mesh)
    assert not (tmp_path / "run").exists()
