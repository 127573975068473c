"""The report of tuning: Markdown tables and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from s3d_jax.bench.report import check_plot, markdown, ranges, save_plot
from s3d_jax.settings.drafting import shown_leaves

_LEAST = 0.01  # steps; a draft pass that seems to cost less was mismeasured

# Both take the JSON object of the command: TuningPlan.to_dict() and the options.


def skipped(skip: Sequence[bool]) -> str:
    """The skipped layers in words: "0-2,5"."""
    return ranges([i for i, s in enumerate(skip) if s])


def table(report: Mapping[str, Any]) -> str:
    """Costs, the surface, the check, and the choice."""
    costs, checks, tuning = report["costs"], report["checks"], report["tuning"]
    candidates = report["candidates"]
    gammas = list(candidates[0]["improvement_factor"])
    step = costs["verify"][0]
    depths = sorted(next(iter(costs["draft"].values())))
    best = max(f for c in candidates for f in c["improvement_factor"].values())
    cost_rows = [["verify pass", *(f"{costs['verify'][g] / step:.2f}" for g in gammas)]]
    for kept in depths:
        each = (f"{costs['draft'][g][kept] / step:.2f}" for g in gammas)
        cost_rows.append([f"draft pass, {kept} layers", *each])
    of_depths = [[costs["draft"][g][kept] for kept in depths] for g in gammas]
    contradict = any(row != sorted(row) or row[0] < _LEAST * step for row in of_depths)
    surface = []
    for c in candidates:
        factors = c["improvement_factor"].values()
        cells = (f"**{f:.2f}**" if f == best else f"{f:.2f}" for f in factors)
        tau = c["tokens_per_iteration"][gammas[-1]]
        kept = len(c["skip"]) - sum(c["skip"])
        acceptance = " ".join(f"{a:.2f}" for a in c["acceptance"])
        estimated = "" if c["measured"] else " (between)"
        surface.append(
            [str(kept), skipped(c["skip"]), *cells, f"{tau:.2f}", acceptance + estimated]
        )
    lines = [
        f"{report['model']}, {report['precision']}, draft {report['draft'] or 'untrained'}, "
        f"{report['search']} sets: {report['calibration_prompts']} prompts "
        f"({', '.join(report['suites'])}), {report['calibration_tokens']} tokens in all",
        "",
        f"Costs in steps of plain decoding ({1e3 * step:.3g} ms, {costs['visible']} slots read):",
        "",
        *markdown(["", *(f"γ={g}" for g in gammas)], cost_rows),
        "",
        "Predicted improvement factors; τ and acceptance by position are of the largest γ:",
        "",
        *markdown(
            ["layers", "skipped", *(f"γ={g}" for g in gammas), "τ", "accepted by position"], surface
        ),
    ]
    if contradict:
        lines += [
            "",
            "The costs of the draft pass contradict each other: something else ran on this "
            "machine. Run the command again with nothing else running.",
        ]
    if checks:
        lines += [
            "",
            f"Predictions and measurements, on {_checked_on(report)}:",
            "",
            *markdown(
                ("setting", "τ pred.", "τ meas.", "IF pred.", "IF meas.", "error", "same as AR"),
                map(_check_cells, checks),
            ),
        ]
    if combs := report["combs"]:
        lines += ["", "Other candidates beside the draft tokens, with the fastest setting:", ""]
        headings = ("leaves", "τ", "IF meas.", "same as AR")
        lines += markdown(headings, [_comb_cells(comb) for comb in combs])
    draft, verify = tuning["costs"]["draft"], tuning["costs"]["verify"][-1]
    chosen = f"γ={tuning['gamma']}, layers {skipped(tuning['skip'])} skipped"
    if tuning.get("leaves"):
        chosen += f", leaves {shown_leaves(tuning['leaves'])}"
    lines += [
        "",
        f"Chosen: {chosen}; improvement factor {tuning['improvement_factor']:.2f}, draft pass "
        f"{draft:.2f} and verify pass {verify:.2f} steps.",
    ]
    if not report["pays"]:
        lines += [
            "Plain decoding is faster here than S3D with any of these settings: take --method ar "
            '(method="ar"). What is chosen is what S3D loses least with.'
        ]
    return "\n".join(lines)


def comparison(report: Mapping[str, Any]) -> str:
    """The drafts, the fastest first, and what it means.

    Args:
        report: of the command with --drafts.
    """
    rows, preferred = report["drafts"], report["preferred"]
    cells = [
        [
            row["draft"],
            row["method"],
            _settings(row["settings"]),
            f"{row['tokens_per_iteration']:.2f}",
            f"{row['improvement_factor']:.2f} ± {row['spread']:.2f}",
            f"{row['memory_bytes'] / 2**20:.0f}",
            f"{100 * row['identical_to_ar']:.0f} %",
        ]
        for row in rows
    ]
    headings = ["draft", "method", "settings", "τ", "over AR", "MiB", "same as AR"]
    lines = [f"{report['model']}, drafts in turns:", "", *markdown(headings, cells), ""]
    fastest = rows[0]
    if fastest["improvement_factor"] < 1:
        lines.append("Plain decoding is faster here than any of them: take --method ar.")
    elif fastest["draft"] != preferred:
        lines.append(
            f"The fastest is {fastest['draft']}: use it with --method {fastest['method']} --draft "
            f"{fastest['draft']}."
        )
    if preferred:
        lines.append(f"The fastest of the method s3d is {preferred}.")
    return "\n".join(lines)


def _comb_cells(comb: Mapping[str, Any]) -> list[str]:
    return [
        shown_leaves(comb["leaves"]),
        f"{comb['tokens_per_iteration']:.2f}",
        f"{comb['measured']:.2f} ± {comb['spread']:.2f}",
        f"{100 * comb['identical_to_ar']:.0f} %",
    ]


def _settings(settings: Mapping[str, Any]) -> str:
    parts = [f"γ={settings['gamma']}"]
    if settings.get("mode") == "merged":
        parts.append("merged")
    if "skip" in settings:
        parts.append(f"skip {skipped(settings['skip'])}")
    if "leaves" in settings:
        parts.append(f"leaves {shown_leaves(settings['leaves'])}")
    return ", ".join(parts)


def _checked_on(report: Mapping[str, Any]) -> str:
    count = report["check_prompts"]
    others, prompts = report["held_out"], "prompt" if count == 1 else f"{count} prompts"
    if others:
        return "another prompt" if count == 1 else f"{count} other prompts"
    return f"the same {prompts}, since there are too few"


def _check_cells(check: Mapping[str, Any]) -> list[str]:
    return [
        f"γ={check['gamma']}, skip {skipped(check['skip'])}",
        f"{check['predicted_tau']:.2f}",
        f"{check['measured_tau']:.2f}",
        f"{check['predicted']:.2f}",
        f"{check['measured']:.2f} ± {check['spread']:.2f}",
        f"{100 * check['error']:+.1f} %",
        f"{100 * check['identical_to_ar']:.0f} %",
    ]


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draws the surface, acceptance by position and depth, and the check as PNG, atomically.

    Raises:
        InputError: matplotlib is not installed, or the file cannot be written.
    """
    check_plot(path)
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    candidates, checks = report["candidates"], report["checks"]
    gammas = list(candidates[0]["improvement_factor"])
    figure = Figure(figsize=(14, 2.4 + 0.28 * max(len(candidates), 8)), layout="constrained")
    surface, accepted, check = figure.subplots(1, 3, width_ratios=(5, 4, 4))

    factors = [list(c["improvement_factor"].values()) for c in candidates]
    largest = max(abs(f - 1) for row in factors for f in row)
    limits = {"vmin": 1 - largest, "vmax": 1 + largest}
    surface.imshow(factors, aspect="auto", cmap="RdYlGn", alpha=0.8, **limits)
    chosen = report["tuning"]
    for y, c in enumerate(candidates):
        for x, gamma in enumerate(gammas):
            here = (gamma, c["skip"]) == (chosen["gamma"], chosen["skip"])
            weight = "bold" if here else "normal"
            text = f"[{factors[y][x]:.2f}]" if here else f"{factors[y][x]:.2f}"
            surface.text(x, y, text, ha="center", va="center", weight=weight, fontsize="small")
    labels = [f"{len(c['skip']) - sum(c['skip'])} ({skipped(c['skip'])})" for c in candidates]
    surface.set_yticks(range(len(candidates)), labels, fontsize="small")
    surface.set_xticks(range(len(gammas)), [str(g) for g in gammas])
    surface.set(xlabel="γ, draft tokens per iteration", ylabel="layers kept (skipped)")
    surface.set_title("Predicted improvement factor, and [the choice]", fontsize="medium")

    colours = colormaps["viridis"]
    for i, c in enumerate(candidates):
        accepted.plot(
            range(1, len(c["acceptance"]) + 1),
            c["acceptance"],
            "o-" if c["measured"] else "--",
            ms=3,
            lw=1,
            color=colours(i / max(len(candidates) - 1, 1)),
            label=labels[i],
        )
    accepted.set(ylim=(0, 1), xlabel="position in the draft", ylabel="share of iterations")
    accepted.set_title("Draft tokens accepted, by layers kept (skipped)", fontsize="medium")
    accepted.xaxis.get_major_locator().set_params(integer=True)
    accepted.grid(alpha=0.3)
    if len(candidates) <= 12:
        accepted.legend(fontsize="x-small")

    if checks:
        ours = [c["measured"] for c in checks]
        ends = [0.9 * min(ours), 1.1 * max(ours)]
        check.plot(ends, ends, "k-", lw=1)
        check.fill_between(
            ends, [0.9 * e for e in ends], [1.1 * e for e in ends], alpha=0.15, label="± 10 %"
        )
        spread = [c["spread"] for c in checks]
        check.errorbar(ours, [c["predicted"] for c in checks], xerr=spread, fmt="o", ms=4, lw=1)
        check.set(xlabel="measured improvement factor", ylabel="predicted")
        check.set_title(f"Check on {_checked_on(report)}", fontsize="medium")
        check.grid(alpha=0.3)
        check.legend(fontsize="small")
    else:
        check.set_axis_off()
    facts = report["about"]
    title = (report["model"], report["precision"], facts["machine"], facts["date"])
    figure.suptitle(", ".join(title), fontsize="medium")
    save_plot(figure, path)
