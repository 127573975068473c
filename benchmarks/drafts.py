"""What the trained drafts of a model are worth: τ and speed on held-out prompts, against AR.

    python benchmarks/drafts.py --prompts stories=stories.jsonl --prompts answers=questions.jsonl \\
        [--model DIR ...] [--gamma G ...] [--prompt-count N] [--max-new-tokens N] [--batch-size B]
        [--json FILE]

Greedy, one row at a time, float32 by default. AR and S3D take turns at each prompt, twice, and the
second time counts: seconds are those of decoding, without prefill, compilation and the first run of
a program. With --batch-size τ is measured on many prompts quickly, and no speed. τ counts the bonus
token. Prints a Markdown table with one row per model, draft and γ.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

import s3d_jax
from s3d_jax.bench.report import about
from s3d_jax.drafters.stored import StoredDraft, draft_names, read_draft
from s3d_jax.lm import EMBEDDED, LM
from s3d_jax.nn.transformer import num_params
from s3d_jax.settings.arguments import prepare_streams
from s3d_jax.storage.native import read_header
from s3d_jax.storage.staging import write_atomically
from s3d_jax.texts.documents import read_documents
from s3d_jax.train.validation import held_out_prompts


def compare(
    lm: LM, prompts: list[np.ndarray], new_tokens: int, gamma: int, batch_size: int = 1
) -> dict[str, Any]:
    """AR and S3D in turns on each batch of prompts; their speed where that is one prompt."""
    options: dict[str, dict[str, Any]] = {
        "ar": {"method": "ar"},
        "s3d": {"method": "s3d", "gamma": gamma, "adaptive": False},
    }
    seconds, tokens, iterations = dict.fromkeys(options, 0.0), 0, 0
    accepted, equal = np.zeros(gamma), 0
    timed = batch_size == 1
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        outputs = {}
        # A batch counts tokens only. A single prompt first runs once without counting: its length
        # may need programs of its own, and the first run of a program is slow.
        for _ in range(2 if timed else 1):
            for name, method in options.items():
                outputs[name] = lm.generate(batch, max_new_tokens=new_tokens, **method)
        for name, results in outputs.items():
            seconds[name] += results[0].stats.decode_seconds
        for ar, s3d in zip(outputs["ar"], outputs["s3d"], strict=True):
            tokens, iterations = tokens + s3d.stats.new_tokens, iterations + s3d.stats.iterations
            accepted += s3d.stats.accepted_per_position
            equal += ar.tokens == s3d.tokens
    speed = {
        "ar_tokens_per_second": tokens / seconds["ar"],
        "speed_over_ar": seconds["ar"] / seconds["s3d"],
    }
    return {
        "tokens_per_iteration": tokens / iterations,
        "acceptance_per_position": (accepted / iterations).round(4).tolist(),
        "new_tokens": tokens,
        "prompts": len(prompts),
        "identical": equal,
        **(speed if timed else {}),
    }


def described(draft: StoredDraft | None, dtype_bytes: int, parameters: int) -> dict[str, str]:
    """What a draft is, in the words of the table."""
    if draft is None:
        return {"mode": "untrained", "kept": "", "trained for": "", "size": ""}
    training = draft.training
    adapter, objective = training.get("adapter", {}), training.get("objective", {})
    ranks = f" {adapter.get('rank')}/{adapter.get('bridge_rank')}"
    kept = [i for i, skipped in enumerate(draft.config.skip) if not skipped]
    size = draft.num_params * dtype_bytes
    return {
        "mode": str(training.get("mode", "joint")) + (ranks if adapter.get("rank") else ""),
        "kept": f"{','.join(map(str, kept))} {draft.config.block_attention}",
        "trained for": f"{objective.get('objective', '?')}, γ={draft.config.gamma}",
        "size": f"{size / 1024:,.0f} KiB, {100 * draft.num_params / parameters:.1f} %",
    }


def main() -> int:
    prepare_streams()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", metavar="DIR", help="default: the embedded one")
    parser.add_argument(
        "--prompts", action="append", required=True, metavar="NAME=FILE",
        help="a domain: held-out texts, whose beginnings are the prompts, or chats",
    )  # fmt: skip
    parser.add_argument("--gamma", action="append", type=int, metavar="G", help="default: 4")
    parser.add_argument("--prompt-count", type=int, default=32, metavar="N")
    parser.add_argument("--prompt-tokens", type=int, default=16, metavar="N", help="of a text")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument(
        "--batch-size", type=int, default=1, metavar="B",
        help="prompts at once; more than one measures τ alone (default: 1)",
    )  # fmt: skip
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--untrained", action="store_true", help="measure that draft as well")
    parser.add_argument("--json", metavar="FILE", help="all numbers")
    arguments = parser.parse_args()
    if arguments.batch_size < 1:
        parser.error(f"--batch-size must be at least 1, got {arguments.batch_size}")
    domains = dict(entry.split("=", 1) for entry in arguments.prompts)
    rows = []
    for model in map(Path, arguments.model or [EMBEDDED]):
        header = read_header(model)
        names: list[str | None] = [*([None] if arguments.untrained else []), *draft_names(model)]
        for name in names:
            lm = s3d_jax.load(model, dtype=arguments.dtype, draft=name, use_draft=name is not None)
            draft = name and read_draft(model, name, lm.config, weights=False)
            size = jax.numpy.dtype(header.config.dtype).itemsize
            facts = described(draft or None, size, num_params(lm.config))
            for gamma in arguments.gamma or [4]:
                row = {"model": model.name, "draft": name or "", **facts, "γ": gamma}
                for domain, file in domains.items():
                    end = lm.eos_token_ids[0] if lm.eos_token_ids else None
                    documents = read_documents([file], lm.tokenizer, end, prompts=True)
                    prompts = held_out_prompts(
                        documents,
                        arguments.prompt_count,
                        arguments.prompt_tokens,
                        lm.max_length,
                    )
                    measured = compare(
                        lm, prompts, arguments.max_new_tokens, gamma, arguments.batch_size
                    )
                    row[domain] = measured
                    print(model.name, name, gamma, domain, json.dumps(measured), file=sys.stderr)
                rows.append(row)
    head = ["model", "draft", "mode", "kept", "trained for", "size", "γ"]
    for domain in domains:
        head += [f"τ {domain}", f"speed {domain}"]
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        cells = [str(row[key]) for key in head[:7]]
        for domain in domains:
            found = row[domain]
            speed = found.get("speed_over_ar")
            cells += [f"{found['tokens_per_iteration']:.2f}", f"{speed:.2f}" if speed else ""]
        print("| " + " | ".join(cells) + " |")
    different = sum(row[d]["prompts"] - row[d]["identical"] for row in rows for d in domains)
    print(f"\noutputs that differ from AR's: {different}")
    if arguments.json:
        found = {"about": about(), "rows": rows}
        write_atomically(Path(arguments.json), json.dumps(found, indent=1))
    return 1 if different else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except s3d_jax.S3DError as error:
        sys.exit(f"error: {error}")
