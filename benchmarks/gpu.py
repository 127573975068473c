"""What a device does with this package, in ten minutes.

    python benchmarks/gpu.py --out DIR [--minutes 10] [--model CHECKPOINT]
        [--data own.jsonl] [--prompts chats.jsonl] [--start DRAFT] [--stages training ...]

The stages run one after the other, what is wanted most first, each in a process of its own with a
share of the time:

exact      S3D's tokens against AR's in int8, int4, float32, bfloat16, float16; differences
           counted with the gap between the two best logits there; whether the state is donated,
           and copies of a cache in the compiled loop
passes     AR step, verification of 4 to 33 rows, half-depth draft, by shape and precision; share of
           the bandwidth; peak memory; temporary memory, which shows whether weights are widened
texts      `s3d bench` on the model of the package, and on --model
distilling answers of --model to --prompts, as many as the time allows
training   a draft for --model on --data and those answers, in the time that there is
profile    kernels of one text: their time, their number, and the idle time between them

Each finding is appended to DIR/results.jsonl at once, so that a run that is killed loses no more
than the stage it is in; DIR/report.md is written after each stage. Runs on any machine with CUDA,
and, with small models, on a CPU.
"""

import argparse
import collections
import gzip
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Findings = Iterator[dict[str, Any]]

# Seconds of ten minutes.
SHARES = dict(exact=100, passes=180, texts=90, distilling=80, training=100, profile=50)
PROMPT_TOKENS, NEW_TOKENS = 24, 96
# The runs of one stage compile the same programs.
_ENVIRON = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{tempfile.gettempdir()}/s3d_gpu"}


def exact(options: argparse.Namespace) -> Findings:
    """S3D against AR on the model of the package, and how its loop uses memory."""
    import jax.numpy as jnp
    import numpy as np

    import s3d_jax
    from s3d_jax.nn.transformer import forward_logits
    from s3d_jax.texts.suites import read_suites

    for dtype in ("int8-plain", "int8", "int4", "float32", "bfloat16", "float16"):
        lm = s3d_jax.load() if dtype == "int8-plain" else _other_model(dtype)
        prompts = [p.tokens for p in read_suites(["stories", "dialogues"], lm, 300)]
        prompts = prompts[: 8 if options.small else 64]
        runs = dict(max_new_tokens=32 if options.small else NEW_TOKENS, eos_token_ids=())
        for temperature in (0.0, 0.8):
            sampled = dict(temperature=temperature, seed=list(range(len(prompts))))
            ar, s3d = (
                lm.generate(prompts, method=method, **sampled, **runs, **more)
                for method, more in (("ar", {}), ("s3d", {"adaptive": False}))
            )
            gaps = []
            for prompt, a, b in zip(prompts, ar, s3d, strict=True):
                if a.tokens == b.tokens:
                    continue
                same = [x == y for x, y in zip(a.tokens, b.tokens, strict=False)]
                tokens = np.concatenate([prompt, a.tokens[: same.index(False)]]).astype(np.int32)
                logits = forward_logits(lm.config, lm.params, jnp.asarray(tokens)[None])[0, -1]
                second, best = np.sort(np.asarray(logits, np.float32))[-2:]
                gaps.append(float(best - second))
            iterations = sum(r.stats.iterations for r in s3d)
            yield {
                "dtype": dtype,
                "temperature": temperature,
                "prompts": len(prompts),
                "identical": len(prompts) - len(gaps),
                "gaps_where_different": sorted(gaps),
                "tau": sum(len(r.tokens) for r in s3d) / iterations,
            }
        yield {"dtype": dtype, **_loop_facts(lm)}


def _other_model(precision: str) -> Any:
    """The model of the package in another precision, without its draft's merged layers."""
    import jax
    import jax.numpy as jnp

    import s3d_jax
    from s3d_jax.weights.formats import FORMATS
    from s3d_jax.weights.trees import store_tree, widen_tree

    lm = s3d_jax.load(dtype="float32")
    dtype = "float32" if precision in FORMATS else precision
    config = lm.config.unquantized().replace(exact_sums=False, dtype=dtype)
    params = widen_tree(lm.config, lm.params, jnp.dtype(dtype))
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
    if precision in FORMATS:
        config = config.replace(quantization=precision, exact_sums=None)
        params = jax.device_put(store_tree(config, jax.device_get(params)))
    draft = jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, _unmerged(lm)
    )
    return s3d_jax.LM(
        config, params, draft_config=lm.draft_config, draft_params=draft, tokenizer=lm.tokenizer
    )


def _unmerged(lm: Any) -> Any:
    from s3d_jax.drafters.stored import choose_draft, read_draft
    from s3d_jax.lm import EMBEDDED

    name = choose_draft(EMBEDDED, None)
    assert name is not None
    return read_draft(EMBEDDED, name, lm.config).params


def _loop_facts(lm: Any) -> dict[str, Any]:
    """Whether the compiled loop takes the state over, and copies of a cache's size in it."""
    import numpy as np

    from s3d_jax.decoding.sampling import batch_sampling
    from s3d_jax.decoding.sizes import SlotPlan
    from s3d_jax.decoding.state import DecodeSpec, init_state
    from s3d_jax.decoding.step import decode_jit
    from s3d_jax.drafters.s3d import S3D
    from s3d_jax.keys import seeded_keys
    from s3d_jax.settings.sampling import SamplingConfig

    slots, prompt = 2048, np.arange(8, dtype=np.int32)
    keys = seeded_keys(np.zeros(1, np.uint32), np.zeros(1, np.uint32))
    sampling, features = batch_sampling([SamplingConfig()], keys, lm.config.vocab_size)
    spec = DecodeSpec(lm.config, S3D(lm.draft_config), features)
    state = init_state(spec, [prompt], SlotPlan((8,), (100,), spec.gamma, slots), sampling)
    program = decode_jit.lower(
        spec, lm.params, lm.draft_params, state, np.int32(9), visible=None
    ).compile()
    cache = sum(x.nbytes for x in (*state.cache.keys, *state.cache.values))
    memory = program.memory_analysis()
    body = program.as_text()
    return {
        "cache_bytes": cache,
        "alias_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "state_is_donated": memory.alias_size_in_bytes >= cache,
        "cache_copies": len(re.findall(rf"\[1,\d+,{slots},\d+\]\S* copy\(", body)),
    }


def passes(options: argparse.Namespace) -> Findings:
    """What passes cost, by shape and precision; each pair in a process of its own."""
    shapes = ["llama-130m"] if options.small else ["phi-3-mini", "llama-2-7b", "llama-1.1b"]
    for shape in shapes:
        for precision in ("bfloat16", "int8", "int4", "int8-plain"):
            command = [sys.executable, __file__, "--only", "one-shape", "--shape", shape]
            command += ["--precision", precision, "--out", str(options.out)]
            done = subprocess.run(command, capture_output=True, text=True)
            lines = done.stdout.strip().splitlines()
            if done.returncode or not lines:
                yield {"model": shape, "precision": precision, "error": done.stderr[-2000:]}
            else:
                yield json.loads(lines[-1])


def one_shape(shape: str, precision: str, small: bool) -> dict[str, Any]:
    """The passes of one model of random weights."""
    import jax
    import numpy as np
    from passes import SHAPES, median_seconds, pass_runs, random_model, read_run

    from s3d_jax.machine import peak_memory_bytes
    from s3d_jax.nn.transformer import forward, weight_bytes

    lm = random_model(SHAPES[shape], precision)
    runs = pass_runs(lm, (1, 4, 5, 8) if small else (1, 4, 5, 8, 16, 25, 33))
    weights = weight_bytes(lm.config)
    runs["read"], read_bytes = read_run(min(weights, 1 << 30))
    seconds = median_seconds(runs, 1 if small else 3)
    bandwidth = read_bytes / seconds.pop("read")
    table = (
        0
        if lm.config.tie_embeddings
        else sum(x.nbytes for x in jax.tree.leaves(lm.params["embed"]))
    )
    found = {
        "model": shape,
        "precision": precision,
        "milliseconds": {name: round(1e3 * s, 4) for name, s in seconds.items()},
        "over_ar": {name: round(s / seconds["1 row"], 3) for name, s in seconds.items()},
        "read_gb_per_second": bandwidth / 1e9,
        "ar_share_of_bandwidth": (weights - table) / seconds["1 row"] / bandwidth,
        "weight_gb": weights / 1e9,
        "peak_memory_gb": peak_memory_bytes() / 1e9,
    }
    # Widened weights would be temporaries of the size of a layer at least.
    from s3d_jax.nn.cache import init_cache

    cache = init_cache(lm.config, 1, 256, np.array([1], np.int32), 8)
    step = jax.jit(lambda params, tokens, cache: forward(lm.config, params, tokens, cache))
    for rows in (1, 5):
        tokens = jax.ShapeDtypeStruct((1, rows), np.int32)
        memory = step.lower(lm.params, tokens, cache).compile().memory_analysis()
        found[f"temp_bytes_{rows}_rows"] = memory.temp_size_in_bytes
    return found


def texts(options: argparse.Namespace) -> Findings:
    """`s3d bench`, end to end."""
    models = [None] if options.model is None else [None, options.model]
    for model in models:
        new = "16" if options.small else "128"
        methods = "ar,s3d:gamma=2,s3d:gamma=4,s3d:gamma=4:adaptive=no,prompt-lookup:gamma=4"
        command = [sys.executable, "-m", "s3d_jax", "bench", "--json", "--limit", "1"]
        command += ["--max-new-tokens", new, "--repeats", "1" if options.small else "2"]
        command += ["--methods", methods] + (["--model", str(model)] if model else [])
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            yield {"model": str(model or "of the package"), "error": done.stderr[-2000:]}
            continue
        found = json.loads(done.stdout)
        rows = [{k: v for k, v in row.items() if k != "categories"} for row in found["rows"]]
        yield {"model": found["model"], "precision": found["precision"], "rows": rows}


def distilling(options: argparse.Namespace) -> Findings:
    """The model's own answers to --prompts, until the time is over: OUT/answers.jsonl."""
    if options.model is None or options.prompts is None:
        yield {"skipped": "needs --model and --prompts"}
        return
    answers = options.out / "answers.jsonl"
    command = [sys.executable, "-m", "s3d_jax", "distill", "--model", str(options.model)]
    command += ["--prompts", str(options.prompts), "--out", str(answers), "--seed", "2"]
    command += ["--longest-prompt", "128", "--max-new-tokens", "16" if options.small else "192"]
    command += ["--batch-size", "4" if options.small else "256", "--sampled-fraction", "0.25"]
    command += ["--temperature", "0.7", *(["--limit", "8"] if options.small else [])]
    start = time.monotonic()
    error = _run_until(options.deadline, command)
    partial = answers.with_name(answers.name + ".partial")
    if not answers.exists() and partial.exists():  # each line of it is whole but the last
        lines = partial.read_text().splitlines(keepends=True)
        answers.write_text("".join(line for line in lines if line.endswith("\n")))
    count = len(answers.read_text().splitlines()) if answers.exists() else 0
    seconds = time.monotonic() - start
    yield {"error": error, "answers": count, "seconds_with_compilation": seconds}


def training(options: argparse.Namespace) -> Findings:
    """Trains a draft in the time that there is: OUT/run, and the draft in OUT/draft.

    A first run of a few steps measures a step, so that the schedule of the second ends in time.
    """
    import numpy as np

    from s3d_jax.storage.native import read_header

    files = [path for path in (options.data, options.out / "answers.jsonl") if path]
    files = [path for path in files if path.exists() and path.stat().st_size]
    if options.model is None or not files:
        yield {"skipped": "needs --model, and --data or the stage distilling"}
        return
    end = options.deadline - 40  # the rest is for the draft to be written
    model = options.out / "model"  # a copy, so that the drafts of trials stay out of --model
    if not model.exists():
        shutil.copytree(options.model, model, copy_function=_link)
    size, length, trial_steps = (2, 64, 6) if options.small else (32, 256, 60)
    command = [sys.executable, "-m", "s3d_jax", "train", "--model", str(model), "--overwrite"]
    command += [word for path in files for word in ("--data", str(path))]
    command += ["--batch-size", str(size), "--row-length", str(length), "--anchors", "48"]
    command += ["--learning-rate", "0.001", "--validate-every", "0"]
    command += ["--valid-prompts", "2" if options.small else "16", "--valid-tokens", "96"]
    if options.start:
        command += ["--start", options.start]
    else:
        vocabulary = min(16384, read_header(model).config.vocab_size)
        command += ["--rank", "32", "--chain-rank", "256", "--draft-vocab", str(vocabulary)]

    def train(name: str, steps: int, save_every: int) -> tuple[float, list[float], str | None]:
        """Seconds to the first line of the metrics, between the others, and the error."""
        run = options.out / name
        shutil.rmtree(run, ignore_errors=True)
        words = ["--run", str(run), "--name", name, "--steps", str(steps), "--log-every", "1"]
        words += ["--warmup-steps", str(min(50, steps // 4)), "--save-every", str(save_every)]
        start, seen = time.monotonic(), []

        def look() -> None:
            metrics = run / "metrics.jsonl"
            lines = metrics.read_text().count("\n") if metrics.exists() else 0
            seen.extend([time.monotonic()] * (lines - len(seen)))

        error = _run_until(end, [*command, *words], look)
        if not seen:
            return time.monotonic() - start, [], error
        return seen[0] - start, np.diff(seen).tolist(), error

    first, between, error = train("trial", trial_steps, 0)
    yield {"steps": trial_steps, "seconds_to_the_first": first, "error": error}
    if len(between) < 3:
        return
    a_step = max(statistics.mean(between[1:-1]), 1e-3)  # the outer ones hold validations
    # The run compiles nothing new; its validations take as long as those of the trial.
    steps = max(trial_steps, int(0.7 * (end - time.monotonic() - first) / a_step))
    yield {"seconds_a_step": a_step, "tokens_per_second": size * length / a_step, "steps": steps}
    first, between, error = train("run", steps, max(1, int(20 / a_step)))
    yield {"seconds_to_the_first": first, "steps": len(between), "error": error}
    export = [sys.executable, "-m", "s3d_jax", "draft", "export", "run", str(options.out / "draft")]
    error = _run_until(options.deadline, [*export, "--model", str(model)])
    yield {"draft": str(options.out / "draft"), "error": error}


def _link(source: str, destination: str) -> None:
    try:
        os.link(source, destination)
    except OSError:  # another file system
        shutil.copy2(source, destination)


def _run_until(
    deadline: float,
    command: list[str],
    look: Callable[[], None] = lambda: None,
    output: int | None = subprocess.DEVNULL,
) -> str | None:
    """Runs a command, stopped shortly before the deadline; returns what it said if it failed.

    Args:
        deadline: by `time.monotonic`.
        command: the words.
        look: called again and again while it runs.
        output: where its output goes; None is where this process's goes.
    """
    with tempfile.TemporaryFile("w+") as errors:
        # A session of its own, so that it can be stopped with the processes that it started.
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=errors,
            env=_ENVIRON,
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                if time.monotonic() > deadline - 3:
                    return "cut off at the end of its time"
                look()
                time.sleep(0.02)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        look()
        errors.seek(0)
        return errors.read()[-2000:] if process.returncode else None


def profile(options: argparse.Namespace) -> Findings:
    """Kernels of one text by S3D."""
    import jax

    import s3d_jax

    lm = s3d_jax.load(options.model)
    prompt = list(range(5, 5 + PROMPT_TOKENS))
    for method in ("ar", "s3d"):
        runs: dict[str, Any] = dict(max_new_tokens=32, eos_token_ids=(), adaptive=False)
        runs["method"] = method
        for _ in range(2):
            (result,) = lm.generate([prompt], **runs)
        folder = options.out / f"trace-{method}"
        with jax.profiler.trace(str(folder), create_perfetto_trace=True):
            (result,) = lm.generate([prompt], **runs)
        (trace,) = folder.glob("**/perfetto_trace.json.gz")
        found = kernels(json.loads(gzip.decompress(trace.read_bytes())))
        yield {"method": method, "iterations": result.stats.iterations, **found}


def kernels(trace: Any) -> dict[str, Any]:
    """What ran on the device, from a trace in Chrome's format.

    Returns:
        Milliseconds from the first to the last kernel, in which of them some kernel ran, the number
        of kernels, and those that took most.
    """
    events = trace["traceEvents"] if isinstance(trace, dict) else trace
    names = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    devices = {pid for pid, name in names.items() if "/device:" in name} or set(names)
    spans = [e for e in events if e.get("ph") == "X" and e.get("pid") in devices and "dur" in e]
    spans = [e for e in spans if not e["name"].startswith("$")]  # Python's, on a CPU
    total: dict[str, float] = collections.Counter()
    for event in spans:
        total[re.sub(r"[.\d]+$", "", event["name"])] += event["dur"] / 1e3
    busy, end = 0.0, float("-inf")
    for event in sorted(spans, key=lambda e: e["ts"]):
        stop = event["ts"] + event["dur"]
        busy += max(0.0, stop - max(event["ts"], end))
        end = max(end, stop)
    first = min((e["ts"] for e in spans), default=0.0)
    return {
        "milliseconds": (end - first) / 1e3 if spans else 0.0,
        "busy_milliseconds": busy / 1e3,
        "kernels": len(spans),
        "most": dict(sorted(total.items(), key=lambda item: -item[1])[:20]),
    }


STAGES: dict[str, Callable[[argparse.Namespace], Findings]] = {
    "exact": exact,
    "passes": passes,
    "texts": texts,
    "distilling": distilling,
    "training": training,
    "profile": profile,
}


def report(out: Path) -> None:
    """Writes report.md from results.jsonl."""
    lines = [json.loads(x) for x in (out / "results.jsonl").read_text().splitlines()]
    parts = []
    for stage in ("about", *STAGES):
        rows = [line for line in lines if line["stage"] == stage]
        if rows:
            parts.append(f"## {stage}\n")
            parts += ["```", *(json.dumps(row, indent=1) for row in rows), "```", ""]
    (out / "report.md").write_text("\n".join(parts))


def record(out: Path, stage: str, finding: dict[str, Any]) -> None:
    """Appends a finding, at once."""
    line = json.dumps({"stage": stage, **finding})
    with (out / "results.jsonl").open("a") as file:
        file.write(line + "\n")
    print(line[:400], flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the findings")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all stages (default: 10)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=[*STAGES], metavar="STAGE")
    parser.add_argument("--model", type=Path, help="a native checkpoint for texts and training")
    parser.add_argument("--data", type=Path, help="its own answers, to train on (s3d distill)")
    parser.add_argument("--prompts", type=Path, help="chats to answer, as for s3d distill")
    parser.add_argument("--start", metavar="NAME", help="the model's draft that training continues")
    parser.add_argument("--small", action="store_true", help="small models (on CPUs: always)")
    for name in ("--only", "--shape", "--precision"):  # for the processes of the stages
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=600.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    options.deadline = time.monotonic() + options.seconds
    if options.only:
        import jax

        options.small |= jax.default_backend() == "cpu"
        if options.only == "about":
            from s3d_jax.bench.report import about

            record(options.out, "about", {"about": about(), "devices": str(jax.devices())})
        elif options.only == "one-shape":
            print(json.dumps(one_shape(options.shape, options.precision, options.small)))
        else:
            for finding in STAGES[options.only](options):
                record(options.out, options.only, finding)
        return 0

    whole = sum(SHARES[stage] for stage in options.stages)
    end = time.monotonic() + 60 * options.minutes
    command = [sys.executable, __file__, "--out", str(options.out)] + ["--small"] * options.small
    command += ["--model", str(options.model)] if options.model else []
    for name in ("data", "prompts", "start"):
        if (value := getattr(options, name)) is not None:
            command += [f"--{name}", str(value)]
    subprocess.run([*command, "--only", "about"])
    for stage in options.stages:
        # What earlier stages did not use is shared by the later ones.
        seconds = (end - time.monotonic()) * SHARES[stage] / whole
        whole -= SHARES[stage]
        if seconds < 5:
            record(options.out, stage, {"error": "no time was left"})
            continue
        stop = time.monotonic() + seconds
        words = [*command, "--only", stage, "--seconds", str(seconds)]
        if error := _run_until(stop, words, output=None):
            record(options.out, stage, {"error": error})
        report(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
