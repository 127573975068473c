"""A tiny training run, without any decoding, that all tests of training over a mesh repeat."""

import time
from pathlib import Path

import numpy as np

from s3d_jax.nn.sharding import shape_of
from s3d_jax.settings.drafting import DraftConfig
from s3d_jax.settings.model import ModelConfig
from s3d_jax.settings.training import AdapterConfig, LoopConfig, ObjectiveConfig, OptimizerConfig
from s3d_jax.storage import native
from s3d_jax.train.draft import DraftTask
from s3d_jax.train.folder import read_metrics
from s3d_jax.train.loop import fit
from s3d_jax.train.placement import Placement, mesh_for
from s3d_jax.train.pretrain import PretrainTask
from tests.tiny import tiny_config

STEPS = 10
DRAFT = DraftConfig((False, True), 2)
ADAPTER = AdapterConfig(rank=4, bridge_rank=8, chain_rank=2, recall=1)
OBJECTIVE = ObjectiveConfig("kl", anchors=4)


def config_of(**changes) -> ModelConfig:
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2)
    return tiny_config(**(sizes | dict(num_heads=8, num_kv_heads=2, head_dim=8) | changes))


def loop_of(optimizer: str = "adamw", steps: int = STEPS, **changes) -> LoopConfig:
    rate = 1e-3 if optimizer == "lion" else 1e-2
    settings = OptimizerConfig(steps, optimizer, rate, warmup_steps=2)
    defaults = dict(batch_size=8, log_every=1, save_every=4, validate_every=0, accumulate=2)
    return LoopConfig(settings, **(defaults | changes))


def batch_of(step: int) -> dict[str, np.ndarray]:
    """Rows with padding, another one each step."""
    generator = np.random.default_rng(step)
    learn = np.arange(16) < generator.integers(8, 17, (8, 1))
    return {"tokens": generator.integers(0, 64, (8, 16), np.int32), "learn": learn}


def make_task(model, mesh, mode: str, config: ModelConfig, remat: bool = False):
    """(task, placement) of a mode of `DraftTask`, whose target is in `model`, or of "pretrain"."""
    if mode == "pretrain":
        if mesh is not None:
            config = config.replace(shards=shape_of(mesh).model, over_data=True)
        task = PretrainTask(config, draft_config=DRAFT, adapter=ADAPTER, remat=remat)
    else:
        loaded = native.load(model, mesh=mesh, over_data=mesh is not None)
        config, adapter = loaded.config, ADAPTER
        vocabulary = np.arange(0, 64, 2, dtype=np.int32)
        options = dict(adapter=adapter, objective=OBJECTIVE, vocabulary=vocabulary, remat=remat)
        task = DraftTask(config, loaded.params, DRAFT, mode=mode, **options)
    return task, None if mesh is None else Placement(mesh, config)


def train(
    model,
    run,
    mesh: str | None = None,
    *,
    mode: str = "adapter",
    config: ModelConfig | None = None,
    loop: LoopConfig | None = None,
    resume: bool = False,
    dies_at: int | None = None,
    hangs_at: int | None = None,
):
    """Trains; the tree. It raises, or waits to be killed, before the step of that number."""
    loop, config = loop or loop_of(), config or config_of()
    devices = mesh_for(mesh, config, loop)
    task, place = make_task(model, devices, mode, config)

    def batches(step: int) -> dict[str, np.ndarray]:
        if step + 1 == dies_at:
            raise KeyboardInterrupt
        if step + 1 == hangs_at:
            time.sleep(600)
        return batch_of(step)

    options = {"loop": {"batch_size": loop.batch_size}, "mesh": mesh}
    return fit(task, batches, loop, run, options=options, place=place, resume=resume)[0]


def losses(run) -> tuple[list[float], list[float]]:
    """The loss of each step, one after the other, and the norm of its gradient."""
    lines = [x for x in read_metrics(Path(run) / "metrics.jsonl") if "loss" in x]
    assert [x["step"] for x in lines] == list(range(1, len(lines) + 1))
    return [x["loss"] for x in lines], [x["gradient_norm"] for x in lines]


def assert_close(found, expected) -> None:
    """Sums of float32 in another order differ by a few 2⁻²⁴ = 6e-8 of their size.

    AdamW gives an entry whose gradient is almost 0 a step of full size, in a direction that the
    rounding decides. The loss hardly depends on such entries, the next gradient's norm does a
    little. What a wrong layout does, or a gradient that is counted twice, is in the first digits.
    """
    assert len(found[0]) == len(expected[0])
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4)
