"""The measurement: all contestants in turns on each prompt, repeatedly; and its summary."""

import dataclasses
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from s3d_jax.bench.contestants import Contestant, Run
from s3d_jax.machine import peak_memory_bytes, reset_peak_memory
from s3d_jax.texts.suites import Prompt

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Record:
    """A run: of which contestant, on which prompt, in which turn.

    Attributes:
        contestant: its place in the list.
        prompt: its place in the list.
        repeat: turn 0 compiles and warms up, and its times do not count.
        run: the outcome.
        memory: the process's peak, in bytes; the run's own peak where `reset_peak_memory` works.
    """

    contestant: int
    prompt: int
    repeat: int
    run: Run
    memory: int


def take_turns(
    contestants: Sequence[Contestant],
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    repeats: int,
    progress: Callable[[], None] = lambda: None,
) -> list[Record]:
    """Runs each prompt by each contestant, 1 + `repeats` times.

    The warm-up turns follow the order of the list, so that the first of several contestants that
    share a program compiles it. In the turns that count, each contestant runs about equally often
    directly after each other one. Otherwise what one leaves behind (data in the processor's caches,
    threads of torch that wait in a busy loop) would always slow down the same contestant.

    Args:
        contestants, prompts: what runs, and on what.
        max_new_tokens: per prompt.
        repeats: turns that count.
        progress: called after each run.
    """
    records = []
    in_turns = orders(len(contestants), len(prompts) * repeats)
    for repeat in range(repeats + 1):
        for p, prompt in enumerate(prompts):
            for c in next(in_turns) if repeat else range(len(contestants)):
                reset_peak_memory()
                run = contestants[c].run(prompt, max_new_tokens)
                records.append(Record(c, p, repeat, run, peak_memory_bytes()))
                progress()
    return records


def orders(count: int, turns: int) -> Iterator[list[int]]:
    """An order of 0 … count-1 per turn; each number follows each other about equally often.

    The last of a turn is followed by the first of the next. The next one is always the one that has
    followed the current one least often.
    """
    followed: Counter[tuple[int, int]] = Counter()
    last = count - 1
    for turn in range(turns):
        left = [(turn + k) % count for k in range(count)]  # so that ties go to each in turn
        order = []
        while left:
            following = min(left, key=lambda c: followed[last, c])
            followed[last, following] += 1
            left.remove(following)
            order.append(following)
            last = following
        yield order


def fastest(
    candidates: Sequence[Contestant], prompts: Sequence[Prompt], max_new_tokens: int
) -> Contestant:
    """The candidate that decodes most tokens per second, each in turns."""
    if len(candidates) == 1:
        return candidates[0]
    records = take_turns(candidates, prompts, max_new_tokens, 1)
    speeds = [
        _speed([r.run for r in records if r.contestant == c and r.repeat == 1])
        for c in range(len(candidates))
    ]
    return candidates[speeds.index(max(speeds))]


def _speed(runs: Sequence[Run]) -> float:
    """Tokens per second of decoding; 0 where every text ended with what prefill gave."""
    tokens = sum(run.decoded for run in runs)
    return tokens / sum(run.decode_seconds for run in runs) if tokens else 0.0


def summary(
    contestants: Sequence[Contestant],
    prompts: Sequence[Prompt],
    records: Sequence[Record],
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    """One row per contestant and category, and first per contestant over all prompts.

    Means and standard deviations ("..._spread") are over the repeats, each of which is a ratio of
    sums over the prompts. The first contestant is plain decoding, which the others are compared
    with.

    Args:
        contestants, prompts, records, max_new_tokens: as in, and out of, `take_turns`. Programs
            that several need are in the compile time of the first.
    """
    compiled = [
        sum(r.run.compile_seconds for r in records if r.contestant == c)
        for c in range(len(contestants))
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
            speeds = _speeds(cells, plain)
            longest = max((prompts[p] for p in members), key=lambda prompt: len(prompt.tokens))
            needs = contestant.memory_bytes(longest, max_new_tokens)
            peaks = [record.memory for row in cells for record in row]
            equal = [
                [ours.run.tokens == theirs.run.tokens for ours, theirs in zip(*pair, strict=True)]
                for pair in zip(cells, plain, strict=True)
            ]
            rows.append(
                {
                    "category": category,
                    "method": contestant.method,
                    "settings": contestant.in_full(),
                    "prompts": len(members),
                    **speeds,
                    "compile_seconds": compiled[c],
                    **_acceptance(warm),
                    "new_tokens": sum(len(run.tokens) for run in warm),
                    "identical_to_ar": statistics.mean(e for row in equal for e in row),
                    "identical_prompts": sum(map(all, zip(*equal, strict=True))),
                    "memory_bytes": needs,
                    "tokens_per_second_per_gib": speeds["tokens_per_second"] / (needs / _GIB),
                    "mean_process_bytes": statistics.mean(peaks),
                    "max_process_bytes": max(peaks),
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
        names = ("tokens_per_iteration", "acceptance_per_position", "plain_share", "copying_share")
        return dict.fromkeys(names)
    accepted = [sum(position) for position in zip(*(run.accepted for run in runs), strict=True)]
    plain = sum(run.plain_iterations for run in runs)
    copying = sum(run.copying_iterations for run in runs)
    drafting = iterations - plain - copying
    return {
        "tokens_per_iteration": sum(run.decoded for run in runs) / iterations,
        "acceptance_per_position": [count / max(drafting, 1) for count in accepted],
        "plain_share": plain / iterations,
        "copying_share": copying / iterations,
    }
