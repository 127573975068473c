"""The training loop: steps, validations, and states that survive a kill.

Everything random is a function of the seed and the step, and a state is whole or absent, so a run
that is killed at any moment resumes bit for bit. `folder` has the layout of a run's folder.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from s3d_jax.jax_settings import under_usual_jax_settings
from s3d_jax.keys import make_key
from s3d_jax.machine import default_device, out_of_memory_explained
from s3d_jax.mesh import DATA, constrained, is_first_host, on_mesh, told_by_first_host
from s3d_jax.settings.training import LoopConfig
from s3d_jax.train.folder import RunFolder
from s3d_jax.train.health import DOUBTFUL, check_healthy, lost_gain, next_running
from s3d_jax.train.objective import Mean
from s3d_jax.train.optimizer import make_optimizer
from s3d_jax.train.placement import Placement
from s3d_jax.train.state import TrainState


class Task(Protocol):
    """What is trained, and by which losses.

    Attributes:
        frozen: arguments of the losses that are not trained.
        loss_weights: the minimized loss is the sum of these losses with these weights.
        loss_scale: factor on the loss in the backward pass, so that gradients that pass through
            float16 do not vanish; 1 where there are none.
    """

    frozen: Any
    loss_weights: dict[str, float]
    loss_scale: float

    def init(self, key: jax.Array, frozen: Any) -> Any:
        """The trained tree, float32, with arrays as in files."""

    def losses(
        self, tree: Any, frozen: Any, batch: Mapping[str, jax.Array], key: jax.Array
    ) -> dict[str, Mean]:
        """Losses and other metrics by name; `loss_weights` says which are minimized."""


@under_usual_jax_settings
def begin(task: Task, config: LoopConfig, place: Placement | None = None) -> TrainState:
    """The state before the first update, on one device or where it is placed."""
    make = _maker(task, config)
    if place is None:
        return make(task.frozen)
    shardings = place.of(jax.eval_shape(make, task.frozen))
    with on_mesh(place.mesh):  # each device makes its share
        return jax.jit(make, out_shardings=shardings)(task.frozen)


def _maker(task: Task, config: LoopConfig) -> Callable[[Any], TrainState]:
    """Makes the first state, of the frozen arrays."""

    def make(frozen: Any) -> TrainState:
        tree = task.init(make_key(config.seed), frozen)
        average = jax.tree.map(jnp.copy, tree) if config.ema_decay else ()
        optimizer = make_optimizer(config.optimizer)
        return TrainState(jnp.int32(0), tree, average, optimizer.init(tree), jnp.zeros(5))

    return make


def _to_restore(task: Task, config: LoopConfig, place: Placement | None) -> TrainState:
    """The shapes of a state, and where its arrays are to lie."""
    shapes = jax.eval_shape(_maker(task, config), task.frozen)
    device = jax.sharding.SingleDeviceSharding(default_device())
    where = jax.tree.map(lambda _: device, shapes) if place is None else place.of(shapes)
    return jax.tree.map(
        lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), shapes, where
    )


@under_usual_jax_settings
def make_step(task: Task, config: LoopConfig, place: Placement | None = None) -> Callable[..., Any]:
    """The compiled update: (state, frozen, batch) -> (state, metrics). It donates the state.

    A batch is a dict of arrays with a leading axis of `batch_size`; metrics are the task's, "loss",
    "gradient_norm" and "running" (see TrainState). On a mesh it is traced, and so first called,
    under `on_mesh`.
    """
    optimizer = make_optimizer(config.optimizer)
    key = make_key(config.seed)

    @under_usual_jax_settings  # while it is traced, whoever calls it
    def step(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        import optax

        keys = jax.random.split(jax.random.fold_in(key, state.step), config.accumulate)
        parts = jax.tree.map(
            lambda x: constrained(x.reshape(config.accumulate, -1, *x.shape[1:]), None, DATA), batch
        )

        def minimized(tree: Any, part: Any, key: jax.Array) -> tuple[jax.Array, Any]:
            means = task.losses(tree, frozen, part, key)
            loss = _weighted(task, {k: mean.loss for k, mean in means.items()})
            return task.loss_scale * loss, means

        def gradient(part: Any, key: jax.Array) -> tuple[Any, dict[str, Mean]]:
            scaled, means = jax.grad(minimized, has_aux=True)(state.tree, part, key)
            if place is not None:  # each device needs those of its share alone
                scaled = jax.lax.with_sharding_constraint(scaled, place.of(scaled))
            return jax.tree.map(lambda x: x / task.loss_scale, scaled), means

        if config.accumulate == 1:
            gradients, means = gradient(jax.tree.map(lambda x: x[0], parts), keys[0])
        else:
            gradients, means = _sum_over_parts(gradient, parts, keys)
            gradients = jax.tree.map(lambda x: x / config.accumulate, gradients)
        metrics = {name: mean.value for name, mean in means.items()}
        metrics["loss"] = _weighted(task, metrics)
        metrics["gradient_norm"] = optax.tree.norm(gradients)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.tree)
        tree = optax.apply_updates(state.tree, updates)
        average = state.average
        if config.ema_decay:
            # A young average is a plain mean, so that the beginning is forgotten.
            age = state.step.astype(jnp.float32)
            decay = jnp.minimum(config.ema_decay, (1 + age) / (10 + age))
            average = jax.tree.map(lambda a, x: a + (1 - decay) * (x - a), average, tree)
        running = next_running(state, metrics["loss"], config.optimizer.warmup)
        metrics["running"] = running
        after = TrainState(state.step + 1, tree, average, optimizer_state, running)
        if place is not None:  # where it was before, so that one program serves all steps
            after = jax.lax.with_sharding_constraint(after, place.of(after))
            metrics = jax.lax.with_sharding_constraint(metrics, place.whole)
        return after, metrics

    return jax.jit(step, donate_argnums=0)


def _weighted(task: Task, losses: Mapping[str, jax.Array]) -> jax.Array:
    return jnp.stack([weight * losses[k] for k, weight in task.loss_weights.items()]).sum()


def _sum_over_parts(gradient: Callable[..., Any], parts: Any, keys: jax.Array) -> Any:
    """The sum of `gradient` over the parts, one after another, with one sum in memory."""
    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(gradient, first, keys[0])
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(*part)), None

    return jax.lax.scan(add, zeros, (parts, keys))[0]


@under_usual_jax_settings
def fit(
    task: Task,
    batches: Callable[[int], Mapping[str, np.ndarray]],
    config: LoopConfig,
    run: str | os.PathLike[str],
    *,
    options: Mapping[str, Any],
    validate: Callable[[Any], dict[str, Any]] | None = None,
    place: Placement | None = None,
    resume: bool | int = False,
    progress: bool = False,
) -> tuple[Any, list[dict[str, Any]]]:
    """Trains to the end.

    Args:
        task: what is trained.
        batches: step -> arrays with a leading axis of `batch_size`.
        config: how the run proceeds.
        run: the run's folder.
        options: JSON, all that the run depends on; a run with other options is not resumed.
        validate: trained tree -> JSON, called at the start, every `validate_every` steps, and at
            the end.
        place: the devices of a mesh, where `task.frozen` lies too; None is the default device. A
            run may continue on others.
        resume: continue from the newest state in `run`, or start where it has none; a number
            continues from the state of that step, and removes newer ones.
        progress: show a bar.

    Returns:
        (tree, validations): the trained tree (its running average, if there is one), and the
        results of `validate`, from the start of the run to its end.

    Raises:
        TrainingError: the folder holds another run, or not that state; or the loss became NaN or
            diverged. The states from before that are kept.
        DeviceError: the device has too little memory for a step.
    """
    from tqdm import tqdm

    folder = RunFolder(Path(run), options, resume, config.keep_states)
    try:
        state = folder.restore(
            lambda: begin(task, config, place), lambda: _to_restore(task, config, place)
        )
        first, last = int(state.step), config.optimizer.steps
        step_program = make_step(task, config, place)
        pending: tuple[int, Any] | None = None
        lost = 0.0

        def settle() -> None:
            nonlocal pending, lost
            if pending is not None:
                number, metrics = pending
                values = {k: np.asarray(v).tolist() for k, v in jax.device_get(metrics).items()}
                check_healthy(number, values, task.loss_scale, folder)
                running = values.pop("running")
                lost = lost_gain(running)
                if number % config.log_every == 0 or number == last:
                    folder.write({"step": number, **values})
                bar.set_postfix(loss=f"{running[0]:.3f}", refresh=False)
            pending = None

        def validated() -> None:
            if validate is not None:
                folder.write({"step": int(state.step), "validation": validate(state.result)})
                folder.draw()

        with tqdm(
            total=last,
            initial=first,
            desc="training",
            unit=" steps",
            disable=not (progress and is_first_host()),
        ) as bar:
            if first == 0:
                validated()
            for number in range(first + 1, last + 1):
                batch = batches(number - 1) if place is None else place.batch(batches(number - 1))
                with (
                    out_of_memory_explained(lambda: _less_memory(config)),
                    on_mesh(None if place is None else place.mesh),
                ):
                    state, metrics = step_program(state, task.frozen, batch)
                    settle()  # the step before; the device computes this one meanwhile
                pending = number, metrics
                bar.update()
                if _due(number, config.validate_every) or number == last:
                    settle()
                    validated()
                if _due(number, config.save_every) or number == last:
                    settle()
                    if lost <= DOUBTFUL or number == last:
                        folder.save(state)
                    else:
                        folder.write({"step": number, "not_saved": {"gain_lost": round(lost, 3)}})
        folder.draw()
        lines = told_by_first_host(folder.lines() if is_first_host() else None)
        return state.result, [line["validation"] for line in lines if "validation" in line]
    finally:
        folder.close()


def _less_memory(config: LoopConfig) -> str:
    """What a step takes, and how it takes less memory, in words."""
    parts = f"{config.accumulate} part{'s' * (config.accumulate > 1)}"
    return (
        f"a step of {config.batch_size} rows in {parts}: process a batch in more parts "
        "(accumulate, --accumulate), lower batch_size (--batch-size) or row_length "
        "(--row-length), or compute activations again (remat, --remat)"
    )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
