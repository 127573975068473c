"""The findings of `gpu.py` as tables: DIR/report.md.

    python benchmarks/gpu_report.py DIR

What has no table, errors above all, is shown as it was found.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from s3d_jax.bench.report import table as bench_table

Finding = Mapping[str, Any]
Column = tuple[str, Callable[[Finding], str]]

TEXTS: list[Column] = [
    ("precision", lambda x: x["dtype"]),
    ("temperature", lambda x: str(x["temperature"])),
    ("same as AR", lambda x: f"{x['identical']}/{x['prompts']}"),
    (
        "gaps of the best two logits where not",
        lambda x: " ".join(f"{gap:.1e}" for gap in x["gaps_where_different"]),
    ),
    ("τ", lambda x: f"{x['tau']:.2f}"),
]
LOOPS: list[Column] = [
    ("precision", lambda x: x["dtype"]),
    ("cache, MB", lambda x: f"{x['cache_bytes'] / 1e6:.2f}"),
    ("temporary, MB", lambda x: f"{x['temp_bytes'] / 1e6:.2f}"),
    ("state donated", lambda x: "yes" if x["state_is_donated"] else "NO"),
    ("copies of a cache", lambda x: str(x["cache_copies"])),
]
KERNELS: list[Column] = [
    ("method", lambda x: x["method"]),
    ("iterations", lambda x: str(x["iterations"])),
    ("ms", lambda x: f"{x['milliseconds']:.2f}"),
    ("ms with a kernel", lambda x: f"{x['busy_milliseconds']:.2f}"),
    ("kernels", lambda x: str(x["kernels"])),
    ("most time", lambda x: ", ".join(f"{k} {v:.2f}" for k, v in [*x["most"].items()][:5])),
]
ANSWERS: list[Column] = [
    ("answers", lambda x: f"{x['answers']:,}"),
    ("tokens", lambda x: f"{x['tokens']:,}"),
    ("seconds of the last batch", lambda x: f"{x['seconds']:.2f}"),
]


def _passes(found: Sequence[Finding]) -> list[Column]:
    """Columns for the passes that were timed: milliseconds of one row, the others as steps."""
    names = list(dict.fromkeys(name for x in found for name in x["over_ar"] if name != "1 row"))
    return [
        ("shape", lambda x: x["model"]),
        ("precision", lambda x: x["precision"]),
        *([("variant", lambda x: x["variant"])] if any("variant" in x for x in found) else []),
        ("1 row, ms", lambda x: f"{x['milliseconds']['1 row']:.3f}"),
        *((name, _steps(name)) for name in names),
        ("AR / read bound", lambda x: f"{x['ar_share_of_bandwidth']:.0%}"),
        ("weights, GB", lambda x: f"{x['weight_gb']:.2f}"),
        ("computed, GB", lambda x: f"{x['ledger_gb']:.2f}"),
        (
            "peak: made, compiled, ran",
            lambda x: ", ".join(f"{peak:.2f}" for peak in x["peak_memory_gb"].values()),
        ),
        ("most temporary, MB", lambda x: f"{max(x['temp_bytes'].values()) / 1e6:.2f}"),
    ]


def _steps(name: str) -> Callable[[Finding], str]:
    return lambda x: f"{x['over_ar'][name]:.2f}" if name in x["over_ar"] else ""


def markdown(columns: Sequence[Column], found: Sequence[Finding]) -> list[str]:
    """A table of markdown, a line each."""
    rows = [[name for name, _ in columns], ["---"] * len(columns)]
    rows += [[_filled(cell, x) for _, cell in columns] for x in found]
    return ["| " + " | ".join(row) + " |" for row in rows]


def _filled(cell: Callable[[Finding], str], found: Finding) -> str:
    try:
        return cell(found)
    except (KeyError, AttributeError):  # a finding of an earlier version
        return ""


def report(out: Path) -> None:
    """Writes report.md from results.jsonl."""
    text = (out / "results.jsonl").read_text()
    lines = [json.loads(x) for x in text.splitlines() if x.endswith("}")]
    parts: list[str] = []
    for stage in dict.fromkeys(line["stage"] for line in lines):
        rows = [line for line in lines if line["stage"] == stage]
        parts += [f"## {stage}", ""]
        for key, columns in (
            ("tau", TEXTS),
            ("cache_bytes", LOOPS),
            ("over_ar", None),
            ("busy_milliseconds", KERNELS),
            ("answers", ANSWERS),
        ):
            found = [row for row in rows if key in row]
            rows = [row for row in rows if key not in row]
            if found:
                parts += [*markdown(columns or _passes(found), found), ""]
        for row in [row for row in rows if "suites" in row]:
            variant = [f"XLA: {row['variant']}", ""] if "variant" in row else []
            parts += [*variant, bench_table(row), ""]
        rows = [{k: v for k, v in x.items() if k != "stage"} for x in rows if "suites" not in x]
        if rows:
            parts += ["```", *(json.dumps(row, indent=1) for row in rows), "```", ""]
    (out / "report.md").write_text("\n".join(parts))


if __name__ == "__main__":
    report(Path(sys.argv[1]))
