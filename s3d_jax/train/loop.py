"""The training loop: steps, states that survive a kill, metrics, validation.

A run is a folder:

    options.json        what was asked for; a run is only resumed with the same (but for the pace)
    metrics.jsonl       one JSON object per line: the loss of a step, or a validation
    states/<step>/      orbax checkpoints of everything that changes; the last few
    curves.png          loss and acceptance (needs matplotlib)

Everything random is a function of the seed and the step, and the state is whole or absent, so a
run that was killed at any moment goes on bit for bit.
"""

import dataclasses
import json
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from s3d_jax.errors import ConfigError, TrainingError
from s3d_jax.storage.staging import write_atomically
from s3d_jax.train.objective import Mean
from s3d_jax.train.optimizer import OptimizerConfig
from s3d_jax.train.options import differences, in_words

# What divergence is judged by: the loss over some 10 steps, since states are saved meanwhile; how
# far single batches lie from it, over some 50; and what share of its gain a run may lose before its
# states are not kept any more, and before it is stopped. A gain below 7 spreads counts as 7, so
# that noise is none: the running loss of a run that gains nothing stays within about 2 spreads.
_SMOOTHING, _SPREAD_SMOOTHING = 0.9, 0.98
_DOUBTFUL, _DIVERGED = 0.3, 0.7
_LEAST_GAIN = 7.0
_YOUNG = 10  # steps whose mean is the first loss; only then the spread is known

# With other values of these a run may go on; metrics.jsonl then says where they changed.
_MAY_CHANGE = (
    *("steps", "learning_rate", "schedule", "warmup_steps", "final_fraction", "clip_norm"),
    *("log_every", "save_every", "validate_every", "keep_states", "remat"),
)


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How a run goes.

    Attributes:
        optimizer: the updates.
        batch_size: rows per update.
        accumulate: parts that a batch is worked off in, one after the other, to save memory.
        ema_decay: of the running average of the trained weights, which is what is validated and
            kept; 0 takes the weights themselves.
        seed: of everything random.
        log_every, save_every, validate_every: steps; 0 is only at the end.
        keep_states: how many states stay on disk.
    """

    optimizer: OptimizerConfig
    batch_size: int = 16
    accumulate: int = 1
    ema_decay: float = 0.99
    seed: int = 0
    log_every: int = 10
    save_every: int = 200
    validate_every: int = 200
    keep_states: int = 2

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "log_every", "keep_states"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"batch_size ({self.batch_size}) must be a multiple of accumulate "
                f"({self.accumulate})"
            )
        for name in ("save_every", "validate_every"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must be from 0 to {2**32 - 1}, got {self.seed}")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay must be in [0, 1), got {self.ema_decay}")


class Task(Protocol):
    """What is trained.

    Attributes:
        frozen: arguments of the losses that are not trained.
        loss_weights: what is minimised: the sum of these losses with these weights.
        loss_scale: what the backward pass multiplies it by, so that gradients which pass through
            float16 do not vanish; 1 where there are none.
    """

    frozen: Any
    loss_weights: dict[str, float]
    loss_scale: float

    def init(self, key: jax.Array) -> Any:
        """The trained tree, float32."""

    def losses(
        self, tree: Any, frozen: Any, batch: Mapping[str, jax.Array], key: jax.Array
    ) -> dict[str, Mean]:
        """Losses and other metrics; `loss_weights` says what of it is minimised."""


class TrainState(flax.struct.PyTreeNode):
    """Everything that changes.

    Attributes:
        step: int32, updates so far.
        tree: what is trained.
        average: its running average; () without one.
        optimizer: the state of optax.
        running: float32 [5], what divergence is judged by: the running loss; the mean distance of
            single losses from it; the lowest running loss, and that distance then; and the first
            running loss.
    """

    step: jax.Array
    tree: Any
    average: Any
    optimizer: Any
    running: jax.Array

    @property
    def result(self) -> Any:
        """What is validated and kept."""
        return self.tree if self.average == () else self.average


def begin(task: Task, config: LoopConfig) -> TrainState:
    """The state before the first update."""
    tree = task.init(jax.random.key(config.seed))
    average = jax.tree.map(jnp.copy, tree) if config.ema_decay else ()
    optimizer = config.optimizer.build()
    return TrainState(jnp.int32(0), tree, average, optimizer.init(tree), jnp.zeros(5))


def make_step(task: Task, config: LoopConfig) -> Callable[..., Any]:
    """The compiled update: (state, frozen, batch) -> (state, metrics). It donates the state.

    A batch is a dict of arrays with a leading axis of `batch_size`; metrics are the task's, "loss",
    "gradient_norm" and "running" (see TrainState).
    """
    optimizer = config.optimizer.build()
    key = jax.random.key(config.seed)

    def step(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        import optax

        keys = jax.random.split(jax.random.fold_in(key, state.step), config.accumulate)
        parts = jax.tree.map(lambda x: x.reshape(config.accumulate, -1, *x.shape[1:]), batch)

        def minimised(tree: Any, part: Any, key: jax.Array) -> tuple[jax.Array, Any]:
            means = task.losses(tree, frozen, part, key)
            loss = _weighted(task, {k: mean.loss for k, mean in means.items()})
            return task.loss_scale * loss, means

        def gradient(part: Any, key: jax.Array) -> tuple[Any, dict[str, Mean]]:
            scaled, means = jax.grad(minimised, has_aux=True)(state.tree, part, key)
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
            # While it is young the average is a plain mean, so that the beginning is forgotten.
            age = state.step.astype(jnp.float32)
            decay = jnp.minimum(config.ema_decay, (1 + age) / (10 + age))
            average = jax.tree.map(lambda a, x: a + (1 - decay) * (x - a), average, tree)
        running = _running_loss(state, metrics["loss"], config.optimizer.warmup)
        metrics["running"] = running
        return TrainState(state.step + 1, tree, average, optimizer_state, running), metrics

    return jax.jit(step, donate_argnums=0)


def _weighted(task: Task, losses: Mapping[str, jax.Array]) -> jax.Array:
    return jnp.stack([weight * losses[k] for k, weight in task.loss_weights.items()]).sum()


def _sum_over_parts(gradient: Callable[..., Any], parts: Any, keys: jax.Array) -> Any:
    """The sum of `gradient` over the parts, one after the other, with one sum in memory."""
    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(gradient, first, keys[0])
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(*part)), None

    return jax.lax.scan(add, zeros, (parts, keys))[0]


def _running_loss(state: TrainState, loss: jax.Array, warmup: int) -> jax.Array:
    """`TrainState.running` after one more step. In the warm-up a loss may rise: it sets no low."""
    running, spread, lowest, calm, first = state.running
    distance = jnp.where(state.step == 0, 0.0, jnp.abs(loss - running))

    def average(old: jax.Array, new: jax.Array, count: jax.Array, smoothing: float) -> jax.Array:
        """A plain mean of `count` while it is young, so that its first value does not last."""
        decay = jnp.minimum(smoothing, 1 - 1 / jnp.maximum(count, 1))
        return decay * old + (1 - decay) * new

    running = average(running, loss, state.step + 1, _SMOOTHING)
    spread = average(spread, distance, state.step, _SPREAD_SMOOTHING)  # step 0 has no distance
    young = state.step < _YOUNG
    new_low = young | (state.step < warmup) | (running < lowest)
    lowest, calm = jnp.where(new_low, running, lowest), jnp.where(new_low, spread, calm)
    return jnp.stack([running, spread, lowest, calm, jnp.where(young, running, first)])


def _lost(running: Sequence[float]) -> float:
    """The share of its gain that a run has lost again, by `TrainState.running`."""
    now, _, lowest, calm, first = running
    return (now - lowest) / max(first - lowest, _LEAST_GAIN * calm, 1e-9)


def fit(
    task: Task,
    batches: Callable[[int], Mapping[str, np.ndarray]],
    config: LoopConfig,
    run: str | os.PathLike[str],
    *,
    options: Mapping[str, Any],
    validate: Callable[[Any], dict[str, Any]] | None = None,
    resume: bool | int = False,
    progress: bool = False,
) -> tuple[Any, list[dict[str, Any]]]:
    """Trains to the end.

    Args:
        task: what is trained.
        batches: step -> arrays with a leading axis of `batch_size`.
        config: how.
        run: the run's folder.
        options: JSON; everything that the run depends on, to refuse a resume with others.
        validate: trained tree -> JSON, called at the start, every `validate_every` steps, and at
            the end.
        resume: go on from the newest state in `run`, or begin where it has none; a number goes on
            from the state of that step, and removes newer ones.
        progress: show a bar.

    Returns:
        (tree, validations): the trained tree (its running average, if there is one), and what
        `validate` said, from the start of the run to its end.

    Raises:
        TrainingError: the folder holds another run, or not that state; or the loss became NaN or
            diverged. States from before it went bad stay.
    """
    from tqdm import tqdm

    folder = _Run(Path(run), config, options, resume)
    try:
        state = folder.restore(lambda: begin(task, config))
        first, last = int(state.step), config.optimizer.steps
        step_program = make_step(task, config)
        pending: tuple[int, Any] | None = None
        lost = 0.0

        def settle() -> None:
            nonlocal pending, lost
            if pending is not None:
                number, metrics = pending
                values = {k: np.asarray(v).tolist() for k, v in jax.device_get(metrics).items()}
                _check_healthy(number, values, task.loss_scale, folder)
                running = values.pop("running")
                lost = _lost(running)
                if number % config.log_every == 0 or number == last:
                    folder.write({"step": number, **values})
                bar.set_postfix(loss=f"{running[0]:.3f}", refresh=False)
            pending = None

        def validated() -> None:
            if validate is not None:
                folder.write({"step": int(state.step), "validation": validate(state.result)})
                folder.draw()

        with tqdm(
            total=last, initial=first, desc="training", unit=" steps", disable=not progress
        ) as bar:
            if first == 0:
                validated()
            for number in range(first + 1, last + 1):
                batch = batches(number - 1)
                state, metrics = step_program(state, task.frozen, batch)
                settle()  # the step before: the device works on this one meanwhile
                pending = number, metrics
                bar.update()
                if _due(number, config.validate_every) or number == last:
                    settle()
                    validated()
                if _due(number, config.save_every) or number == last:
                    settle()
                    # Where it may be about to diverge, the older states are worth more.
                    if lost <= _DOUBTFUL or number == last:
                        folder.save(state)
                    else:
                        folder.write({"step": number, "not_saved": {"gain_lost": round(lost, 3)}})
        folder.draw()
        lines = folder.lines()
        return state.result, [line["validation"] for line in lines if "validation" in line]
    finally:
        folder.close()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _check_healthy(step: int, values: Mapping[str, Any], loss_scale: float, folder: "_Run") -> None:
    """Stops a run that went wrong, before its state is saved.

    Raises:
        TrainingError: the loss or a gradient is not a number, or the loss is far above where it was
            in the beginning, or lost most of what it had gained.
    """
    running, _, lowest, _, first = values["running"]
    advice = (
        "go on from one with --resume STEP (the newest without a number) and a lower learning rate "
        "or stronger clipping, or begin anew with a longer warm-up"
    )
    if not math.isfinite(values["loss"]):
        what = f"the loss is not a number at step {step}"
    elif not math.isfinite(values["gradient_norm"]):
        loss = values["loss"]
        what = f"the gradients are not finite at step {step}, though the loss is, {loss:.3g}"
        if loss_scale != 1:
            what += f": they overflowed float16 (the loss is scaled by {loss_scale:g})"
            advice = (
                "begin anew in another folder with --dtype bfloat16 or float32 (or, in Python, a "
                "smaller loss_scale of the task)"
            )
    elif running > 1.5 * first + 0.05 or _lost(values["running"]) > _DIVERGED:
        what = f"the loss diverged: about {running:.3g} at step {step}, after {lowest:.3g}"
    else:
        return
    kept = folder.steps()
    where = (
        f"the states of the steps {', '.join(map(str, kept))} are kept" if kept
        else "no state was saved yet"
    )  # fmt: skip
    raise TrainingError(f"{what}; {where} ({folder.path}): {advice}")


class _Run:
    """The folder of a run."""

    def __init__(
        self, path: Path, config: LoopConfig, options: Mapping[str, Any], resume: bool | int
    ) -> None:
        import orbax.checkpoint as ocp

        self.path = path
        self._metrics = path / "metrics.jsonl"
        self._known = path / "options.json"
        check_run(path, resume)
        self._from = None if isinstance(resume, bool) else resume
        self._options = json.dumps(options, indent=1, sort_keys=True) + "\n"
        self._changes = {}
        try:
            if self._known.exists() and _states(path):
                old, new = json.loads(self._known.read_text()), json.loads(self._options)
                self._changes = _changes(old, new, path)
            path.mkdir(parents=True, exist_ok=True)
            if not self._known.exists():
                write_atomically(self._known, self._options)
        except OSError as error:
            raise TrainingError(f"cannot write {path}: {error.strerror or error}") from error
        self._manager = ocp.CheckpointManager(
            (path / "states").absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=config.keep_states,
                enable_async_checkpointing=False,
                cleanup_tmp_directories=True,  # of saves that a kill interrupted
            ),
        )
        self._said = False

    def steps(self) -> list[int]:
        """The steps whose states are kept."""
        return sorted(self._manager.all_steps())

    def restore(self, begin: Callable[[], TrainState]) -> TrainState:
        """The state to go on from, or the first one; what is newer is forgotten."""
        step = self._manager.latest_step() if self._from is None else self._from
        lines = self.lines() if step is not None else []
        if step is not None and not self._metrics.exists():
            raise TrainingError(f"{self._metrics} is missing: this run cannot go on")
        state = begin() if step is None else self._restored(step, begin)
        kept = [line for line in lines if step is not None and line["step"] <= step]
        note = {"step": step, "changed": self._changes}
        if self._changes and kept[-1:] != [note]:
            kept.append(note)
        # The options come last: a kill before that leaves the change to be noted again.
        write_atomically(self._metrics, "".join(json.dumps(line) + "\n" for line in kept))
        write_atomically(self._known, self._options)
        return state

    def _restored(self, step: int, begin: Callable[[], TrainState]) -> TrainState:
        """The state of a step; newer ones are removed."""
        import orbax.checkpoint as ocp

        abstract = jax.eval_shape(begin)
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract
        )
        state = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        for newer in reversed([other for other in self.steps() if other > step]):
            self._manager.delete(newer)
        return state

    def save(self, state: TrainState) -> None:
        import orbax.checkpoint as ocp

        if int(state.step) not in self.steps():
            self._manager.save(int(state.step), args=ocp.args.StandardSave(state))

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends a line to the metrics."""
        with self._metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def lines(self) -> list[dict[str, Any]]:
        """The metrics so far; a line that was cut off by a kill is not one."""
        return read_metrics(self._metrics)

    def draw(self) -> None:
        from s3d_jax.train.curves import draw_curves

        if not draw_curves(self.lines(), self.path / "curves.png") and not self._said:
            warnings.warn(
                "no curves.png without matplotlib: pip install 's3d-jax[plots]'", stacklevel=3
            )
            self._said = True

    def close(self) -> None:
        self._manager.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; [] if there is none. A half-written last line is left out."""
    lines = []
    if Path(path).exists():
        for text in Path(path).read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                break
    return lines


def check_run(run: str | os.PathLike[str], resume: bool | int) -> None:
    """Refuses early what `fit` would refuse about a folder.

    Raises:
        TrainingError: it holds a run and `resume` is False, or the other way; or it has no state of
            the step that `resume` names.
    """
    states = _states(Path(run))
    if resume is False and states:
        raise TrainingError(
            f"{run} holds a run already: go on with --resume (resume=True), or choose another "
            "folder"
        )
    if resume is not False and not (Path(run) / "options.json").is_file():
        raise TrainingError(f"{run} holds no run to go on with: begin without --resume")
    if not isinstance(resume, bool) and resume not in states:
        known = ", ".join(map(str, states)) or "none"
        raise TrainingError(f"{run} has no state of step {resume}; the states it has: {known}")


def _states(run: Path) -> list[int]:
    """Steps whose states are there; orbax renames a state to its number when it is whole."""
    names = [path.name for path in (run / "states").glob("*")]
    return sorted(int(name) for name in names if name.isdigit())


def _changes(old: Any, new: Any, path: Path) -> dict[str, Any]:
    """The options that a resumed run changes.

    Raises:
        TrainingError: one of them makes it another run.
    """
    changed = differences(old, new)
    fixed = {k: v for k, v in changed.items() if k.rpartition("/")[2] not in _MAY_CHANGE}
    if fixed:
        raise TrainingError(
            f"{path} holds a run with other options: {in_words(fixed)}. Only these may change on "
            f"the way: {', '.join(_MAY_CHANGE)}"
        )
    return changed
