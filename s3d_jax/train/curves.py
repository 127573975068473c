"""Draws a run: loss and acceptance over the steps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def draw_curves(lines: Sequence[dict[str, Any]], path: Path) -> bool:
    """Draws the metrics of a run as PNG, atomically; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    losses = [line for line in lines if "loss" in line]
    validations = [(v["step"], v["validation"]) for v in lines if "validation" in v]
    drafts = [(step, v) for step, v in validations if "tokens_per_iteration" in v]
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, label in (("draft_loss", "draft"), ("next_token_loss", "next token")):
        points = [(line["step"], line[name]) for line in losses if name in line]
        if points:
            left.plot(*zip(*points, strict=True), lw=0.8, alpha=0.7, label=label)
    held_out = [(step, v["next_token_loss"]) for step, v in validations if "next_token_loss" in v]
    if held_out:
        left.plot(*zip(*held_out, strict=True), "o-", ms=3, label="next token, held out")
    left.set(xlabel="step", ylabel="loss", title="Loss")
    if left.lines:
        left.legend()

    if drafts:
        steps = [step for step, _ in drafts]
        right.plot(steps, [v["tokens_per_iteration"] for _, v in drafts], "k.-", label="τ")
        right.set(xlabel="step", ylabel="tokens per iteration, τ", title="Held-out decoding")
        share = right.twinx()
        share.set(ylabel="acceptance per position", ylim=(0, 1))
        for i in range(len(drafts[0][1]["acceptance_per_position"])):
            values = [v["acceptance_per_position"][i] for _, v in drafts]
            share.plot(steps, values, lw=0.8, alpha=0.8, label=f"{i + 1}")
        right.legend(loc="upper left")
        share.legend(loc="lower right", title="position", ncols=2, fontsize="small")
    else:
        right.set_axis_off()
    partial = path.with_name(path.stem + ".partial.png")
    figure.savefig(partial, dpi=110)
    partial.replace(path)
    return True
