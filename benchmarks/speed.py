"""Speed of plain decoding against HF transformers, and what draft and verify cost over an AR step.

    python benchmarks/speed.py [--data DIR] [--repeats N] [--json FILE]

Everything is measured in one process, the contestants in turns, and reported as medians. A turn is
half a second of runs, the first of which does not count, so that nobody pays for the caches and
threads of the one before. Compilation is reported apart. Needs torch: pip install 's3d-jax[torch]'.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import convert
import s3d_jax
from s3d_jax import decode, proposers
from s3d_jax.config import DraftConfig, symmetric_skip
from s3d_jax.generate import LM

TURN_SECONDS = 0.5
DATA = Path(os.environ.get("S3D_TEST_DATA", "../shared/data"))


def median_seconds(contestants: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Medians over `repeats` turns of each; a contestant is a run that returns its own seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, run in contestants.items():
            run()
            turn = [run()]
            while sum(turn) < TURN_SECONDS:
                turn.append(run())
            seconds[name].append(statistics.median(turn))
    return {name: statistics.median(values) for name, values in seconds.items()}


def hf_generate(model: Any, ids: list[int], new_tokens: int) -> tuple[list[int], float]:
    """Greedy generation by HF transformers: new ids, seconds (prefill included)."""
    prompt = torch.tensor([ids])
    options = dict(max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    start = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    return output[0, len(ids) :].tolist(), time.perf_counter() - start


def ours(lm: LM, ids: list[int], new_tokens: int, **options: Any) -> tuple[Any, float]:
    """Greedy generation by s3d_jax: the result, and the seconds of the whole call as for HF."""
    start = time.perf_counter()
    result = lm.generate([ids], max_new_tokens=new_tokens, eos_token_ids=(), **options)[0]
    return result, time.perf_counter() - start - result.stats.compile_seconds


def against_hf(lm: LM, hf: Any, ids: list[int], new_tokens: int, repeats: int) -> dict[str, Any]:
    """Plain decoding here and there, and S3D with the draft of the checkpoint."""
    first = {m: ours(lm, ids, new_tokens, method=m, adaptive=False)[0] for m in ("ar", "s3d")}
    theirs = hf_generate(hf, ids, new_tokens)[0]

    contestants = {
        "hf": lambda: hf_generate(hf, ids, new_tokens)[1],
        "ar": lambda: ours(lm, ids, new_tokens, method="ar")[1],
        "s3d": lambda: ours(lm, ids, new_tokens, method="s3d", adaptive=False)[1],
    }
    seconds = median_seconds(contestants, repeats)
    speed = {name: new_tokens / value for name, value in seconds.items()}
    return {
        "new_tokens": new_tokens,
        "tokens_per_second": speed,
        "ar_over_hf": speed["ar"] / speed["hf"],
        "s3d_over_ar": speed["s3d"] / speed["ar"],
        "tau": first["s3d"].stats.tokens_per_iteration,
        "compile_seconds": {m: r.stats.compile_seconds for m, r in first.items()},
        "same_tokens_as_hf": first["ar"].tokens == theirs,
        "s3d_same_as_ar": first["s3d"].tokens == first["ar"].tokens,
    }


def pass_costs(lm: LM, repeats: int, slots: int = 256, context: int = 128) -> dict[str, float]:
    """Milliseconds of one pass, head and argmax included."""
    config, params = lm.config, lm.params
    skip = symmetric_skip(config.num_layers, config.num_layers // 2)
    prompt = np.arange(context, dtype=np.int32) % config.vocab_size
    spec = decode.DecodeSpec(config, DraftConfig(skip, gamma=4))
    from s3d_jax.sampling import SamplingConfig, batch_sampling

    sampling, _ = batch_sampling([SamplingConfig()], jax.random.split(jax.random.key(0), 1), 1)
    limit = np.array([context + 32])
    state = decode.init_state(spec, [prompt], slots, limit, sampling)
    state = state.replace(cache=state.cache.replace(length=jnp.array([context - 1])))

    def verify(params: Any, draft_params: Any, state: Any, drafted: int) -> Any:
        tokens = jnp.zeros((1, drafted), jnp.int32)
        logits, cache = decode.verify_pass(spec, params, state, tokens)
        return jnp.argmax(logits, axis=-1), state.replace(cache=cache)

    def draft(params: Any, draft_params: Any, state: Any, drafted: int) -> Any:
        proposal = proposers.draft_pass(spec, params, draft_params, state)
        return proposal.tokens, state.replace(cache=proposal.cache)

    holder = [state]

    def timed(function: Callable[..., Any], drafted: int) -> Callable[[], float]:
        jitted = jax.jit(function, static_argnums=3, donate_argnums=2)

        def call() -> float:
            start = time.perf_counter()
            tokens, holder[0] = jitted(params, lm.draft_params, holder[0], drafted)
            jax.block_until_ready((tokens, holder[0]))
            return time.perf_counter() - start

        return call

    contestants = {
        "ar": timed(verify, 0),
        "verify_5": timed(verify, 4),
        "verify_8": timed(verify, 7),
        "draft_4": timed(draft, 4),
    }
    return {name: 1e3 * s for name, s in median_seconds(contestants, repeats).items()}


def machine() -> dict[str, str]:
    """What the numbers belong to."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "date": date.today().isoformat(),
        "device": f"{jax.devices()[0].device_kind} ({cpu}, {os.cpu_count()} cores)",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, default=DATA, help="folder with checkpoints/babyllama-1m"
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    report: dict[str, Any] = {"machine": machine()}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = arguments.data / "checkpoints" / "babyllama-1m"
        convert.convert(source, folder / "baby", parity=False, progress=False)
        lm = s3d_jax.load(folder / "baby")
        hf = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        ids = lm.tokenizer.encode("Once upon a time")
        report["babyllama-1m"] = against_hf(lm, hf, ids, 200, arguments.repeats)

        size = dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=12, vocab_size=32000)
        torch.manual_seed(0)
        hf = LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=12, eos_token_id=None)).eval()
        hf.save_pretrained(folder / "hf130m")
        convert.convert(folder / "hf130m", folder / "130m", parity=False, progress=False)
        lm = s3d_jax.load(folder / "130m")
        ids = np.random.default_rng(0).integers(0, 32000, 16).tolist()
        report["llama-130m"] = against_hf(lm, hf, ids, 48, max(3, arguments.repeats // 2))
        del hf
        report["llama-130m"]["milliseconds_per_pass"] = pass_costs(lm, arguments.repeats)

    print_tables(report)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def print_tables(report: dict[str, Any]) -> None:
    """The report as Markdown."""
    print(", ".join(f"{k} {v}" for k, v in report["machine"].items()), end="\n\n")
    print("| model | HF tok/s | AR tok/s | AR / HF | S3D tok/s (untrained) | τ | compile AR, S3D |")
    print("|---|---|---|---|---|---|---|")
    for name in ("babyllama-1m", "llama-130m"):
        r = report[name]
        speed, compiled = r["tokens_per_second"], r["compile_seconds"]
        print(
            f"| {name} | {speed['hf']:.1f} | {speed['ar']:.1f} | {r['ar_over_hf']:.1f} "
            f"| {speed['s3d']:.1f} | {r['tau']:.2f} "
            f"| {compiled['ar']:.1f} s, {compiled['s3d']:.1f} s |"
        )
        assert r["s3d_same_as_ar"], f"{name}: S3D is not AR"
        if not r["same_tokens_as_hf"]:
            print(f"note: {name}: tokens differ from HF's", file=sys.stderr)
    costs = report["llama-130m"]["milliseconds_per_pass"]
    print("\n| pass (130 M, float32) | ms | over AR |\n|---|---|---|")
    labels = {
        "ar": "AR step, 1 token",
        "verify_5": "verify, 5 tokens",
        "verify_8": "verify, 8 tokens",
        "draft_4": "draft, 4 tokens, half of the layers",
    }
    for key, label in labels.items():
        print(f"| {label} | {costs[key]:.1f} | {costs[key] / costs['ar']:.2f} |")


if __name__ == "__main__":
    sys.exit(main())
