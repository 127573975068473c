"""Leaves beside the draft tokens: whether a comb pays on this device.

Its rows save nothing unless the target refuses a draft token where a leaf is right, and they cost
something in every verify pass. So combs are decoded only where the costs that were measured let one
pay; where rows are dear, as on most CPUs, they are not tried.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from s3d_jax.drafters.s3d import takes_leaves
from s3d_jax.lm import LM
from s3d_jax.machine import default_device
from s3d_jax.settings.drafting import PassCosts, Tuning
from s3d_jax.tune.costs import Costs
from s3d_jax.weights.formats import bound_by_memory

# Candidates, from the most to the fewest. On SmolLM2 they commit 16, 11 and 7 percent more tokens
# (docs/log), and one leaf more adds ever less.
COMBS: tuple[tuple[int, ...], ...] = ((2, 1), (2,), (1,))
MOST_ROWS = max(map(sum, COMBS))
# Of an iteration without leaves: what one with them may cost to be tried. The least of COMBS gains
# 7 percent; what was tried is chosen only where it was faster.
_WORTH = 1.05


@dataclasses.dataclass(frozen=True)
class Comb:
    """A comb that was tried.

    Attributes:
        leaves: of `drafters.s3d.S3D`.
        measured: speed over plain decoding; of no leaves, (), what the others compare with.
        spread: its standard deviation over the repeats.
        tokens_per_iteration: τ.
        identical_to_ar: share of outputs that equal plain decoding.
    """

    leaves: tuple[int, ...]
    measured: float
    spread: float
    tokens_per_iteration: float
    identical_to_ar: float


def extra_rows(lm: LM) -> int:
    """Rows that verify passes must be timed with, beyond those of the longest draft."""
    cheap = bound_by_memory(lm.config, default_device().platform)
    return MOST_ROWS if cheap and takes_leaves(lm.config) else 0


def worth_trying(costs: Costs, tuning: Tuning) -> list[tuple[int, ...]]:
    """The combs that may pay with these settings.

    Args:
        costs: of the passes, with `extra_rows`. A leaf costs what a draft token costs.
        tuning: the choice without leaves.
    """
    most, chosen = len(costs.verify) - 1, tuning.costs.iteration(tuning.gamma)
    found = []
    for leaves in COMBS:
        rows = tuning.gamma + sum(leaves)
        if len(leaves) <= tuning.gamma and rows <= most:
            extra = (costs.verify[rows] - costs.verify[tuning.gamma]) / costs.step
            if chosen + extra <= _WORTH * chosen:
                found.append(leaves)
    return found


def combs_of(
    combs: Sequence[tuple[int, ...]], rows: Sequence[Mapping[str, Any]]
) -> tuple[Comb, ...]:
    """What was measured.

    Args:
        combs: the first one has no leaves.
        rows: of plain decoding, then of each comb (`plan.decoded`).
    """
    plain, *others = rows
    return tuple(
        Comb(
            leaves=leaves,
            measured=plain["seconds"] / row["seconds"],
            spread=row["improvement_factor_spread"],
            tokens_per_iteration=row["tokens_per_iteration"],
            identical_to_ar=row["identical_to_ar"],
        )
        for leaves, row in zip(combs, others, strict=True)
    )


def with_fastest(tuning: Tuning, combs: Sequence[Comb], costs: Costs) -> Tuning:
    """The choice with the leaves of the fastest comb."""
    best = max(combs, key=lambda comb: comb.measured)
    if not best.leaves:
        return tuning
    rows = tuning.gamma + sum(best.leaves)
    verify = (*tuning.costs.verify[:-1], costs.verify[rows] / costs.step)
    return dataclasses.replace(
        tuning,
        leaves=best.leaves,
        costs=PassCosts(tuning.costs.draft, verify),
        improvement_factor=best.measured,
    )
