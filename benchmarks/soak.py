"""Thousands of mixed calls in one process: its memory must stay flat, its outputs the same.

python benchmarks/soak.py [--calls N] [--plot soak.png]

The calls differ in method, length, batch size, stop strings, end-of-text ids, seed and sampling;
some are streams that are left half-way, some are conversations. The model is the one of the
package. After each call the resident set and the number of memory maps are recorded, which only
Linux reports. The text of every 100th call is compared with that of a fresh process, as far as
both were read: how many tokens come at once depends on when drafts pay. Up to 10 such calls share
a process. The process keeps 32 programs, so that some are freed all the time.

Prints a JSON summary. The exit status is 1 where an output differs, memory maps pass half of what
Linux allows, or either number grows by more than 5 % after the first 500 calls: from the median of
the first quarter of the rest to that of its last quarter. Growth is not judged below 1000 calls.
"""

import argparse
import itertools
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import s3d_jax
from s3d_jax.lm import LM
from s3d_jax.machine import machine_name, memory_maps

BEGINNINGS = ("Once upon a time", "The dog", "Tom and Lily went out", "It was raining.")
QUESTIONS = (
    "Book a table for two.",
    "Tomorrow at 6 pm.",
    "Find me a bus to Napa.",
    "Yes.",
)
EVERY, TOGETHER = 100, 10  # calls between two checks; checks in one fresh process
WARM_UP, JUDGED = 500, 1000  # calls
GROWTH = 1.05

Call = dict[str, Any]


def make_call(i: int, vocab_size: int) -> Call:
    """Call number i: a kind, prompts, options; JSON."""
    draw = random.Random(i)
    # What decides which programs run comes from a shape, since compiling takes most of the time.
    # About 30 shapes are usual, and now and then there is a new one.
    shape = random.Random(f"shape {int(draw.expovariate(1 / 8))}")
    options: Call = dict(
        method=shape.choices(
            ("s3d", "ar", "prompt-lookup", "self-spec", "early-exit"), (8, 3, 2, 1, 1)
        )[0],
        max_new_tokens=shape.choice((7, 16, 30, 60)) - draw.randint(0, 6),
        seed=draw.randrange(2**32),
    )
    if shape.random() < 0.4:
        options["temperature"] = draw.uniform(0.1, 1.5)
        if shape.random() < 0.3:
            options |= dict(top_k=draw.randint(1, 99), top_p=draw.uniform(0.5, 1))
    if shape.random() < 0.1:
        options["repetition_penalty"] = draw.uniform(1.1, 1.5)
    rows = shape.choices((1, 2, 3, 5), (7, 1, 1, 1))[0]
    kind = draw.choice(("generate", "stream", "left")) if rows == 1 else "generate"
    if rows == 1 and shape.random() < 0.15:
        kind = "conversation"
    prompts: list[Any] = [draw.choice(BEGINNINGS) for _ in range(rows)]
    if shape.random() < 0.3:
        length = shape.choice((20, 50, 120, 300)) + draw.randint(0, 9)
        prompts[0] = [draw.randrange(vocab_size) for _ in range(length)]
    if kind == "conversation":
        prompts = draw.choices(QUESTIONS, k=draw.randint(1, 4))
    if draw.random() < 0.3:
        options["stop"] = draw.sample((".", "the", "\n", "her", "!"), draw.randint(1, 2))
    if draw.random() < 0.5:
        ids = [draw.randrange(vocab_size) for _ in range(draw.randint(0, 8))]
        options["eos_token_ids"] = ids
    return dict(kind=kind, prompts=prompts, read=draw.randint(1, 4), options=options)


def answer(lm: LM, call: Call) -> list[Any]:
    """What the model gives, a list for each prompt or question; JSON."""
    prompts, options = call["prompts"], call["options"]
    if call["kind"] == "generate":
        return [[r.tokens, r.text, r.stopped_by] for r in lm.generate(prompts, **options)]
    if call["kind"] == "conversation":
        conversation = lm.conversation(**options)
        return [conversation.send(question).tokens for question in prompts]
    if call["kind"] == "stream":
        return ["".join(lm.stream(prompts[0], **options))]
    pieces = lm.stream_tokens(prompts[0], **options)
    return [list(itertools.chain(*itertools.islice(pieces, call["read"])))]


def are_same(call: Call, one: list[Any], other: list[Any]) -> bool:
    """Whether two answers are the same text; of streams that were left, as far as both go."""
    if call["kind"] == "left":
        count = min(len(one[0]), len(other[0]))
        return count > 0 and one[0][:count] == other[0][:count]
    return one == other


def fresh_answers(calls: Sequence[Call]) -> list[list[Any]]:
    """The same in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--answer"],
        input=json.dumps(calls),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"error: the fresh process has failed:\n{done.stderr}")
    return json.loads(done.stdout)


def resident_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def growth(values: Sequence[float]) -> float:
    """The median of the last quarter after the first calls, over that of the first quarter."""
    rest = values[WARM_UP:]
    quarter = len(rest) // 4
    return statistics.median(rest[-quarter:]) / statistics.median(rest[:quarter])


def plot(path: Path, resident: Sequence[float], maps: Sequence[int]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots(2, sharex=True)
    for axis, values, label in zip(
        axes, (resident, maps), ("resident set, MiB", "memory maps"), strict=True
    ):
        axis.plot(range(1, len(values) + 1), values)
        axis.set(ylabel=label, ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("calls")
    figure.savefig(path)


def soak(calls: int) -> tuple[dict[str, Any], list[float], list[int]]:
    """The summary, and after each call the resident set in MiB and the number of memory maps."""
    lm, start = s3d_jax.load(), time.perf_counter()
    resident: list[float] = []
    maps: list[int] = []
    waiting: list[tuple[int, Call, list[Any]]] = []
    checked, different = 0, []
    for i in range(calls):
        call = make_call(i, lm.config.vocab_size)
        output = answer(lm, call)
        counted = memory_maps()
        assert counted is not None
        resident.append(resident_mib())
        maps.append(counted.used)
        if (i + 1) % EVERY == 0:
            waiting.append((i, call, json.loads(json.dumps(output))))
            seconds = time.perf_counter() - start
            print(
                f"{i + 1} calls, {seconds:.0f} s: {resident[-1]:.0f} MiB, {maps[-1]} maps, "
                f"{len(lm.programs)} programs",
                file=sys.stderr,
                flush=True,
            )
        if len(waiting) == TOGETHER or (waiting and i + 1 == calls):
            expected = fresh_answers([call for _, call, _ in waiting])
            pairs = zip(waiting, expected, strict=True)
            different += [
                at for (at, call, output), fresh in pairs if not are_same(call, output, fresh)
            ]
            checked += len(waiting)
            waiting = []
    summary: dict[str, Any] = dict(
        machine=machine_name(),
        calls=calls,
        seconds=round(time.perf_counter() - start),
        programs=len(lm.programs),
        resident_mib=round(resident[-1]),
        most_resident_mib=round(max(resident)),
        memory_maps=maps[-1],
        most_memory_maps=max(maps),
        allowed_memory_maps=counted.most,
        checked=checked,
        different_calls=different,
        resident_growth=None,
        memory_maps_growth=None,
    )
    if calls >= JUDGED:
        summary |= dict(
            resident_growth=round(growth(resident), 3), memory_maps_growth=round(growth(maps), 3)
        )
    return summary, resident, maps


def passes(summary: dict[str, Any]) -> bool:
    """Whether outputs were the same, and memory flat."""
    grown = [summary["resident_growth"], summary["memory_maps_growth"]]
    return (
        not summary["different_calls"]
        and summary["most_memory_maps"] <= summary["allowed_memory_maps"] / 2
        and all(value is None or value <= GROWTH for value in grown)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--programs", type=int, default=32, help="programs to keep (32)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a PNG (needs matplotlib)")
    parser.add_argument("--answer", action="store_true", help="answer the calls (JSON) on stdin")
    arguments = parser.parse_args()
    if arguments.answer:
        lm = s3d_jax.load()
        print(json.dumps([answer(lm, call) for call in json.load(sys.stdin)]))
        return 0
    if arguments.calls < 1:
        parser.error(f"--calls must be at least 1, got {arguments.calls}")
    if memory_maps() is None:
        sys.exit("error: this system does not count memory maps: run it on Linux")
    s3d_jax.keep_programs(arguments.programs)
    summary, resident, maps = soak(arguments.calls)
    print(json.dumps(summary, indent=2))
    if arguments.plot:
        plot(arguments.plot, resident, maps)
    return 0 if passes(summary) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except s3d_jax.S3DError as error:
        sys.exit(f"error: {error}")
