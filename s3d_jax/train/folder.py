"""The folder of a training run: options, metrics, states and curves.

options.json        the settings; a run resumes only with the same (except for its pace)
metrics.jsonl       one JSON object per line: the losses of a step, or a validation
states/<step>/      orbax checkpoints of the whole state, of no particular mesh; the last few
curves.png          loss and acceptance (needs matplotlib)
"""

import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from s3d_jax.errors import TrainingError
from s3d_jax.mesh import is_first_host
from s3d_jax.storage.staging import write_atomically
from s3d_jax.storage.trees import flatten
from s3d_jax.train.state import TrainState

# A run may resume with other values of these; metrics.jsonl then notes where they changed.
_PLAN = ("steps", "learning_rate", "schedule", "warmup_steps", "final_fraction", "clip_norm")
_PACE = ("log_every", "save_every", "validate_every", "keep_states", "remat", "mesh")
_MAY_CHANGE = (*_PLAN, *_PACE)


class RunFolder:
    """The folder of a run that is in progress.

    Args:
        path: the folder; it is made where it is missing.
        options: JSON; a resumed run must have the same.
        resume: as in `fit`.
        keep_states: how many states stay on disk.

    Raises:
        TrainingError: it holds another run, or not the state to resume from, or cannot be written.
    """

    def __init__(
        self, path: Path, options: Mapping[str, Any], resume: bool | int, keep_states: int
    ) -> None:
        import orbax.checkpoint as ocp

        self.path = path
        self._metrics = path / "metrics.jsonl"
        self._options_file = path / "options.json"
        check_run(path, resume)
        self._resume_step = None if isinstance(resume, bool) else resume
        self._options = json.dumps(options, indent=1, sort_keys=True) + "\n"
        self._changes = {}
        self._writes = is_first_host()
        try:
            if self._options_file.exists() and _states(path):
                old, new = json.loads(self._options_file.read_text()), json.loads(self._options)
                self._changes = _changes(old, new, path)
            path.mkdir(parents=True, exist_ok=True)
            if self._writes and not self._options_file.exists():
                write_atomically(self._options_file, self._options)
        except OSError as error:
            raise TrainingError(f"cannot write {path}: {error.strerror or error}") from error
        self._manager = ocp.CheckpointManager(
            (path / "states").absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep_states,
                enable_async_checkpointing=False,
                cleanup_tmp_directories=True,  # of saves that a kill interrupted
            ),
        )
        self._warned = False

    def steps(self) -> list[int]:
        """The steps whose states are kept."""
        return sorted(self._manager.all_steps())

    def restore(
        self, begin: Callable[[], TrainState], shapes: Callable[[], TrainState]
    ) -> TrainState:
        """The state to resume from, or the first one; metrics and states after it are removed.

        Args:
            begin: makes the first one.
            shapes: of a state, with shardings, which need not be those of the devices that wrote
                it.
        """
        step = self._manager.latest_step() if self._resume_step is None else self._resume_step
        lines = self.lines() if step is not None else []
        if step is not None and not self._metrics.exists():
            raise TrainingError(f"{self._metrics} is missing: this run cannot resume")
        state = begin() if step is None else self._restored(step, shapes())
        kept = [line for line in lines if step is not None and line["step"] <= step]
        note = {"step": step, "changed": self._changes}
        if self._changes and kept[-1:] != [note]:
            kept.append(note)
        if self._writes:
            # The options come last: after a kill before that, the change is noted again.
            write_atomically(self._metrics, "".join(json.dumps(line) + "\n" for line in kept))
            write_atomically(self._options_file, self._options)
        return state

    def _restored(self, step: int, shapes: TrainState) -> TrainState:
        """The state of a step; newer ones are removed."""
        import orbax.checkpoint as ocp

        state = self._manager.restore(step, args=ocp.args.StandardRestore(shapes))
        for newer in reversed([other for other in self.steps() if other > step]):
            self._manager.delete(newer)
        return state

    def save(self, state: TrainState) -> None:
        """Keeps a state, unless it is there already."""
        import orbax.checkpoint as ocp

        if int(state.step) not in self.steps():
            self._manager.save(int(state.step), args=ocp.args.StandardSave(state))

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends a line to the metrics."""
        if not self._writes:
            return
        with self._metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def lines(self) -> list[dict[str, Any]]:
        """The metrics so far, without a line that a kill cut off."""
        return read_metrics(self._metrics)

    def draw(self) -> None:
        """Draws the curves; warns once where matplotlib is missing."""
        from s3d_jax.train.curves import draw_curves

        if (
            self._writes
            and not draw_curves(self.lines(), self.path / "curves.png")
            and not self._warned
        ):
            warnings.warn(
                "no curves.png without matplotlib: pip install 's3d-jax[plots]'", stacklevel=3
            )
            self._warned = True

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
        TrainingError: it holds a run and `resume` is False, or the other way round; or it has no
            state of the step that `resume` names.
    """
    states = _states(Path(run))
    if resume is False and states:
        raise TrainingError(
            f"{run} holds a run already: continue it with --resume (resume=True), or choose "
            "another folder"
        )
    if resume is not False and not (Path(run) / "options.json").is_file():
        raise TrainingError(f"{run} holds no run to resume: start without --resume")
    if not isinstance(resume, bool) and resume not in states:
        known = ", ".join(map(str, states)) or "none"
        raise TrainingError(f"{run} has no state of step {resume}; the states it has: {known}")


def has_states(run: str | os.PathLike[str]) -> bool:
    """Whether a run's folder holds a state to resume from."""
    return bool(_states(Path(run)))


def _states(run: Path) -> list[int]:
    """Steps whose states are whole: orbax renames a state to its number when it is complete."""
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
            f"{path} holds a run with other options: {describe(fixed)}. A run may only change: "
            f"{', '.join(_MAY_CHANGE)}"
        )
    return changed


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, list[Any]]:
    """[old, new] of each option that differs, by its path, "loop/batch_size"; None is absent."""
    before, after = flatten(old), flatten(new)
    keys = {**before, **after}
    return {k: [before.get(k), after.get(k)] for k in keys if before.get(k) != after.get(k)}


def describe(changes: Mapping[str, list[Any]]) -> str:
    """The differences as text for a message."""
    return "; ".join(f"{k} was {a!r:.80}, is now {b!r:.80}" for k, (a, b) in changes.items())
