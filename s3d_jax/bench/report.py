"""The report of a measurement: a Markdown table and a picture."""

import contextlib
import importlib.util
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from s3d_jax.errors import InputError
from s3d_jax.machine import machine_name
from s3d_jax.settings.drafting import shown_leaves

_GIB = 2**30


def about() -> dict[str, Any]:
    """Date, command, machine and versions of a measurement."""
    versions = {"python": platform.python_version()}
    for package in ("jax", "flax", "torch", "transformers", "llama_cpp"):
        if package in sys.modules:
            versions[package] = str(sys.modules[package].__version__)
    return {
        "date": date.today().isoformat(),
        "command": _command(),
        "machine": machine_name(),
        "versions": versions,
    }


def _command() -> str:
    """The command to type again, with the number of threads that XLA was given."""
    program = Path(sys.argv[0])
    words = ["python", str(program)] if program.suffix == ".py" else [program.stem]
    if program.parent.name == "s3d_jax":  # python -m s3d_jax
        words = ["s3d"]
    threads = f"NPROC={os.environ['NPROC']} " if os.environ.get("NPROC") else ""
    return threads + shlex.join([*words, *sys.argv[1:]])


def label(row: Mapping[str, Any]) -> str:
    """A method with its settings: "self-spec γ=2, skip 3-6"."""
    words = []
    for name, value in row["settings"].items():
        if name == "skip":
            skipped = [i for i, s in enumerate(value) if s]
            words.append(f"skip {ranges(skipped)}")
        elif name == "leaves":
            words.append(f"leaves {shown_leaves(value)}")
        elif name == "adaptive":
            words += [] if value else ["fixed"]
        elif name == "costs":
            words.append(f"{value} costs")
        elif name == "copies":
            words.append(name)
        elif name == "draft":
            words.append(f"draft {value}")
        elif name in ("dtype", "mode"):
            words.append(value)
        else:
            words.append(f"{'γ' if name == 'gamma' else name}={value}")
    return " ".join([row["method"], ", ".join(words)]).strip()


def ranges(numbers: Sequence[int]) -> str:
    """0-2,5 for [0, 1, 2, 5]."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts) or "none"


def table(report: Mapping[str, Any]) -> str:
    """The report as Markdown: one table over all prompts, and one by category if there are any.

    ± is the standard deviation over the repeats. "plain" is the share of iterations in which a
    method that drafts did not draft; acceptance counts the other iterations.
    """
    rows = report["rows"]
    whole = [row for row in rows if row["category"] == "all"]
    parts = [row for row in rows if row["category"] != "all"]
    head = ["method", "tokens/s", "IF", "end to end", "first token", "compile", "τ", "plain"]
    head += ["accepted by position", "same as AR", "memory", "tokens/s per GiB"]
    lines = [
        f"{report['model']}, {report['precision']}: {whole[0]['prompts']} prompts "
        f"({', '.join(report['suites'])}), greedy, {report['max_new_tokens']} new tokens at most, "
        f"{report['repeats']} repeats",
        "",
        *markdown(head, (_cells(row) for row in whole)),
    ]
    if parts:
        head = ["category", "method", "tokens/s", "IF", "end to end", "τ", "same as AR"]
        head += ["memory", "tokens/s per GiB"]
        lines += ["", *markdown(head, (_short_cells(row) for row in parts))]
    facts = report["about"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines += [
        "",
        f"Peak of {report['memory_is']}, with all methods in it: "
        f"{_gib(report['loaded_memory_bytes'])} GiB after loading, "
        f"{_gib(max(row['max_process_bytes'] for row in whole))} GiB at most during a run.",
        f"{facts['machine']}; {versions}; {facts['date']}; `{facts['command']}`",
    ]
    return "\n".join(lines)


def markdown(head: Sequence[str], rows: Any) -> list[str]:
    """A table with aligned columns, readable as plain text too."""
    cells = [list(head), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]


def _gib(size: float) -> str:
    return f"{size / _GIB:.2f}"


def _number(value: float, spread: float, digits: int) -> str:
    return f"{value:.{digits}f} ± {spread:.{digits}f}"


def _cells(row: Mapping[str, Any]) -> list[str]:
    tau, accepted = row["tokens_per_iteration"], row["acceptance_per_position"]
    first, first_spread = (1e3 * row[f"first_token_seconds{s}"] for s in ("", "_spread"))
    return [
        label(row),
        _number(row["tokens_per_second"], row["tokens_per_second_spread"], 1),
        _number(row["improvement_factor"], row["improvement_factor_spread"], 2),
        f"{row['end_to_end_tokens_per_second']:.1f}",
        f"{_number(first, first_spread, 1)} ms",
        f"{row['compile_seconds']:.1f} s",
        "" if tau is None else f"{tau:.2f}",
        f"{100 * row['plain_share']:.0f} %" if row["plain_share"] else "",
        " ".join(f"{a:.2f}" for a in accepted or ()),
        f"{row['identical_prompts']}/{row['prompts']}",
        f"{row['memory_bytes'] / 2**20:,.1f} MiB",
        f"{row['tokens_per_second_per_gib']:.1f}",
    ]


def _short_cells(row: Mapping[str, Any]) -> list[str]:
    _, speed, factor, whole, *_ = cells = _cells(row)
    return [row["category"], cells[0], speed, factor, whole, cells[6], *cells[9:]]


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draws speed, improvement by category, and acceptance by position as PNG, atomically.

    Raises:
        InputError: matplotlib is not installed, or the file cannot be written.
    """
    check_plot(path)
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    whole = [row for row in report["rows"] if row["category"] == "all"]
    parts = [row for row in report["rows"] if row["category"] != "all"] or whole
    categories = list(dict.fromkeys(row["category"] for row in parts))
    methods = list(dict.fromkeys(label(row) for row in whole))
    colours = {m: colormaps["tab10"](i % 10) for i, m in enumerate(methods)}

    height = max(4.0, 1.6 + 0.22 * len(categories) * len(methods))
    figure = Figure(figsize=(14, height), layout="constrained")
    speed, factor, accepted = figure.subplots(1, 3, width_ratios=(5, 5, 4))

    speeds = [row["tokens_per_second"] for row in whole]
    bars = speed.barh(
        methods,
        speeds,
        xerr=[row["tokens_per_second_spread"] for row in whole],
        color=list(colours.values()),
        error_kw={"capsize": 3, "lw": 1},
    )
    texts = [
        f"{row['tokens_per_second']:.0f}  (IF {row['improvement_factor']:.2f})" for row in whole
    ]
    speed.bar_label(bars, texts, padding=6, fontsize="small")
    longest = max(row["tokens_per_second"] + row["tokens_per_second_spread"] for row in whole)
    speed.set(xlim=(0, 1.4 * longest), xlabel="tokens per second, decoding")
    speed.set_title("Speed over all prompts (± standard deviation)", fontsize="medium")
    speed.invert_yaxis()

    others = methods[1:] or methods  # plain decoding is the line at 1
    width = 0.85 / len(others)
    for i, method in enumerate(others):
        mine = [row for row in parts if label(row) == method]
        places = [k + (i - (len(others) - 1) / 2) * width for k in range(len(categories))]
        factor.barh(
            places,
            [row["improvement_factor"] for row in mine],
            width,
            xerr=[row["improvement_factor_spread"] for row in mine],
            color=colours[method],
            error_kw={"lw": 1},
        )
    factor.axvline(1, color="black", lw=1, ls="--")
    factor.set_yticks(range(len(categories)), categories)
    factor.set(xlabel="improvement factor: speed over plain decoding (dashed)")
    factor.set_title("Improvement by category (colours as on the left)", fontsize="medium")
    factor.invert_yaxis()

    for row in whole:
        values = row["acceptance_per_position"]
        if values:
            accepted.plot(
                range(1, len(values) + 1),
                values,
                "o-",
                color=colours[label(row)],
                label=f"{label(row)}: τ = {row['tokens_per_iteration']:.2f}",
            )
    accepted.set(
        ylim=(0, 1), xlabel="position in the draft", ylabel="share of iterations that drafted"
    )
    accepted.set_title("Draft tokens accepted", fontsize="medium")
    accepted.xaxis.get_major_locator().set_params(integer=True)
    accepted.grid(alpha=0.3)
    if accepted.lines:
        accepted.legend(fontsize="small")
    facts = report["about"]
    title = (report["model"], report["precision"], facts["machine"], facts["date"])
    figure.suptitle(", ".join(title), fontsize="medium")
    save_plot(figure, path)


def save_plot(figure: Any, path: Path) -> None:
    """Writes a matplotlib Figure as PNG, atomically.

    Raises:
        InputError: the file cannot be written.
    """
    partial = path.with_name(path.stem + ".partial.png")
    try:
        figure.savefig(partial, dpi=110)
        partial.replace(path)
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror or error}: give --plot another place"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def check_plot(path: Path) -> None:
    """Fails before an hour of measurements if the picture could not be drawn after it.

    Raises:
        InputError: matplotlib is not installed; or there is no such folder, it cannot be written,
            or the path is a folder itself.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib: pip install 's3d-jax[plots]'")
    folder = path.absolute().parent
    if path.suffix != ".png" or path.is_dir() or not folder.is_dir():
        raise InputError(f"--plot takes the name of a .png file in an existing folder, got {path}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"cannot write into {folder}: give --plot another place")
