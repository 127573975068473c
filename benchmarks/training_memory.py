"""The memory that training the draft of a large model takes: by formula, by XLA, and measured.

    python benchmarks/training_memory.py [--layers N] [--rows B] [--length T] [--optimizer NAME]
        [--objective NAME] [--accumulate N] [--no-remat] [--run]

The model has the shape of Phi-3-mini (3.8 B parameters, bfloat16). Without --run nothing is
allocated: the step is compiled for this machine's device, and XLA says what it would take. With
--run a step is taken with constant weights, and the peak is measured.
"""

import argparse
import functools
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np

from s3d_jax.errors import S3DError
from s3d_jax.machine import peak_memory_bytes
from s3d_jax.nn.transformer import abstract_params
from s3d_jax.settings.arguments import prepare_streams
from s3d_jax.settings.drafting import DraftConfig, symmetric_skip
from s3d_jax.settings.model import ModelConfig
from s3d_jax.settings.training import AdapterConfig, LoopConfig, ObjectiveConfig, OptimizerConfig
from s3d_jax.train.draft import DraftTask
from s3d_jax.train.loop import begin, make_step


def gigabytes(tree: object) -> float:
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves) / 1e9


def main() -> None:
    prepare_streams()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rows", type=int, default=4, help="per update (default: 4)")
    parser.add_argument("--length", type=int, default=512, help="tokens per row (default: 512)")
    parser.add_argument("--anchors", type=int, default=16, help="blocks per row (default: 16)")
    parser.add_argument("--gamma", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--objective", default="ce")
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--accumulate", type=int, help="parts (default: one row each)")
    parser.add_argument("--no-remat", action="store_true")
    parser.add_argument("--run", action="store_true", help="take one step, and measure")
    arguments = parser.parse_args()
    parts = arguments.rows if arguments.accumulate is None else arguments.accumulate
    config = ModelConfig(
        vocab_size=32064,
        hidden_size=3072,
        intermediate_size=8192,
        num_layers=arguments.layers,
        num_heads=32,
        num_kv_heads=32,
        head_dim=96,
        max_position_embeddings=4096,
        dtype="bfloat16",
    )
    draft = DraftConfig(symmetric_skip(config.num_layers, config.num_layers // 2), arguments.gamma)
    params = abstract_params(config)
    if arguments.run:
        params = jax.tree.map(lambda x: jnp.full(x.shape, 0.01, x.dtype), params)
    make_task = functools.partial(
        DraftTask,
        config,
        draft_config=draft,
        objective=ObjectiveConfig(arguments.objective, anchors=arguments.anchors),
        adapter=AdapterConfig(arguments.rank),
        remat=not arguments.no_remat,
    )
    task = make_task(params=params)
    loop = LoopConfig(
        OptimizerConfig(10, arguments.optimizer),
        batch_size=arguments.rows,
        accumulate=parts,
    )
    shape = (arguments.rows, arguments.length)
    batch = {"tokens": np.ones(shape, np.int32), "learn": np.ones(shape, bool)}
    state = jax.eval_shape(lambda p: begin(make_task(params=p), loop), params)
    program = make_step(task, loop).lower(state, params, batch).compile()
    plan = program.memory_analysis()
    per_part = arguments.rows // parts
    tokens = per_part * arguments.anchors * arguments.gamma
    # Logits of the drafted tokens and their gradients; "kl" and "tv" also use the target's.
    logits = 2 * tokens
    if arguments.objective != "ce":
        logits += per_part * arguments.length + tokens
    slots = per_part * (arguments.length + arguments.anchors * arguments.gamma)
    slot = 2 * config.num_kv_heads * config.head_dim * 2 * config.num_layers  # keys, values; bytes
    expected = {
        "frozen target": gigabytes(params),
        "draft, average, optimizer": gigabytes(state),
        # The sum, and the gradients of one part.
        "gradients": (1 if parts == 1 else 2) * gigabytes(state.tree),
        "keys and values": slots * slot / 1e9,
        "logits": 4 * logits * config.vocab_size / 1e9,
    }
    print(f"{jax.devices()[0].device_kind}: {arguments}")
    for name, size in expected.items():
        print(f"{name:28} {size:8.3f} GB by formula")
    if plan is not None:
        print(f"{'arguments':28} {plan.argument_size_in_bytes / 1e9:8.3f} GB by XLA")
        print(f"{'temporaries':28} {plan.temp_size_in_bytes / 1e9:8.3f} GB by XLA")
    if arguments.run:
        before = peak_memory_bytes()
        result, metrics = program(begin(task, loop), params, batch)
        loss = float(metrics["loss"])
        print(f"{'peak before the step':28} {before / 1e9:8.3f} GB measured")
        print(f"{'peak':28} {peak_memory_bytes() / 1e9:8.3f} GB measured (loss {loss:.3f})")
        del result


if __name__ == "__main__":
    try:
        main()
    except S3DError as error:
        sys.exit(f"error: {error}")
