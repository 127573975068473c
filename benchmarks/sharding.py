"""What a mesh would do for Llama-2-7B and 70B: bytes per device, and speeds on paper.

    python benchmarks/sharding.py [--latency 10] [--tau 2.5]

Nothing is measured. Bytes are those of the layout that `load(mesh=...)` uses. The speeds follow
from four numbers of an H100 SXM, as NVIDIA publishes them, and from one assumption, the latency of
an all-reduce. A pass takes, one after the other,

    max(bytes of weights and cache per device / memory bandwidth,
        2 · parameters per device · tokens / arithmetic)
    + all-reduces · (latency + 2 (N-1)/N · bytes of the activations / link bandwidth)

with two all-reduces per layer and one for the embeddings (tests/mesh reads them from the compiled
programs). The launch of kernels, the head of the draft and the choice of tokens are left out.
"""

import argparse
from typing import NamedTuple

from s3d_jax.nn.cache import cache_bytes
from s3d_jax.nn.sharding import cache_share, share_bytes, without_devices
from s3d_jax.nn.transformer import abstract_params
from s3d_jax.settings.mesh import MeshShape
from s3d_jax.settings.model import ModelConfig
from s3d_jax.storage.trees import flatten

LLAMA = dict(vocab_size=32000, head_dim=128, dtype="bfloat16", max_position_embeddings=4096)
MODELS = {
    "Llama-2-7B": ModelConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        **LLAMA,
    ),
    "Llama-2-70B": ModelConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        **LLAMA,
    ),
}
# H100 SXM (NVIDIA's data sheet): memory 3.35 TB/s of 80 GB, dense bfloat16 989 TFLOP/s, NVLink
# 900 GB/s in both directions together.
MEMORY, ROOM, ARITHMETIC, LINK = 3.35e12, 80e9, 989e12, 450e9


class Share(NamedTuple):
    """Bytes of one device."""

    weights: int
    cache: int


def share(config: ModelConfig, devices: int, context: int) -> Share:
    """What each of so many devices along `model` holds of the model and one row's cache."""
    mesh = without_devices(MeshShape(model=devices))
    config = config.replace(shards=devices)
    weights = share_bytes(mesh, config, flatten(abstract_params(config)))
    return Share(weights, cache_share(mesh, config, 1, cache_bytes(config, context, None)))


def pass_seconds(
    config: ModelConfig,
    devices: int,
    tokens: int,
    context: int,
    latency: float,
    kept: float = 1.0,
) -> tuple[float, float]:
    """(all, communication alone): a pass of one row over some tokens and a part of the layers."""
    one = share(config, devices, context)
    reading = kept * (one.weights + one.cache) / MEMORY
    computing = kept * one.weights * tokens / ARITHMETIC  # 2 FLOP per parameter of 2 bytes
    sent = tokens * config.hidden_size * 2
    reductions = 2 * kept * config.num_layers + 1
    each = latency + 2 * (devices - 1) / devices * sent / LINK
    talking = reductions * each if devices > 1 else 0.0
    return max(reading, computing) + talking, talking


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latency", type=float, default=10.0, help="µs of an all-reduce (assumed)")
    parser.add_argument("--context", type=int, default=2048, help="tokens in the cache")
    parser.add_argument("--gamma", type=int, default=4)
    parser.add_argument("--tau", type=float, default=2.5, help="tokens per iteration (assumed)")
    parser.add_argument("--kept", type=float, default=0.5, help="layers that the draft keeps")
    options = parser.parse_args()
    latency, context = options.latency * 1e-6, options.context
    print(f"H100 SXM on paper; {options}\n")
    print(
        "| model | GPUs | weights, GB each | cache, MB each | all-reduces, ms per token |", end=""
    )
    print(" AR, tokens/s | S3D, tokens/s | S3D over AR |")
    print("|---|---|---|---|---|---|---|---|")
    for name, config in MODELS.items():
        for devices in (1, 2, 4, 8):
            one = share(config, devices, context)
            row = f"| {name} | {devices} | {one.weights / 1e9:.2f} | {one.cache / 1e6:.0f} |"
            if sum(one) > ROOM:
                print(f"{row} does not fit | | | |")
                continue
            ar, talking = pass_seconds(config, devices, 1, context, latency)
            draft, _ = pass_seconds(config, devices, options.gamma, context, latency, options.kept)
            verify, _ = pass_seconds(config, devices, options.gamma + 1, context, latency)
            s3d = options.tau / (draft + verify)
            print(f"{row} {talking * 1e3:.2f} | {1 / ar:.0f} | {s3d:.0f} | {s3d * ar:.3f} |")


if __name__ == "__main__":
    main()
