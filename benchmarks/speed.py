"""Speed of plain decoding against HF transformers.

    python benchmarks/speed.py [--data DIR] [--repeats N] [--json FILE]

Everything is measured in one process, the contestants in turns, and reported as medians. A turn is
half a second of runs, the first of which does not count, so that nobody pays for the caches and
threads of the one before. Compilation is reported apart. Needs torch: pip install 's3d-jax[torch]'.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from passes import machine, median_seconds
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import convert
import s3d_jax
from s3d_jax.lm import LM
from s3d_jax.settings.arguments import prepare_streams

DATA = Path(os.environ.get("S3D_TEST_DATA", "../shared/data"))


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


def main() -> int:
    prepare_streams()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, default=DATA, help="folder with checkpoints/babyllama-1m"
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    report: dict[str, Any] = {"machine": machine() | versions}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = arguments.data / "checkpoints" / "babyllama-1m"
        convert.convert(source, folder / "baby", parity=False, progress=False)
        lm = s3d_jax.load(folder / "baby")
        hf = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, trust_remote_code=False
        ).eval()
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


if __name__ == "__main__":
    sys.exit(main())
