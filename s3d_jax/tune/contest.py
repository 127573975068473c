"""Several drafts of one model, each as loading would use it: which one decodes fastest."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from s3d_jax.bench.contestants import Ours
from s3d_jax.errors import InputError
from s3d_jax.jax_settings import under_usual_jax_settings
from s3d_jax.lm import LM
from s3d_jax.texts.suites import Prompt
from s3d_jax.tune.plan import Progress, decoded, to_check_with


@dataclasses.dataclass(frozen=True)
class Standing:
    """What one draft came to.

    Attributes:
        draft: its name.
        method: that uses it: "s3d", "eagle" or "medusa".
        settings: that it decoded with (JSON).
        improvement_factor: speed over plain decoding, by each prompt's median times.
        spread: its standard deviation over the repeats.
        tokens_per_iteration: τ.
        identical_to_ar: share of outputs that equal plain decoding.
        memory_bytes: weights, the draft's too, and caches for the longest prompt.
    """

    draft: str
    method: str
    settings: Mapping[str, Any]
    improvement_factor: float
    spread: float
    tokens_per_iteration: float
    identical_to_ar: float
    memory_bytes: int


@under_usual_jax_settings
def compare(
    drafts: Mapping[str, tuple[str, LM]],
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 128,
    progress: Progress = lambda what, total: lambda: None,
) -> list[Standing]:
    """Lets each draft decode one greedy row, in turns with plain decoding.

    Each decodes as loading uses it here: with its tuned settings where `LM.tuning` has some, with
    copies and by its budget where it has these.

    Args:
        drafts: by name, the method that uses the draft, and the model with it (`lm.with_draft`).
        prompts: typical ones. Those that `tune` checks its predictions by are decoded.
        max_new_tokens, progress: as in `tune`.

    Returns:
        The fastest first.

    Raises:
        InputError: no draft, or no prompt.
    """
    if not drafts or not prompts:
        raise InputError("a comparison needs a draft and a prompt")
    ours = [Ours(method, {}, lm) for method, lm in drafts.values()]
    contestants = [Ours("ar", {}, ours[0].lm), *ours]
    some = to_check_with(prompts)
    plain, *rows = decoded(contestants, some, max_new_tokens, "comparing", progress)
    standings = [
        Standing(
            draft=name,
            method=contestant.method,
            settings=contestant.in_full(),
            improvement_factor=plain["seconds"] / row["seconds"],
            spread=row["improvement_factor_spread"],
            tokens_per_iteration=row["tokens_per_iteration"],
            identical_to_ar=row["identical_to_ar"],
            memory_bytes=row["memory_bytes"],
        )
        for name, contestant, row in zip(drafts, ours, rows, strict=True)
    ]
    return sorted(standings, key=lambda s: -s.improvement_factor)
