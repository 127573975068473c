"""The measurement: everybody in turns on each prompt, several times over; and what it comes to."""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from s3d_jax.batch import peak_memory_bytes
from s3d_jax.bench.contestants import Contestant, Run
from s3d_jax.bench.suites import Prompt

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Record:
    """A run, of whom, on what, and in which turn.

    Attributes:
        contestant: its place in the list.
        prompt: its place in the list.
        repeat: 0 is the one that compiles and warms up, whose times do not count.
        run: what came out.
        memory: peak during the run, in bytes (`reset_peak`).
    """

    contestant: int
    prompt: int
    repeat: int
    run: Run
    memory: int


def reset_peak() -> None:
    """Begins the process's peak resident set anew, where the system can: on Linux.

    A device's allocator cannot; its peak is that since the start of the process.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def take_turns(
    contestants: Sequence[Contestant],
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    repeats: int,
    progress: Callable[[], None] = lambda: None,
) -> list[Record]:
    """Runs each prompt by each contestant, 1 + `repeats` times.

    Who begins changes from prompt to prompt, so that nobody always follows the same one.

    Args:
        contestants, prompts: who and what.
        max_new_tokens: per prompt.
        repeats: turns that count.
        progress: called after each run.
    """
    records = []
    for repeat in range(repeats + 1):
        for p, prompt in enumerate(prompts):
            for k in range(len(contestants)):
                c = (k + p + repeat) % len(contestants)
                reset_peak()
                run = contestants[c].run(prompt.tokens, max_new_tokens)
                records.append(Record(c, p, repeat, run, peak_memory_bytes()))
                progress()
    return records


def fastest(
    candidates: Sequence[Contestant], prompts: Sequence[Prompt], max_new_tokens: int
) -> tuple[Contestant, float]:
    """The candidate that decodes most tokens per second, each in turns.

    Returns:
        It, and the seconds that were spent on compiling its programs.
    """
    if len(candidates) == 1:
        return candidates[0], 0.0
    records = take_turns(candidates, prompts, max_new_tokens, 1)
    speeds = [
        _speed([r.run for r in records if r.contestant == c and r.repeat == 1])
        for c in range(len(candidates))
    ]
    best = speeds.index(max(speeds))
    compiled = sum(r.run.compile_seconds for r in records if r.contestant == best)
    return candidates[best], compiled


def _speed(runs: Sequence[Run]) -> float:
    """Tokens per second of decoding; 0 where every text ended with what prefill gave."""
    tokens = sum(run.decoded for run in runs)
    return tokens / sum(run.decode_seconds for run in runs) if tokens else 0.0


def summary(
    contestants: Sequence[Contestant],
    prompts: Sequence[Prompt],
    records: Sequence[Record],
    compiled: Sequence[float],
) -> list[dict[str, Any]]:
    """One row per contestant and category, and first per contestant over all prompts.

    Means and standard deviations ("..._spread") are over the repeats, each of which is a ratio of
    sums over the prompts. The first contestant is plain decoding, which the others are compared
    with.

    Args:
        contestants, prompts, records: as in, and out of, `take_turns`.
        compiled: seconds that each contestant had compiled before. Programs that several need are
            in the time of the first.
    """
    compiled = [
        before + sum(r.run.compile_seconds for r in records if r.contestant == c)
        for c, before in enumerate(compiled)
    ]
    categories = list(dict.fromkeys(prompt.category for prompt in prompts))
    parts: dict[str, list[int]] = {"all": list(range(len(prompts)))}
    if len(categories) > 1:
        parts |= {c: [i for i, p in enumerate(prompts) if p.category == c] for c in categories}
    table = {(r.contestant, r.prompt, r.repeat): r for r in records}
    repeats = range(1, 1 + max(r.repeat for r in records))

    rows = []
    for category, members in parts.items():
        for c, contestant in enumerate(contestants):
            cells = [[table[c, p, repeat] for p in members] for repeat in repeats]
            plain = [[table[0, p, repeat] for p in members] for repeat in repeats]
            warm = [table[c, p, 0].run for p in members]
            rows.append(
                {
                    "category": category,
                    "method": contestant.method,
                    "settings": dict(contestant.settings),
                    "prompts": len(members),
                    **_speeds(cells, plain),
                    "compile_seconds": compiled[c],
                    **_acceptance(warm),
                    "new_tokens": sum(len(run.tokens) for run in warm),
                    "identical_to_ar": statistics.mean(
                        ours.run.tokens == theirs.run.tokens
                        for row, reference in zip(cells, plain, strict=True)
                        for ours, theirs in zip(row, reference, strict=True)
                    ),
                    **_memory(cells),
                }
            )
    return rows


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {name: statistics.mean(values), f"{name}_spread": spread}


def _speeds(
    cells: Sequence[Sequence[Record]], plain: Sequence[Sequence[Record]]
) -> dict[str, float]:
    runs, reference = ([[r.run for r in row] for row in rows] for rows in (cells, plain))
    decode = [_speed(row) for row in runs]
    whole = [sum(len(r.tokens) for r in row) / sum(r.seconds for r in row) for row in runs]
    first = [statistics.mean(r.first_seconds for r in row) for row in runs]
    factors = [ours / _speed(row) for ours, row in zip(decode, reference, strict=True)]
    return {
        **_spread("tokens_per_second", decode),
        **_spread("end_to_end_tokens_per_second", whole),
        **_spread("first_token_seconds", first),
        **_spread("improvement_factor", factors),
    }


def _acceptance(runs: Sequence[Run]) -> Mapping[str, Any]:
    """τ and acceptance, which do not change from turn to turn: decoding is greedy."""
    iterations = sum(run.iterations for run in runs)
    if not iterations:
        return dict.fromkeys(("tokens_per_iteration", "acceptance_per_position", "plain_share"))
    accepted = [sum(position) for position in zip(*(run.accepted for run in runs), strict=True)]
    plain = sum(run.plain_iterations for run in runs)
    return {
        "tokens_per_iteration": sum(len(run.tokens) for run in runs) / iterations,
        "acceptance_per_position": [count / max(iterations - plain, 1) for count in accepted],
        "plain_share": plain / iterations,
    }


def _memory(cells: Sequence[Sequence[Record]]) -> dict[str, float]:
    peaks = [record.memory for row in cells for record in row]
    speeds = statistics.mean(_speed([r.run for r in row]) for row in cells)
    return {
        "mean_memory_bytes": statistics.mean(peaks),
        "max_memory_bytes": max(peaks),
        "tokens_per_second_per_gib": speeds / (max(peaks) / _GIB),
    }


def memory_kind() -> str:
    """What the memory figures are."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return "peak of the device's allocator since the start of the process"
    if Path("/proc/self/clear_refs").exists():
        return "peak resident set of the process during a run, all contestants loaded"
    return "peak resident set of the process since its start"
