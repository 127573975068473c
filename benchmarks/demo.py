"""The main job in one command: convert a checkpoint, then write the same text by AR and by S3D.

python benchmarks/demo.py [--model DIR]
"""

import argparse
import sys
import tempfile
from pathlib import Path

import convert
import s3d_jax

PROMPT = "Once upon a time"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="HF folder or hub id")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--max-new-tokens", type=int, default=200)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        native = Path(folder) / "model"
        print(f"converting {arguments.model} ...")
        convert.convert(arguments.model, native)
        lm = s3d_jax.load(native)
        rows = {}
        for method in ("ar", "s3d"):
            for _ in range(2):  # the first run of a program also wakes the threads up
                options = dict(max_new_tokens=arguments.max_new_tokens, method=method)
                rows[method] = lm.generate(arguments.prompt, **options)[0]
    print(f"\n{arguments.prompt}{rows['s3d'].text}\n")
    print(f"{'':5}{'tokens/s':>10}{'passes':>8}{'τ':>6}")
    for method, result in rows.items():
        stats = result.stats
        print(
            f"{method:5}{stats.tokens_per_second:10.0f}{stats.iterations:8}"
            f"{stats.tokens_per_iteration:6.2f}"
        )
    same = rows["ar"].tokens == rows["s3d"].tokens
    print(f"\nsame tokens by both: {'yes' if same else 'NO'}")
    print(
        "The draft is untrained: it accepts little, and S3D cannot be faster than AR with it yet."
    )
    return 0 if same else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except s3d_jax.S3DError as error:
        sys.exit(f"error: {error}")
