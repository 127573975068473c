"""What a mesh would do for Llama-2-7B and 70B: bytes per device, and speeds on paper.

    python benchmarks/sharding.py [--latency 10] [--tau 2.5]
    python benchmarks/sharding.py --compiled      # collectives of compiled programs, on eight CPUs

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
import collections
import math
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

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


class Sent(NamedTuple):
    """A collective of a compiled program.

    Attributes:
        how: "all-reduce", "all-gather", …
        what: types and shapes of its results, as HLO writes them.
        where: the operation that it is for, as jax names it.
    """

    how: str
    what: str
    where: str

    @property
    def sizes(self) -> list[int]:
        """Numbers in each of its results."""
        shapes = re.findall(r"\[([\d,]*)\]", self.what)
        return [math.prod(int(n) for n in shape.split(",") if n) for shape in shapes]


_SENT = re.compile(
    r"= (?P<what>.*?) (?P<how>all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)"
    r"(-start)?\(.*op_name=\"(?P<where>[^\"]*)\""
)


def collectives(text: str) -> list[Sent]:
    """The collectives of the text of a compiled program."""
    matches = [found for line in text.splitlines() if (found := _SENT.search(line))]
    assert len(matches) >= len(re.findall(r" all-(?:reduce|gather)(?:-start)?\(", text))
    return [Sent(found["how"], found["what"], found["where"]) for found in matches]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--compiled",
        action="store_true",
        help="what tiny programs of decoding and of training send, read from the compiled ones",
    )
    parser.add_argument("--latency", type=float, default=10.0, help="µs of an all-reduce (assumed)")
    parser.add_argument("--context", type=int, default=2048, help="tokens in the cache")
    parser.add_argument("--gamma", type=int, default=4)
    parser.add_argument("--tau", type=float, default=2.5, help="tokens per iteration (assumed)")
    parser.add_argument("--kept", type=float, default=0.5, help="layers that the draft keeps")
    options = parser.parse_args()
    if options.compiled:
        return show_compiled()
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


TINY = ModelConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=96,
    num_layers=4,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    max_position_embeddings=128,
)


def show_compiled() -> None:
    """Prints the collectives of decoding loops and of training steps."""
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    )
    print(f"tiny programs for CPUs: {TINY.num_layers} layers in float32, of which a draft runs 2\n")
    print("| program | mesh | collective | in | times | numbers in all |")
    print("|---|---|---|---|---|---|")
    for mesh in ("model=4", "data=2,model=2"):
        for name, text in _decoding(mesh):
            _print(name, mesh, text)
    for mesh in ("data=4", "data=2,model=2"):
        _print("step of a draft", mesh, _training(mesh))


def _print(program: str, mesh: str, text: str) -> None:
    counts: dict[tuple[str, str], list[int]] = collections.defaultdict(list)
    for sent in collectives(text):
        counts[sent.how, _place(sent.where)].append(sum(sent.sizes))
    for (how, place), sizes in sorted(counts.items()):
        print(f"| {program} | {mesh} | {how} | {place} | {len(sizes)} | {sum(sizes):,} |")


def _place(where: str) -> str:
    """Which part of the model an operation belongs to, in words; all layers together."""
    backward = ", backward" if "transpose(" in where else ""
    found = re.search(r"layers_\d+/(\w+/\w+)|(embed|lm_head)\b", where)
    return ((found[1] or found[2]) if found else "elsewhere") + backward


def _decoding(mesh: str) -> Iterator[tuple[str, str]]:
    """(name, compiled text) of the loops of plain decoding and of S3D."""
    import jax

    from s3d_jax.engine import programs
    from s3d_jax.keys import make_key
    from s3d_jax.lm import LM
    from s3d_jax.nn.sharding import build_mesh, put
    from s3d_jax.nn.transformer import init_params
    from s3d_jax.storage.trees import unflatten

    devices, found = build_mesh(mesh), {}
    config = TINY.replace(shards=devices.shape["model"])
    arrays = flatten(jax.device_get(init_params(TINY, make_key(0))))
    placed = {path: put(devices, config, path, x) for path, x in arrays.items()}
    lm, begin = LM(config, unflatten(placed)), programs.Program.__init__

    def compile_and_keep(self: Any, function: Any, static: Any, arrays: Any) -> None:
        begin(self, function, static, arrays)
        if function.__name__ == "decode":
            drafter = static["spec"].drafter
            name = "AR" if drafter is None else "S3D"
            found[f"loop of {name}"] = self._compiled.as_text()

    programs.Program.__init__ = compile_and_keep  # type: ignore[method-assign]
    try:
        for method in ("ar", "s3d"):
            options = {} if method == "ar" else {"adaptive": False}
            lm.generate([[1, 2, 3], [4, 5]], max_new_tokens=4, method=method, **options)
    finally:
        programs.Program.__init__ = begin  # type: ignore[method-assign]
    yield from found.items()


def _training(mesh: str) -> str:
    """The compiled text of a step that trains the adapters of a draft."""
    import jax
    import numpy as np

    from s3d_jax.lm import default_draft
    from s3d_jax.mesh import on_mesh
    from s3d_jax.settings.training import LoopConfig
    from s3d_jax.train.draft import DraftTask
    from s3d_jax.train.loop import begin, make_step
    from s3d_jax.train.placement import Placement, mesh_for

    loop = LoopConfig(batch_size=8)
    devices = mesh_for(mesh, TINY, loop)
    assert devices is not None
    config = TINY.replace(shards=devices.shape["model"], over_data=True)
    place = Placement(devices, config)

    def shapes(tree: Any) -> Any:
        return jax.tree.map(
            lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), tree, place.of(tree)
        )

    params = shapes(abstract_params(config))

    def state(frozen: Any) -> Any:
        return begin(DraftTask(config, frozen, default_draft(config)), loop)

    batch = {"tokens": np.zeros((8, 32), np.int32), "learn": np.ones((8, 32), bool)}
    task = DraftTask(config, params, default_draft(config))
    with on_mesh(devices):
        lowered = make_step(task, loop, place).lower(
            shapes(jax.eval_shape(state, params)), params, place.batch(batch)
        )
    return lowered.compile().as_text()


if __name__ == "__main__":
    main()
