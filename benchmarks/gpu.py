"""What a device does with this package, in ten minutes.

    python benchmarks/gpu.py --out DIR [--minutes 10] [--model CHECKPOINT]
        [--data own.jsonl] [--prompts chats.jsonl] [--start DRAFT] [--train WORDS]
        [--stages training ...]

The stages run one after the other, what is wanted most first, each in a process of its own with a
share of the time:

exact      S3D's tokens against AR's in int8, int4, float32, bfloat16, float16; differences
           counted with the gap between the two best logits there; whether the state is donated,
           and copies of a cache in the compiled loop
passes     AR step, verification of 2 to 33 rows, half-depth draft, by shape and precision; share of
           the bandwidth; peak memory against the ledger; temporary memory, which shows whether
           weights are widened
texts      `s3d bench` on the model of the package, and on --model with all of its drafts
distilling answers of --model to --prompts, as many as the time allows
training   a draft for --model on --data and those answers, in the time that there is; a run in DIR
           of the same data and settings continues, if the stage runs alone
profile    kernels of one text: their time, their number, and the idle time between them
variants   passes and texts under other settings of XLA; only where --stages names it

Each finding is appended to DIR/results.jsonl at once, so that a run that is killed loses no more
than the stage it is in; DIR/report.md has them as tables after each stage. Runs on any machine with
CUDA, and, with small models, on a CPU.
"""

import argparse
import collections
import gzip
import importlib.util
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

Findings = Iterator[dict[str, Any]]

# Seconds of ten minutes.
SHARES = dict(
    exact=100, passes=180, texts=90, distilling=80, training=100, profile=50, variants=300
)
# Settings of XLA on GPUs that may pay. Command buffers are CUDA graphs: kernels of a loop that are
# launched as one, so that a small model does not wait for the host.
VARIANTS = {
    "as it is": "",
    "loops in command buffers": "--xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUDNN,"
    "CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE",
    "no command buffers": "--xla_gpu_enable_command_buffer=",
    "products by cuBLAS, not Triton": "--xla_gpu_enable_triton_gemm=false",
}
PROMPT_TOKENS, NEW_TOKENS = 24, 96
ROWS = (3, 5, 8, 16, 25, 33)  # of verification
CUT_OFF = "cut off at the end of its time"
METHODS = "ar,s3d:gamma=4:adaptive=no,s3d:gamma=4"
# The runs of one stage compile the same programs.
_ENVIRON = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{tempfile.gettempdir()}/s3d_gpu"}


def exact(options: argparse.Namespace) -> Findings:
    """S3D against AR on the model of the package, and how its loop uses memory.

    Nothing is timed, so XLA tries no variants of its kernels: on an H200 these trials took longest.
    """
    environ = _ENVIRON | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
    for dtype in ("float32", "int8", "bfloat16", "int4", "float16", "int8-plain"):
        command = [sys.executable, __file__, "--only", "one-dtype", "--precision", dtype]
        command += ["--out", str(options.out)] + ["--small"] * options.small
        with tempfile.TemporaryFile("w+") as errors:
            pipe = subprocess.PIPE
            process = subprocess.Popen(command, stdout=pipe, stderr=errors, text=True, env=environ)
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):
                    yield json.loads(line)
            if process.wait():
                errors.seek(0)
                yield {"dtype": dtype, "error": errors.read()[-2000:]}


def one_dtype(dtype: str, small: bool) -> Findings:
    """The stage "exact" in one precision."""
    import jax.numpy as jnp
    import numpy as np

    import s3d_jax
    from s3d_jax.nn.transformer import forward_logits
    from s3d_jax.texts.suites import read_suites

    lm = s3d_jax.load() if dtype == "int8-plain" else _other_model(dtype)
    prompts = [p.tokens for p in read_suites(["stories", "dialogues"], lm, 300)]
    prompts = prompts[: 8 if small else 64]
    runs = dict(max_new_tokens=32 if small else NEW_TOKENS, eos_token_ids=())
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
    from s3d_jax.drafters.s3d import S3D, drafter_of
    from s3d_jax.keys import seeded_keys
    from s3d_jax.settings.sampling import SamplingConfig

    slots, prompt = 2048, np.arange(8, dtype=np.int32)
    keys = seeded_keys(np.zeros(1, np.uint32), np.zeros(1, np.uint32))
    sampling, features = batch_sampling([SamplingConfig()], keys, lm.config.vocab_size)
    drafter = drafter_of(lm.draft_config, lm.config)
    spec = DecodeSpec(lm.config, drafter, features, copies=isinstance(drafter, S3D))
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
    precisions = ("bfloat16", "int8", "int4", "int8-plain")
    shapes = ["llama-130m"] if options.small else ["phi-3-mini", "llama-2-7b", "llama-1.1b"]
    # The time is over before the list is: one shape in each precision, then each other shape.
    for shape, precision in itertools.product(shapes, precisions):
        if shape != "llama-1.1b" or precision in ("bfloat16", "int8"):
            words = ["--shape", shape, "--precision", precision]
            start = time.monotonic()
            found = {"model": shape, "precision": precision} | _timed(options, words, _ENVIRON)
            yield found | {"seconds_in_all": round(time.monotonic() - start, 1)}


def _timed(
    options: argparse.Namespace, words: list[str], environ: Mapping[str, str]
) -> dict[str, Any]:
    """What a process of its own finds of one shape, or its error."""
    command = [sys.executable, __file__, "--only", "one-shape", "--out", str(options.out), *words]
    command += ["--small"] * options.small
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"error": done.stderr[-2000:]}
    return json.loads(lines[-1])


def variants(options: argparse.Namespace) -> Findings:
    """The passes of one shape, and texts of the model of the package and of --model."""
    shape, precision = ("llama-130m" if options.small else "phi-3-mini"), "bfloat16"
    words = ["--few-rows", "--shape", shape, "--precision", precision]
    for name, flags in VARIANTS.items():
        environ = _ENVIRON | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}"}
        found = {"variant": name, "model": shape, "precision": precision}
        yield found | _timed(options, words, environ)
        for model in [None, options.model] if options.model else [None]:
            yield {"variant": name} | _bench(model, METHODS, options.small, environ)


def one_shape(shape: str, precision: str, small: bool, few: bool) -> dict[str, Any]:
    """The passes of one model of random weights."""
    import jax
    from passes import SHAPES, median_seconds, pass_runs, random_model, read_run

    from s3d_jax.machine import peak_memory_bytes
    from s3d_jax.nn.transformer import weight_bytes
    from s3d_jax.weights.base import num_bytes

    # Peaks of all up to then: of making the weights, of XLA's trials of kernels, of passes.
    lm = random_model(SHAPES[shape], precision)
    peaks = {"made": peak_memory_bytes() / 1e9}
    # Two rows: whether a step should be padded to them, since one row has kernels of its own.
    passes = pass_runs(lm, (1, 2, 5) if few else (1, 2, 5, 8) if small else (1, 2, *ROWS))
    peaks["compiled"] = peak_memory_bytes() / 1e9
    weights = weight_bytes(lm.config)
    for one in passes.values():
        one()
    peaks["ran"] = peak_memory_bytes() / 1e9  # before the array of the read benchmark
    state = passes["1 row"].state[0]
    temp = {name: one.temp_bytes for name, one in passes.items()}
    ledger = num_bytes((lm.params, lm.draft_params, state)) + max(temp.values())
    read, read_bytes = read_run(min(weights, 1 << 30))
    seconds = median_seconds({**passes, "read": read}, 1 if small else 3)
    bandwidth = read_bytes / seconds.pop("read")
    table = (
        0
        if lm.config.tie_embeddings
        else sum(x.nbytes for x in jax.tree.leaves(lm.params["embed"]))
    )
    return {
        "milliseconds": {name: round(1e3 * s, 4) for name, s in seconds.items()},
        "over_ar": {name: round(s / seconds["1 row"], 3) for name, s in seconds.items()},
        "read_gb_per_second": bandwidth / 1e9,
        "ar_share_of_bandwidth": (weights - table) / seconds["1 row"] / bandwidth,
        "weight_gb": weights / 1e9,
        "peak_memory_gb": peaks,
        "ledger_gb": ledger / 1e9,
        "temp_bytes": temp,
    }


def texts(options: argparse.Namespace) -> Findings:
    """`s3d bench`, end to end."""
    from s3d_jax.drafters.stored import KINDS, draft_kind, draft_names, read_draft
    from s3d_jax.storage.native import read_header

    more = ["s3d:gamma=2:adaptive=no", "s3d:gamma=4:copies=no"]
    if not options.small:  # int8 models on CPUs take no leaves
        more += [f"s3d:gamma=4:leaves={n}:adaptive=no" for n in ("2+1", "4+2+2")]
    if importlib.util.find_spec("torch") and not options.small:
        more.append("hf")
    yield _bench(None, ",".join([METHODS, *more]), options.small)
    if options.model is None:
        return
    # SmolLM2's loops compile for longer than they run, so each group is kept once it is there.
    yield _bench(options.model, METHODS, options.small)
    for name in draft_names(options.model):
        kind = draft_kind(options.model, name)
        if kind in KINDS:
            gamma = read_draft(
                options.model, name, read_header(options.model).config, weights=False
            ).config.gamma
            yield _bench(options.model, f"{kind}:draft={name}:gamma={gamma}", options.small)
    yield _bench(options.model, ",".join(more), options.small)


def _bench(
    model: Path | None, methods: str, small: bool, environ: Mapping[str, str] = _ENVIRON
) -> dict[str, Any]:
    """What `s3d bench` finds, or its error; programs that were compiled before are not again."""
    from s3d_jax.drafters.stored import DEFAULT_NAME, S3D, draft_kind, draft_names

    command = [sys.executable, "-m", "s3d_jax", "bench", "--json", "--limit", "1"]
    command += ["--max-new-tokens", "16" if small else "128", "--repeats", "1" if small else "2"]
    command += ["--methods", methods] + (["--model", str(model)] if model else [])
    names = [n for n in draft_names(model) if draft_kind(model, n) == S3D] if model else []
    if names and DEFAULT_NAME not in names:
        command += ["--draft", names[0]]  # with several, none would be used unasked
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    try:
        return json.loads(done.stdout)
    except json.JSONDecodeError:
        return {"model": str(model or "of the package"), "error": done.stderr[-2000:]}


def distilling(options: argparse.Namespace) -> Findings:
    """The model's own answers to --prompts, until the time is over: OUT/answers.jsonl.gz."""
    if options.model is None or options.prompts is None:
        yield {"skipped": "needs --model and --prompts"}
        return
    import s3d_jax
    from s3d_jax.texts.documents import read_documents

    lm = s3d_jax.load(options.model, use_draft=False)
    eos = lm.eos_token_ids[0] if lm.eos_token_ids else None
    documents = read_documents([options.prompts], lm.tokenizer, eos, prompts=True)
    prompts = [document.tokens[: document.prompt_tokens] for document in documents]
    prompts = [prompt for prompt in prompts if len(prompt) <= 128]
    # Each batch is padded to its longest prompt and runs to its longest answer: on a GPU that costs
    # less than what `s3d distill` does, which puts each prompt into the next row that is free.
    rows, new = (4, 16) if options.small else (1024, 192)
    bare = s3d_jax.LM(lm.config, lm.params, eos_token_ids=lm.eos_token_ids)  # makes no texts
    answers = options.out / "answers.jsonl.gz"
    answers.unlink(missing_ok=True)
    count = tokens = 0
    # Of another size, the last batch would need programs of its own.
    for number in range(min(8, len(prompts) // rows) if options.small else len(prompts) // rows):
        start = time.monotonic()
        batch = prompts[number * rows : (number + 1) * rows]
        sampled = dict(temperature=0.7, seed=list(range(number * rows, (number + 1) * rows)))
        more: dict[str, Any] = sampled if number % 4 == 3 else {}
        results = bare.generate(batch, method="ar", max_new_tokens=new, **more)
        with gzip.open(answers, "at", compresslevel=1) as file:  # whole after each batch
            for prompt, result in zip(batch, results, strict=True):
                line = {"prompt_tokens": prompt.tolist(), "tokens": result.tokens}
                file.write(json.dumps(line | {"temperature": more.get("temperature", 0.0)}) + "\n")
        count, tokens = count + len(batch), tokens + sum(len(r.tokens) for r in results)
        seconds = {"seconds": time.monotonic() - start}
        seconds["decoding"] = results[0].stats.decode_seconds
        yield {"answers": count, "tokens": tokens, **seconds}


def training(options: argparse.Namespace) -> Findings:
    """Trains a draft in the time that there is: OUT/run, and the draft in OUT/draft.

    A first run of a few steps measures a step, so that the schedule of the second ends in time. A
    run that is there already, of the same data and settings, gets as many steps more; one of others
    is replaced.
    """
    import numpy as np

    from s3d_jax.storage.native import read_header

    files = [path for path in (options.data, options.out / "answers.jsonl.gz") if path]
    files = [path for path in files if path.exists() and path.stat().st_size]
    if options.model is None or not files:
        yield {"skipped": "needs --model, and --data or the stage distilling"}
        return
    end = options.deadline - 40  # the rest is for the draft to be written
    model = options.out / "model"  # a copy, so that the drafts of trials stay out of --model
    if not model.exists():
        shutil.copytree(options.model, model, copy_function=_link)
    size, length, trial_steps = (2, 64, 6) if options.small else (32, 320, 60)
    command = [sys.executable, "-m", "s3d_jax", "train", "--model", str(model), "--overwrite"]
    command += [word for path in files for word in ("--data", str(path))]
    command += ["--batch-size", str(size), "--row-length", str(length), "--anchors", "48"]
    command += ["--learning-rate", "0.001", "--objective", "kl", "--validate-every", "0"]
    command += ["--valid-prompts", "2" if options.small else "16", "--valid-tokens", "96"]
    if options.start:
        command += ["--start", options.start]
    else:
        vocabulary = min(16384, read_header(model).config.vocab_size)
        command += ["--rank", "32", "--chain-rank", "256", "--draft-vocab", str(vocabulary)]
    command += shlex.split(options.train)  # what is said twice counts as it is said last

    def newest(run: Path) -> int:
        """The step of the newest state."""
        states = (path.name for path in (run / "states").glob("[0-9]*"))
        return max((int(name) for name in states if name.isdigit()), default=0)

    def noted(run: Path) -> str:
        metrics = run / "metrics.jsonl"
        return metrics.read_text() if metrics.exists() else ""

    def train(
        name: str, steps: int, save_every: int, resume: bool = False, until: float = end
    ) -> tuple[float, list[float], float, str | None]:
        """Seconds to the end of the first step, between the others, and after the last."""
        run = options.out / name
        words = ["--run", str(run), "--name", name, "--steps", str(steps), "--log-every", "1"]
        words += ["--warmup-steps", str(min(50, steps // 4)), "--save-every", str(save_every)]
        if resume:
            words.append("--resume")
        else:
            shutil.rmtree(run, ignore_errors=True)
        begun, before = newest(run), noted(run)
        start, seen = time.monotonic(), []

        def look() -> None:
            text = noted(run)
            if text == before:  # what was noted after the newest state has not been removed yet
                return
            lines = (json.loads(line) for line in text.splitlines() if line.endswith("}"))
            count = sum("loss" in line and line["step"] > begun for line in lines)
            seen.extend([time.monotonic()] * (count - len(seen)))

        error = _run_until(until, [*command, *words], look)
        if not seen:
            return time.monotonic() - start, [], 0.0, error
        return seen[0] - start, np.diff(seen).tolist(), time.monotonic() - seen[-1], error

    first, between, after, error = train("trial", trial_steps, 0)
    yield {"steps": trial_steps, "seconds_to_the_first": first, "error": error}
    if len(between) < 3:
        return
    a_step = max(statistics.mean(between[1:]), 1e-3)
    # The run compiles nothing new; its beginning and end take no longer than those of the trial.
    left = end - time.monotonic() - first - after
    steps, run = max(trial_steps, int(0.85 * left / a_step)), options.out / "run"
    done = newest(run)
    speed = size * length / a_step
    yield {"seconds_a_step": a_step, "tokens_per_second": speed, "done": done, "steps": steps}
    save_every = max(1, int(15 / a_step))
    until = end - first - after
    first, between, after, error = train("run", done + steps, save_every, done > 0, until)
    if error and "with other options" in error:  # of s3d train: other data, say
        yield {"not_continued": error}
        first, between, after, error = train("run", steps, save_every, until=until)
    yield {"seconds_to_the_first": first, "steps_after_it": len(between), "error": error}
    if error == CUT_OFF and newest(run):  # slower than the trial was: what has been saved counts
        steps = newest(run) + 1  # the last step comes with a validation
        *_, error = train("run", steps, save_every, resume=True, until=options.deadline - 10)
        yield {"steps": steps, "error": error}
    if error:
        return
    shutil.rmtree(options.out / "draft", ignore_errors=True)
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
                    return CUT_OFF
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
    "variants": variants,
}


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
    usual = [stage for stage in STAGES if stage != "variants"]
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=usual, metavar="STAGE")
    parser.add_argument("--model", type=Path, help="a native checkpoint for texts and training")
    parser.add_argument("--data", type=Path, help="its own answers, to train on (s3d distill)")
    parser.add_argument("--prompts", type=Path, help="chats to answer, as for s3d distill")
    parser.add_argument("--start", metavar="NAME", help="the model's draft that training continues")
    parser.add_argument("--train", default="", metavar="WORDS", help="more options of s3d train")
    parser.add_argument("--small", action="store_true", help="small models (on CPUs: always)")
    for name in ("--only", "--shape", "--precision"):  # for the processes of the stages
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--few-rows", action="store_true", help=argparse.SUPPRESS)
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
        elif options.only == "one-dtype":
            for finding in one_dtype(options.precision, options.small):
                print(json.dumps(finding), flush=True)
        elif options.only == "one-shape":
            found = one_shape(options.shape, options.precision, options.small, options.few_rows)
            print(json.dumps(found))
        else:
            for finding in STAGES[options.only](options):
                record(options.out, options.only, finding)
        return 0

    import gpu_report

    whole = sum(SHARES[stage] for stage in options.stages)
    end = time.monotonic() + 60 * options.minutes
    command = [sys.executable, __file__, "--out", str(options.out)] + ["--small"] * options.small
    command += ["--model", str(options.model)] if options.model else []
    for name in ("data", "prompts", "start", "train"):
        if value := getattr(options, name):
            command += [f"--{name}={value}"]
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
        try:
            gpu_report.report(options.out)
        except Exception as error:  # the findings are kept, and the other stages run
            print(f"no report: {error!r}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
