"""Recognizes a run that diverges, before its states replace the good ones."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from s3d_jax.errors import TrainingError
from s3d_jax.train.folder import RunFolder
from s3d_jax.train.state import TrainState

# The running loss averages about 10 steps: states are saved meanwhile. The spread, the distance of
# single losses from it, averages about 50. A run that lost the share DOUBTFUL of its gain saves no
# state; one that lost _DIVERGED is stopped. A gain counts as _LEAST_GAIN spreads at least, so noise
# is not mistaken for a gain: the running loss of a run without gain stays within about 2 spreads.
_SMOOTHING, _SPREAD_SMOOTHING = 0.9, 0.98
DOUBTFUL, _DIVERGED = 0.3, 0.7
_LEAST_GAIN = 7.0
_YOUNG = 10  # steps whose mean is the first loss; the spread is unknown before


def next_running(state: TrainState, loss: jax.Array, warmup: int) -> jax.Array:
    """`TrainState.running` after one more step. Losses may rise in the warm-up: they set no low."""
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


def lost_gain(running: Sequence[float]) -> float:
    """The share of its gain that a run has lost again, by `TrainState.running`."""
    now, _, lowest, calm, first = running
    return (now - lowest) / max(first - lowest, _LEAST_GAIN * calm, 1e-9)


def check_healthy(
    step: int, values: Mapping[str, Any], loss_scale: float, folder: RunFolder
) -> None:
    """Stops a run that went wrong, before its state is saved.

    Args:
        step: the step whose metrics are looked at.
        values: the metrics: "loss", "gradient_norm" and "running".
        loss_scale: of the task.
        folder: of the run; the message says which states it keeps.

    Raises:
        TrainingError: the loss or a gradient is not finite, or the loss is far above its first
            value, or has lost most of its gain.
    """
    running, _, lowest, _, first = values["running"]
    advice = (
        "resume from one with --resume STEP (the newest without a number) and a lower learning "
        "rate or stronger clipping, or start from scratch with a longer warm-up"
    )
    if not math.isfinite(values["loss"]):
        what = f"the loss is not a number at step {step}"
    elif not math.isfinite(values["gradient_norm"]):
        loss = values["loss"]
        what = f"the gradients are not finite at step {step}, though the loss is, {loss:.3g}"
        if loss_scale != 1:
            what += f": they overflowed float16 (the loss is scaled by {loss_scale:g})"
            advice = (
                "start from scratch in another folder with --dtype bfloat16 or float32 (or, in "
                "Python, a smaller loss_scale of the task)"
            )
    elif running > 1.5 * first + 0.05 or lost_gain(values["running"]) > _DIVERGED:
        what = f"the loss diverged: about {running:.3g} at step {step}, after {lowest:.3g}"
    else:
        return
    kept = folder.steps()
    states = f"the states of the steps {', '.join(map(str, kept))} are kept"
    where = states if kept else "no state was saved yet"
    raise TrainingError(f"{what}; {where} ({folder.path}): {advice}")
