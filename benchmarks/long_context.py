"""Long contexts: bytes of the cache, time of a decoding step, and the memory of a long prefill.

    python benchmarks/long_context.py [cache] [steps] [prefill] [--lengths N ...]

Random weights. "All slots" and "scores at once" are what would be without the rings that layers
with a window keep, and without attention that goes through the cache block by block.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from s3d_jax.decoding.prefill import prefill
from s3d_jax.decoding.sampling import batch_sampling
from s3d_jax.decoding.sizes import PREFILL_BUCKETS, SlotPlan
from s3d_jax.decoding.state import DecodeSpec, init_state
from s3d_jax.decoding.step import decode_jit
from s3d_jax.drafters.s3d import S3D
from s3d_jax.keys import make_key
from s3d_jax.machine import peak_memory_bytes
from s3d_jax.nn import attention
from s3d_jax.nn import transformer as model
from s3d_jax.nn.cache import init_cache
from s3d_jax.nn.draft import untrained_draft
from s3d_jax.settings.arguments import prepare_streams
from s3d_jax.settings.drafting import DraftConfig, symmetric_skip
from s3d_jax.settings.model import ModelConfig
from s3d_jax.settings.sampling import SamplingConfig

LARGEST_BLOCK = PREFILL_BUCKETS[-1]
GEMMA_3 = ((*(512,) * 5, None) * 5)[:26]
# The attention of the real models; width and vocabulary are small in the steps that are timed.
SIZES = dict(vocab_size=1000, hidden_size=256, intermediate_size=512, dtype="float32")
MODELS = {
    "Mistral-7B (window 4096, 32 layers)": dict(
        num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, sliding_window=(4096,) * 32
    ),
    "Gemma-3-1B (window 512, 22 of 26 layers)": dict(
        num_layers=26, num_heads=4, num_kv_heads=1, head_dim=256, sliding_window=GEMMA_3
    ),
}
PROMPT = dict(num_layers=4, num_heads=32, num_kv_heads=32, head_dim=16)


def cache_sizes() -> None:
    print("| cache of one row, 16 bits, MB | 8k: all slots | rings | 32k: all slots | rings |")
    print("|---|---|---|---|---|")
    for name, fields in MODELS.items():
        config = ModelConfig(**(SIZES | fields | {"dtype": "bfloat16"}))
        cells = []
        for slots in (8192, 32768):
            for block in (None, LARGEST_BLOCK):
                cache = jax.eval_shape(
                    lambda c=config, s=slots, b=block: init_cache(c, 1, s, np.ones(1), b)
                )
                size = sum(2 * x.size for x in (*cache.keys, *cache.values))
                cells.append(f"{size / 1e6:.0f}")
        print(f"| {name} | {' | '.join(cells)} |")


def step_times(layers: int, turns: int) -> None:
    """Steps after 8,000 tokens, with both kinds of cache in turns; medians."""
    print(f"\n| ms per step of {layers} layers at 8k, float32 | all slots | rings | ratio |")
    print("|---|---|---|---|")
    slots, length = 8192, 8000
    for name, fields in MODELS.items():
        windows = fields["sliding_window"][:layers]
        fields = fields | {"num_layers": layers, "sliding_window": windows}
        config = ModelConfig(**(SIZES | fields))
        params = model.init_params(config, make_key(0))
        draft = untrained_draft(config, params)
        for gamma in (0, 4):
            drafter = None
            if gamma:
                drafter = S3D(DraftConfig(symmetric_skip(layers, layers // 2), gamma))
            prompt = np.ones(length, np.int32)
            states = []
            for block in (None, LARGEST_BLOCK):
                sampling, features = batch_sampling(
                    [SamplingConfig()], jax.random.split(make_key(0), 1), config.vocab_size
                )
                spec = DecodeSpec(config, drafter, features)
                plan = SlotPlan((length,), (8180,), gamma, slots)
                state = init_state(spec, [prompt], plan, sampling)
                cache = init_cache(config, 1, slots, np.array([length]), block)
                cache = cache.replace(length=cache.prompt_length - 1)
                states.append(state.replace(cache=cache))
            seconds: list[list[float]] = [[], []]
            for turn in range(turns + 1):
                for i, state in enumerate(states):
                    start = time.perf_counter()
                    states[i] = jax.block_until_ready(
                        decode_jit(spec, params, draft, state, jnp.int32(4))
                    )
                    if turn:  # the first one compiles
                        seconds[i].append((time.perf_counter() - start) / 4)
            whole, rings = (1e3 * statistics.median(s) for s in seconds)
            kind = "S3D, γ = 4" if gamma else "AR"
            print(f"| {name}, {kind} | {whole:.2f} | {rings:.2f} | {rings / whole:.2f} |")


def prefill_once(length: int, at_once: bool) -> dict[str, float]:
    """Peak memory of a prefill in addition to weights and cache, and its time, in this process."""
    if at_once:
        attention._WHOLE_BYTES = 1 << 62
    config = ModelConfig(**(SIZES | PROMPT), max_position_embeddings=length)
    jax.block_until_ready(jnp.zeros(1) + 1)
    before = peak_memory_bytes()
    params = model.init_params(config, make_key(0))
    tokens = np.random.default_rng(0).integers(0, 1000, length).astype(np.int32)
    spec, plan = DecodeSpec(config), SlotPlan((length,), (length,), 0, length + 1)
    keys = jax.random.split(make_key(0), 1)
    sampling, _ = batch_sampling([SamplingConfig()], keys, config.vocab_size)
    state = init_state(spec, [tokens], plan, sampling)
    held = sum(x.nbytes for x in jax.tree.leaves((params, state.cache)))
    start = time.perf_counter()
    cache = jax.block_until_ready(prefill(spec, params, None, state, [tokens], plan)).cache
    seconds = time.perf_counter() - start
    beside = peak_memory_bytes() - before - held
    logits, _ = jax.jit(model.forward, static_argnums=0)(config, params, tokens[None, -1:], cache)
    return {"beside": beside, "seconds": seconds, "logits": np.asarray(logits)[0, 0].tolist()}


def prefills(lengths: list[int]) -> None:
    print("\n| prompt | peak beside weights and cache, MB: scores at once ", end="")
    print("| block by block | seconds: at once | block by block | largest logit | difference |")
    print("|---|---|---|---|---|---|---|")
    for length in lengths:
        runs = []
        for at_once in ("1", ""):
            command = [sys.executable, __file__, "one", "--lengths", str(length)]
            command += ["--at-once"] if at_once else []
            runs.append(json.loads(subprocess.run(command, stdout=-1, check=True).stdout))
        a, b = (np.array(run["logits"]) for run in runs)
        cells = [f"{run['beside'] / 1e6:.0f}" for run in runs]
        cells += [f"{run['seconds']:.1f}" for run in runs]
        print(f"| {length} | {' | '.join(cells)} | {abs(a).max():.2f} | {abs(a - b).max():.1e} |")


def main() -> None:
    prepare_streams()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ["cache", "steps", "prefill"]
    parser.add_argument("parts", nargs="*", default=parts, help=f"of {parts} (default: all)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--layers", type=int, default=6, help="of the models whose steps are timed")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--at-once", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.parts == ["one"]:  # of `prefills`, in a process of its own
        print(json.dumps(prefill_once(arguments.lengths[0], arguments.at_once)))
        return
    if "cache" in arguments.parts:
        cache_sizes()
    if "steps" in arguments.parts:
        step_times(arguments.layers, arguments.turns)
    if "prefill" in arguments.parts:
        prefills(arguments.lengths)


if __name__ == "__main__":
    main()
