"""The package as people get it: light to import, and complete in the wheel."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "transformers", "orbax", "matplotlib", "huggingface_hub", "safetensors", "optax")


def python(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=os.environ | env
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_costs_little_more_than_jax_and_flax():
    """Measured, s of CPU time: jax 0.71, flax's linen too 0.94, `load` 0.95; `s3d_jax` alone 0.01.

    What flax adds is its own __init__, which any of its parts imports.
    """
    code = "import time; t = time.process_time(); {}; print(time.process_time() - t)"
    base = "import jax, flax.linen, flax.struct"
    seconds = {base: [], "from s3d_jax import load": [], "import s3d_jax": []}
    for _ in range(4):  # the least of each: the machine has other things to do
        for statement, values in seconds.items():
            values.append(float(python(code.format(statement))))
    libraries, ours, alone = (min(values) for values in seconds.values())
    assert 0.7 * libraries < ours < 1.3 * libraries
    assert alone < 0.2 * libraries


def test_no_package_is_imported_but_jax_and_flax():
    code = (
        "import sys, jax, flax.linen, flax.struct; known = set(sys.modules)\n"
        "from s3d_jax import LM, load\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - known}\n"
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    assert python(code).strip() == "['s3d_jax']"


def test_nothing_heavy_is_imported_before_it_is_used():
    code = (
        "import sys, s3d_jax; assert 'jax' not in sys.modules\n"
        "from s3d_jax import LM, load\n"
        f"print([m for m in {HEAVY} if m in sys.modules])"
    )
    assert python(code).strip() == "[]"
    assert (
        python(
            f"import sys, convert; print([m for m in {('jax', *HEAVY)} if m in sys.modules])"
        ).strip()
        == "[]"
    )


def test_public_names_are_there():
    import s3d_jax

    assert sorted(dir(s3d_jax)) == sorted([*s3d_jax.__all__, "__version__"])
    for name in s3d_jax.__all__:
        assert getattr(s3d_jax, name).__name__ == name


def test_the_installed_wheel_generates_text(data_dir, tmp_path):
    """Built, installed apart from the checkout, and run by its commands in another folder."""
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site]
    subprocess.run([*install, wheel], check=True)
    env = os.environ | {"PYTHONPATH": str(site)}

    def command(name: str, *arguments: str) -> str:
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, site / "bin" / name, *arguments],
            capture_output=True, text=True, cwd=tmp_path, env=env,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        print(f"{name}: {time.perf_counter() - start:.1f} s")
        return done.stdout

    where = "import s3d_jax, convert; print(s3d_jax.__file__, convert.__file__)"
    output = subprocess.run(
        [sys.executable, "-c", where], capture_output=True, text=True, cwd=tmp_path, env=env
    ).stdout
    assert output.count(str(site)) == 2
    assert all((site / package / "py.typed").exists() for package in ("s3d_jax", "convert"))
    output = command("s3d", "generate", "Once upon a time", "--max-new-tokens", "60", "--json")
    assert json.loads(output)["stats"]["tokens_per_iteration"] > 1.5  # by the model in the wheel
    command("s3d-convert", str(data_dir / "checkpoints" / "babyllama-1m"), "native", "--no-parity")
    options = ("--model", "native", "--max-new-tokens", "30", "--json")
    output = command("s3d", "generate", "Once upon a time", *options)
    assert json.loads(output)["text"] == ", there was a little girl named"[:30]
