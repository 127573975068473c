"""A Phi-3-mini of full size with random weights: the memory and time to convert it and to run it.

    python benchmarks/synthetic_phi3.py [--layers N] [--data DIR] [--folder DIR] [--json FILE]

Writes 7.6 GB of bfloat16, in the shards of the real index, then converts them in a process of its
own, which is compared with a plain copy of the same files, and loads the result in another one for
a prefill and some S3D steps. Needs 16 GB of disk, and is through when the disk has moved 40 GB;
--layers 2 needs 1.3 GB. Memory is the peak of the resident set above the interpreter's own.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert.plan import dry_run
from convert.sources.open import open_origin
from convert.sources.safetensors import SafetensorsWriter
from convert.target import ConversionTarget
from s3d_jax.settings.arguments import prepare_streams

CONFIG = "configs/Phi-3-mini-4k-instruct.config.json"
INDEX = "weight_index/Phi-3-mini-4k-derived-merge.model.safetensors.index.json"
DATA = Path(os.environ.get("S3D_TEST_DATA", "../shared/data"))
CONVERT_LIMIT, RUN_LIMIT = 2.0e9, 1.5e9  # of memory: in all; beside weights and cache

# Linux's getrusage would count what the parent had when it started the process.
PEAK = """
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
before = peak()
import json, sys
"""
CONVERT = f"""{PEAK}
import convert
convert.convert(sys.argv[1], sys.argv[2], parity=False, progress=False)
print(json.dumps({{"memory": peak() - before}}))
"""
RUN = f"""{PEAK}
import time, s3d_jax
start = time.perf_counter()
lm = s3d_jax.load(sys.argv[1])
loaded, memory = time.perf_counter() - start, peak() - before
prompt = [7 * i % lm.config.vocab_size for i in range(int(sys.argv[2]))]
stats = lm.generate([prompt], max_new_tokens=int(sys.argv[3]), eos_token_ids=())[0].stats
c = lm.config
slots = stats.prompt_tokens + stats.new_tokens + len(stats.accepted_per_position) + 1
print(json.dumps({{
    "load_seconds": loaded,
    "memory_loaded": memory,
    "memory": peak() - before,
    "weights": sum(x.nbytes for x in __import__("jax").tree.leaves(lm.params)),
    "cache": slots * c.num_layers * 2 * c.num_kv_heads * c.head_dim * 2,
    **{{k: v for k, v in stats.to_dict().items() if "seconds" in k or k == "iterations"}},
}}))
"""


def child(code: str, *arguments: object) -> dict[str, Any]:
    """Runs it in a new interpreter; what it prints, and the seconds it took."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, check=True
    )
    return json.loads(done.stdout) | {"seconds": time.perf_counter() - start}


def write_checkpoint(folder: Path, data: Path, layers: int) -> None:
    """Random weights in the files, and under the names, of the real index."""
    fields = json.loads((data / CONFIG).read_text()) | {"num_hidden_layers": layers}
    index = json.loads((data / INDEX).read_text())
    index["weight_map"] = names = {
        name: file
        for name, file in index["weight_map"].items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < layers
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    shapes = ConversionTarget.of(open_origin(folder, outline=True)).shapes
    block = np.random.default_rng(0).normal(0, 0.02, 1 << 24).astype(ml_dtypes.bfloat16)
    for file in sorted(set(names.values())):
        mine = [name for name in names if names[name] == file]
        writer = SafetensorsWriter(folder / file, {n: ("bfloat16", shapes[n]) for n in mine})
        for name in mine:
            is_norm = len(shapes[name]) == 1
            writer.write(name, np.resize(block, shapes[name]) + block.dtype.type(is_norm))
        writer.close()


def evict(folder: Path) -> None:
    """Puts the files on the disk, and out of the memory that the system keeps of them."""
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_seconds(folder: Path, out: Path) -> float:
    """A plain copy, to the disk and not to memory; removed again."""
    evict(folder)
    start = time.perf_counter()
    shutil.copytree(folder, out)
    evict(out)
    seconds = time.perf_counter() - start
    shutil.rmtree(out)
    return seconds


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    source, native = folder / "hf", folder / "native"
    write_checkpoint(source, arguments.data, arguments.layers)
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    planned = dry_run(source, native).memory
    copying = [copy_seconds(source, folder / "copy")]
    evict(source)
    converted = child(CONVERT, source, native)
    copying.append(copy_seconds(source, folder / "copy"))  # before and after: disks are moody
    shutil.rmtree(source)
    evict(native)
    run = child(RUN, native, arguments.prompt, arguments.new_tokens)
    return {
        "bytes": size,
        "copy": {"seconds": copying},
        "convert": converted | {"planned_memory": planned},
        "run": run | {"beside": run["memory"] - run["weights"] - run["cache"]},
    }


def main() -> int:
    prepare_streams()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=32, help="fewer for a try (default: 32)")
    parser.add_argument("--prompt", type=int, default=500, help="tokens (default: 500)")
    parser.add_argument("--new-tokens", type=int, default=8, help="by S3D (default: 8)")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with config and index")
    parser.add_argument(
        "--folder",
        type=Path,
        help="where to write, on the disk to be measured (default: temporary)",
    )
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    arguments = parser.parse_args()
    with working_folder(arguments.folder) as folder:
        report = measure(folder, arguments)
    print_report(report)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    memory, beside = report["convert"]["memory"], report["run"]["beside"]
    return 0 if memory <= CONVERT_LIMIT and beside <= RUN_LIMIT else 1


@contextlib.contextmanager
def working_folder(parent: Path | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="synthetic-phi3-", dir=parent) as folder:
        yield Path(folder)


def print_report(report: dict[str, Any]) -> None:
    size, convert, run = report["bytes"], report["convert"], report["run"]
    copies = report["copy"]["seconds"]

    def rate(seconds: float) -> str:
        return f"{seconds:.1f} s, {size / seconds / 1e6:.0f} MB/s"

    def gb(num_bytes: float) -> str:
        return f"{num_bytes / 1e9:.2f} GB"

    print(f"weights              {gb(size)}")
    print(f"plain copy           {' and '.join(map(rate, copies))}")
    print(f"conversion           {rate(convert['seconds'])}, start of the process included")
    print(
        f"  peak memory        {gb(convert['memory'])} (limit {gb(CONVERT_LIMIT)}; "
        f"--dry-run says {gb(convert['planned_memory'])})"
    )
    print(f"loading              {rate(run['load_seconds'])}")
    print(f"  peak memory        {gb(run['memory_loaded'])}")
    print(
        f"prefill, {run['iterations']} S3D steps  {run['prefill_seconds']:.1f} s, "
        f"{run['decode_seconds']:.1f} s, compilation {run['compile_seconds']:.1f} s"
    )
    print(
        f"  peak memory        {gb(run['memory'])}: weights {gb(run['weights'])}, cache "
        f"{gb(run['cache'])}, beside them {gb(run['beside'])} (limit {gb(RUN_LIMIT)})"
    )


if __name__ == "__main__":
    sys.exit(main())
