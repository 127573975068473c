"""Dynamic draft length against a fixed one and plain decoding, in turns.

    s3d tune --model DIR && python benchmarks/adaptive.py --model DIR

One row at a time, greedy and sampled. A prompt's time is the median of its turns. Results:
docs/log/2026-11-25-falling-back.md.
"""

import argparse
import statistics
from typing import Any

import numpy as np

import s3d_jax
from s3d_jax.bench.measure import orders
from s3d_jax.bench.report import about, markdown
from s3d_jax.drafters import registry
from s3d_jax.settings.arguments import prepare_streams
from s3d_jax.texts.suites import read_suites

CONTESTANTS: dict[str, dict[str, Any]] = {
    "AR": {"method": "ar"},
    "fixed": {"method": "s3d", "adaptive": False},
    "adaptive": {"method": "s3d", "copies": False},
}


def prompts_of(name: str, lm: s3d_jax.LM, count: int, new_tokens: int) -> list[np.ndarray]:
    if name == "random ids":
        rng = np.random.default_rng(0)
        return [rng.integers(0, lm.config.vocab_size, 40).astype(np.int32) for _ in range(count)]
    room = lm.max_length - new_tokens
    return [prompt.tokens for prompt in read_suites([name], lm, room, count)]


def compare(
    lm: s3d_jax.LM, prompts: list[np.ndarray], turns: int, options: dict[str, Any]
) -> dict[str, dict[str, float]]:
    """By contestant: tokens per second, τ, and the share of iterations that were plain."""
    times: dict[tuple[str, int], list[float]] = {}
    stats: dict[tuple[str, int], Any] = {}
    names = [*CONTESTANTS]
    in_turns = orders(len(names), (turns + 1) * len(prompts))
    for turn in range(turns + 1):  # the first one compiles
        for p, prompt in enumerate(prompts):
            for name in (names[i] for i in next(in_turns)):
                (result,) = lm.generate([prompt], seed=p, **CONTESTANTS[name], **options)
                stats[name, p] = result.stats
                if turn:
                    times.setdefault((name, p), []).append(result.stats.decode_seconds)
    found = {}
    for name in CONTESTANTS:
        rows = [stats[name, p] for p in range(len(prompts))]
        seconds = sum(statistics.median(times[name, p]) for p in range(len(prompts)))
        iterations, tokens = (
            sum(getattr(s, field) for s in rows) for field in ("iterations", "new_tokens")
        )
        found[name] = {
            "speed": tokens / seconds,
            "tau": tokens / iterations,
            "plain": sum(s.plain_iterations for s in rows) / iterations,
        }
    return found


def main() -> None:
    prepare_streams()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--suites", default="stories,dialogues,code,random ids")
    parser.add_argument("--temperatures", default="0,1")
    parser.add_argument("--limit", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    lm = s3d_jax.load(arguments.model)
    print(registry.choose(lm.target, "s3d").costs)
    rows = []
    for suite in arguments.suites.split(","):
        prompts = prompts_of(suite, lm, arguments.limit, arguments.max_new_tokens)
        for temperature in map(float, arguments.temperatures.split(",")):
            options = dict(max_new_tokens=arguments.max_new_tokens, temperature=temperature)
            found = compare(lm, prompts, arguments.turns, options)
            ar, fixed, ours = (found[name] for name in CONTESTANTS)
            rows.append(
                (
                    *(suite, f"{temperature:g}", f"{ar['speed']:.0f}", f"{fixed['speed']:.0f}"),
                    *(f"{ours['speed']:.0f}", f"{ours['speed'] / fixed['speed']:.3f}"),
                    *(f"{ours['speed'] / ar['speed']:.2f}", f"{fixed['tau']:.2f}"),
                    *(f"{ours['tau']:.2f}", f"{ours['plain']:.2f}"),
                )
            )
    head = "suite,temperature,AR,fixed,adaptive,over fixed,over AR,τ fixed,τ adaptive,plain"
    print("\n".join(markdown(head.split(","), rows)))
    print(about())


if __name__ == "__main__":
    main()
