"""The commands as tests call them: quick settings for a tiny model."""

from s3d_jax.commands import main as cli

FAST = """--steps 120 --batch-size 8 --row-length 32 --anchors 4 --validate-every 60
    --valid-prompts 8 --valid-tokens 24 --gamma 3 --learning-rate 1e-2"""
RANKS = ("--rank", "4", "--bridge-rank", "8")


def run(*arguments) -> int:
    return cli.main([str(a) for a in arguments])


def train(model, name, *arguments) -> int:
    files = ("--model", model / "model", "--data", model / "own.jsonl")
    own = {"full", "--rank", "--kind"}
    ranks = () if own & set(arguments) or name == "masks" else RANKS
    names = ("--run", model / f"run-{name}", "--name", name)
    return run("train", *files, *names, *FAST.split(), *arguments, *ranks)
