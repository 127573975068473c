"""What an AR step, verification and a draft cost for models of a known shape, with random weights.

    python benchmarks/passes.py                                   # what a CPU with 8 GB can hold
    python benchmarks/passes.py --models phi-3-mini llama-2-7b --precisions bfloat16 int8    # a GPU
    python benchmarks/passes.py --models llama-130m --sweep       # batches and contexts

One process per model and precision, so that nobody pays for another's memory. Within it everything
is measured in turns, and reported as medians. The bandwidth is that of a read benchmark in the same
process, in the same turns. Runs on CPUs and GPUs alike.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import date
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from s3d_jax.decoding.sampling import batch_sampling
from s3d_jax.decoding.sizes import SlotPlan
from s3d_jax.decoding.state import DecodeSpec, Inputs, init_state, verify_pass
from s3d_jax.drafters.s3d import S3D
from s3d_jax.keys import make_key
from s3d_jax.lm import LM
from s3d_jax.machine import core_count, machine_name, peak_memory_bytes
from s3d_jax.nn.transformer import abstract_params, weight_bytes
from s3d_jax.settings.arguments import prepare_streams
from s3d_jax.settings.drafting import DraftConfig, symmetric_skip
from s3d_jax.settings.model import DTYPES, QUANTIZATIONS, ModelConfig
from s3d_jax.settings.sampling import SamplingConfig
from s3d_jax.weights.formats import in_memory

TURN_SECONDS = 0.5
_LLAMA = dict(max_position_embeddings=8448)
SHAPES: dict[str, dict[str, Any]] = {
    "llama-130m": _LLAMA
    | dict(
        **dict(vocab_size=32000, hidden_size=768, intermediate_size=2048, num_layers=12),
        **dict(num_heads=12, num_kv_heads=12, head_dim=64),
    ),
    "smollm2-135m": _LLAMA
    | dict(
        **dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30),
        **dict(num_heads=9, num_kv_heads=3, head_dim=64, tie_embeddings=True),
    ),
    "llama-1.1b": _LLAMA  # TinyLlama
    | dict(
        **dict(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_layers=22),
        **dict(num_heads=32, num_kv_heads=4, head_dim=64),
    ),
    "phi-3-mini": _LLAMA
    | dict(
        **dict(vocab_size=32064, hidden_size=3072, intermediate_size=8192, num_layers=32),
        **dict(num_heads=32, num_kv_heads=32, head_dim=96),
    ),
    "llama-2-7b": _LLAMA
    | dict(
        **dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_layers=32),
        **dict(num_heads=32, num_kv_heads=32, head_dim=128),
    ),
}
CPU_RUNS = [
    ("llama-130m", "float32"),
    ("llama-130m", "bfloat16"),
    ("llama-130m", "int8"),
    ("llama-1.1b", "bfloat16"),
    ("llama-1.1b", "int8"),
]
COLUMNS = ("1 row", "4 rows", "5 rows", "8 rows", "draft", "hf")
BATCHES, CONTEXTS = (1, 2, 4, 8, 16), (256, 512, 1024, 2048, 4096, 8192)


def median_seconds(
    contestants: Mapping[str, Callable[[], float]], repeats: int
) -> dict[str, float]:
    """Medians over `repeats` turns of each; a contestant is a run that returns its own seconds.

    A turn is half a second of runs, the first of which does not count, so that nobody pays for the
    caches and threads of the one before.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, run in contestants.items():
            run()
            end = time.perf_counter() + TURN_SECONDS
            turn = [run()]
            while time.perf_counter() < end:
                turn.append(run())
            seconds[name].append(statistics.median(turn))
    return {name: statistics.median(values) for name, values in seconds.items()}


def random_model(shape: dict[str, Any], precision: str) -> LM:
    """A Llama of that shape whose weights repeat one random block."""
    rounded, backend = precision in QUANTIZATIONS, jax.default_backend()
    config = ModelConfig(
        **shape,
        # What is not rounded is of the type that the device computes in.
        dtype=("float32" if backend == "cpu" else "bfloat16") if rounded else precision,
        quantization=precision if rounded else None,
    )
    config = in_memory(config, backend)
    block = np.random.default_rng(0).normal(0, 0.02, 1 << 22).astype(np.float32)
    numbers = {
        jnp.dtype(jnp.int4): np.clip(np.rint(block * 150), -8, 7),
        jnp.dtype(jnp.int8): np.rint(block * 1500),
    }

    @functools.partial(jax.jit, static_argnums=1)
    def repeated(values: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jnp.resize(values, shape)  # on the device: gigabytes would take long to travel

    def array(path: Any, leaf: Any) -> jax.Array:
        if path[-1].key == "factors":  # of groups of int4 weights
            return jnp.full(leaf.shape, 12, leaf.dtype)
        if leaf.ndim == 1 and leaf.dtype not in numbers:  # norms; scales of int8 and int4 weights
            return jnp.full(
                leaf.shape, 1.0 if leaf.dtype == config.dtype else 0.02 / 30, leaf.dtype
            )
        values = numbers.get(leaf.dtype, block).astype(leaf.dtype)
        return repeated(jax.device_put(values), leaf.shape)

    return LM(config, jax.tree_util.tree_map_with_path(array, abstract_params(config)))


@dataclasses.dataclass
class Pass:
    """A contestant: a compiled pass over a state that it hands on to the next pass.

    Attributes:
        program: runs `count` passes, one after the other.
        arguments: of the program, before the state.
        state: in a list, which the passes share.
        temp_bytes: temporary memory; widened weights would be as large as those of a layer.
    """

    program: Any
    arguments: tuple[Any, ...]
    state: list[Any]
    count: int

    def __call__(self) -> float:
        start = time.perf_counter()
        tokens, self.state[0] = self.program(*self.arguments, self.state[0])
        jax.block_until_ready((tokens, self.state[0]))
        return (time.perf_counter() - start) / self.count

    @property
    def temp_bytes(self) -> int:
        return int(self.program.memory_analysis().temp_size_in_bytes)


def pass_runs(lm: LM, rows: tuple[int, ...], batch: int = 1, context: int = 128) -> dict[str, Pass]:
    """Single passes after `context` tokens, head and argmax included, as contestants.

    "1 row", "4 rows", … are passes of the whole model over so many tokens, "draft" is one of four
    with half of the layers.
    """
    config = lm.config
    skip = symmetric_skip(config.num_layers, config.num_layers // 2)
    spec = DecodeSpec(config, S3D(DraftConfig(skip, gamma=4)))
    keys = jax.random.split(make_key(0), batch)
    sampling, _ = batch_sampling([SamplingConfig()] * batch, keys, 1)
    slots = -(-(context + 32) // 64) * 64
    prompts = [np.arange(context, dtype=np.int32) % config.vocab_size] * batch
    plan = SlotPlan((context,) * batch, (context + 8,) * batch, 4, slots)
    state = init_state(spec, prompts, plan, sampling)
    state = state.replace(cache=state.cache.replace(length=jnp.full(batch, context - 1)))

    def verify(params: Any, draft_params: Any, state: Any, drafted: int) -> Any:
        tokens = jnp.zeros((batch, drafted), jnp.int32)
        verified = verify_pass(Inputs(spec, params, draft_params, state), tokens)
        return jnp.argmax(verified.logits, axis=-1), state.replace(cache=verified.cache)

    def draft(params: Any, draft_params: Any, state: Any, drafted: int) -> Any:
        proposal = spec.drafter.propose(Inputs(spec, params, draft_params, state))
        return proposal.tokens, state.replace(cache=proposal.cache)

    # On a GPU, calls of single passes would measure the host that launches them.
    count = 1 if jax.default_backend() == "cpu" else 8

    def compiled(function: Callable[..., Any], drafted: int) -> Any:
        def passes(params: Any, draft_params: Any, state: Any) -> Any:
            def again(_: Any, carry: Any) -> Any:
                return function(params, draft_params, carry[1], drafted)

            if count == 1:
                return again(0, (None, state))
            tokens, _ = jax.eval_shape(again, 0, (None, state))
            return jax.lax.fori_loop(0, count, again, (jnp.zeros_like(tokens), state))

        return jax.jit(passes, donate_argnums=2).lower(*arguments, state).compile()

    arguments, holder = (lm.params, lm.draft_params), [state]
    passes = {"1 row" if n == 1 else f"{n} rows": (verify, n - 1) for n in rows}
    passes["draft"] = (draft, 4)
    with concurrent.futures.ThreadPoolExecutor(core_count()) as pool:
        programs = pool.map(lambda one: compiled(*one), passes.values())
        return {
            name: Pass(program, arguments, holder, count)
            for name, program in zip(passes, programs, strict=True)
        }


def read_run(num_bytes: int) -> tuple[Callable[[], float], int]:
    """A read benchmark as a contestant, and the bytes that it reads."""
    if jax.default_backend() != "cpu":
        array = jnp.ones(num_bytes // 2, jnp.bfloat16)
        total = jax.jit(functools.partial(jnp.sum, dtype=jnp.float32))

        def on_device() -> float:
            start = time.perf_counter()
            jax.block_until_ready(total(array))
            return time.perf_counter() - start

        return on_device, array.nbytes
    parts = np.array_split(np.ones(num_bytes // 8, np.int64), core_count())
    pool = concurrent.futures.ThreadPoolExecutor(core_count())

    def on_host() -> float:
        start = time.perf_counter()
        list(pool.map(np.bitwise_or.reduce, parts))  # numpy's fastest reduction
        return time.perf_counter() - start

    return on_host, sum(part.nbytes for part in parts)


def hf_run(shape: dict[str, Any], precision: str, new_tokens: int) -> Callable[[], float]:
    """Seconds per new token of HF's greedy `generate` after 128 tokens, as a contestant."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape["num_kv_heads"],
        head_dim=shape["head_dim"],
        dtype=precision,
        eos_token_id=None,
    )
    torch.set_default_dtype(getattr(torch, precision))
    model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    prompt = torch.arange(128)[None]
    options = dict(do_sample=False, eos_token_id=None, pad_token_id=0)

    def seconds(count: int) -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, **options
            )
        return time.perf_counter() - start

    return lambda: (seconds(new_tokens + 1) - seconds(1)) / new_tokens


def measure(model: str, precision: str, repeats: int, against_hf: bool) -> dict[str, Any]:
    """One model in one precision."""
    lm = random_model(SHAPES[model], precision)
    runs: dict[str, Callable[[], float]] = {**pass_runs(lm, (1, 4, 5, 8))}
    weights = weight_bytes(lm.config)
    read, read_bytes = read_run(min(weights, 1 << 30))
    runs["read"] = read
    if against_hf and precision not in QUANTIZATIONS:
        runs["hf"] = hf_run(SHAPES[model], precision, 8)
    seconds = median_seconds(runs, repeats)
    bandwidth = read_bytes / seconds.pop("read")
    # Of a table that is not the head as well, a step reads one row.
    table = 0 if lm.config.tie_embeddings else _table_bytes(lm)
    return {
        "milliseconds": {name: 1e3 * s for name, s in seconds.items()},
        "over_ar": {name: s / seconds["1 row"] for name, s in seconds.items()},
        "read_gb_per_second": bandwidth / 1e9,
        "ar_share_of_bandwidth": (weights - table) / seconds["1 row"] / bandwidth,
        "weight_gb": weights / 1e9,
        "peak_memory_gb": peak_memory_bytes() / 1e9,
    }


def _table_bytes(lm: LM) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(lm.params["embed"]))


def sweep(model: str, precision: str, repeats: int) -> dict[str, Any]:
    """Milliseconds by batch, and by context."""
    lm = random_model(SHAPES[model], precision)
    slot = 2 * lm.config.num_kv_heads * lm.config.head_dim * lm.config.num_layers
    slot *= jnp.dtype(lm.config.dtype).itemsize
    report: dict[str, Any] = {"cache_bytes_per_token": slot, "batch": {}, "context": {}}
    for kind, sizes in (("batch", BATCHES), ("context", CONTEXTS)):
        for size in sizes:
            seconds = median_seconds(pass_runs(lm, (1, 5), **{kind: size}), repeats)
            report[kind][size] = {name: 1e3 * s for name, s in seconds.items()}
    return report


def machine() -> dict[str, str]:
    """What the numbers belong to."""
    return {
        "date": date.today().isoformat(),
        "device": machine_name(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def main() -> int:
    prepare_streams()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=SHAPES, metavar="MODEL", help=str([*SHAPES]))
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=(*DTYPES, "int8", "int8-plain", "int4"),
        help="int4 is held as int8 on CPUs",
    )
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="turns (default: 7)")
    parser.add_argument("--hf", action="store_true", help="HF transformers too (needs torch)")
    parser.add_argument(
        "--sweep", action="store_true", help="batches of 1 to 16, contexts of 256 to 8192"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    runs = CPU_RUNS
    if arguments.models or arguments.precisions:
        models = arguments.models or ["llama-130m"]
        runs = [(m, p) for m in models for p in arguments.precisions or ["bfloat16"]]
    if arguments.json and len(runs) == 1:  # one of the processes below, or asked for
        if arguments.sweep:
            report = sweep(*runs[0], arguments.repeats)
        else:
            report = measure(*runs[0], arguments.repeats, arguments.hf)
        print(json.dumps(report))
        return 0

    reports = {}
    if not arguments.json:
        print(", ".join(f"{k} {v}" for k, v in machine().items()), end="\n\n")
        if not arguments.sweep:
            print(f"| model | {' | '.join(COLUMNS)} | GB | read GB/s | AR of that | peak GB |")
            print("|---" * (len(COLUMNS) + 5) + "|", flush=True)
    for model, precision in runs:
        flags = ["--hf"] * arguments.hf + ["--sweep"] * arguments.sweep
        command = [sys.executable, __file__, "--models", model, "--precisions", precision, "--json"]
        command += [*flags, "--repeats", str(arguments.repeats)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            return done.returncode
        report = json.loads(done.stdout)
        reports[f"{model}, {precision}"] = report
        if not arguments.json:
            (print_sweep if arguments.sweep else print_passes)(f"{model}, {precision}", report)
    if arguments.json:
        print(json.dumps(reports))
    return 0


def print_passes(model: str, report: dict[str, Any]) -> None:
    """A line of a Markdown table: milliseconds, and in parentheses over AR."""
    cells = [
        f"{report['milliseconds'][name]:.2f} ({report['over_ar'][name]:.2f})"
        if name in report["over_ar"]
        else ""
        for name in COLUMNS
    ]
    print(
        f"| {model} | {' | '.join(cells)} | {report['weight_gb']:.2f} "
        f"| {report['read_gb_per_second']:.1f} | {report['ar_share_of_bandwidth']:.0%} "
        f"| {report['peak_memory_gb']:.2f} |",
        flush=True,
    )


def print_sweep(model: str, report: dict[str, Any]) -> None:
    """Two Markdown tables."""
    print(f"{model}: {report['cache_bytes_per_token']:,} bytes of cache per token\n")
    for kind in ("batch", "context"):
        names = list(next(iter(report[kind].values())))
        print(f"| {kind} | {' | '.join(f'{n}, ms' for n in names)} |\n|---{'|---' * len(names)}|")
        for size, row in report[kind].items():
            print(f"| {size} | {' | '.join(f'{row[n]:.2f}' for n in names)} |")
        print(flush=True)


if __name__ == "__main__":
    sys.exit(main())
