"""The options of `s3d train`, `s3d pretrain` and `s3d distill`, and their words."""

import argparse
from typing import Any

# Options whose being given matters: None in argparse, and later what stands here.
DRAFT = {
    "gamma": 4,
    "skip": None,
    "block_attention": "causal",
    "rank": 16,
    "bridge_rank": 64,
    "objective": "ce",
    "decay": 0.85,
    "anchors": 16,
    "random_anchors": False,
}
DECODED = {"valid_prompts": 32, "valid_tokens": 128, "prompt_tokens": 16}
SIZES = {"vocab_size": 4096, "layers": 8, "width": 256, "heads": 8, "kv_heads": 4}

_RAW = argparse.RawDescriptionHelpFormatter

_TRAIN = """\
Teaches a model to draft for itself, and stores the draft in its checkpoint, where s3d generate
finds it. The target stays as it is (but in mode full), so the output of S3D stays that of plain
decoding; what grows is how much of the draft is accepted.

modes:
  adapter  mask embeddings, low-rank deltas on the layers that the draft runs, and a low-rank
           bridge over the skipped ones (the default)
  mask     the mask embeddings alone: cheapest, and only of use where few layers are skipped
  full     the layers that the draft runs, with the next-token loss beside: changes the target,
           which is written to --out"""

_TRAIN_EPILOG = """\
data files (.gz too):
  .txt     texts, separated by <|endoftext|>
  .jsonl   {"text": ...}, {"messages": [...]} (the assistant's turns are learnt), or what
           s3d distill writes, which is the best data there is

examples:
  s3d distill --model models/m --prompts texts.txt --out own.jsonl
  s3d train --model models/m --data own.jsonl --run runs/m --steps 2000
  s3d train --model models/m --data own.jsonl --run runs/m --steps 2000 --resume
  s3d train --model models/m --data own.jsonl --run runs/m7 --gamma 7 --skip 2-5 --name g7"""

_PRETRAIN_EPILOG = """\
example:
  s3d pretrain --data stories.txt --out models/tiny --run runs/tiny --steps 2000 \\
      --vocab-size 2048 --layers 8 --width 192 --joint-draft"""

_DISTILL_EPILOG = """\
example:
  s3d distill --model models/m --prompts texts.txt --limit 2000 --out own.jsonl"""


def flag(name: str) -> str:
    """The option of an argument's name: "row_length" is --row-length."""
    return "--" + name.replace("_", "-")


def add_train(commands: Any) -> argparse.ArgumentParser:
    """The parser of `s3d train`."""
    parser = commands.add_parser(
        "train", help="train the draft of a model", description=_TRAIN, epilog=_TRAIN_EPILOG,
        formatter_class=_RAW,
    )  # fmt: skip
    parser.add_argument("--model", required=True, metavar="DIR", help="native checkpoint folder")
    parser.add_argument(
        "--mode", choices=("adapter", "mask", "full"), default="adapter", help="default: adapter"
    )
    parser.add_argument("--name", default="default", help="of the draft (default: default)")
    parser.add_argument(
        "--start",
        metavar="NAME",
        help="go on from this draft of the model, with its skip and block attention; a higher "
        "--rank or --bridge-rank adds to it, and --gamma may be another",
    )
    parser.add_argument("--out", metavar="DIR", help="mode full: the new checkpoint")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the frozen target in training (default: as stored)",
    )
    _add_run(parser, steps=2000, rate=None)
    parser.add_argument(
        "--overwrite", action="store_true",
        help="replace the draft of that name (mode full: --out); a run in --run is never replaced",
    )  # fmt: skip
    group = _add_draft(parser)
    group.add_argument(
        "--next-token-weight", type=float, metavar="W",
        help="mode full: of the target's own loss beside the draft's (default: 1.0)",
    )  # fmt: skip
    return parser


def add_pretrain(commands: Any) -> argparse.ArgumentParser:
    """The parser of `s3d pretrain`."""
    parser = commands.add_parser(
        "pretrain",
        help="train a small model from nothing",
        description="Trains a small model, and its byte-level BPE tokenizer, on texts.",
        epilog=_PRETRAIN_EPILOG,
        formatter_class=_RAW,
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the native checkpoint")
    group = parser.add_argument_group("model")
    group.add_argument(
        "--config", metavar="FILE", help="a ModelConfig as JSON, instead of the sizes below"
    )
    for name, default in SIZES.items():
        group.add_argument(flag(name), type=int, metavar="N", help=f"default: {default}")
    group.add_argument("--mlp-width", type=int, metavar="N", help="default: 3 times the width")
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the checkpoint (default: bfloat16); the trained weights are float32",
    )
    group.add_argument("--tokenizer", metavar="DIR", help="use this one instead of training one")
    _add_run(parser, steps=2000, rate=3e-3)
    parser.add_argument(
        "--compute-dtype", choices=("float32", "bfloat16"), default="float32",
        help="of matrix products and activations; bfloat16 is mixed precision, faster where the "
        "device multiplies it faster (default: float32)",
    )  # fmt: skip
    parser.add_argument(
        "--overwrite", action="store_true",
        help="replace --out; a run in --run is never replaced",
    )  # fmt: skip
    _add_draft(parser)
    group = parser.add_argument_group("joint training")
    group.add_argument(
        "--joint-draft",
        action="store_true",
        help="also teach the model to draft, and store that draft",
    )
    group.add_argument("--draft-weight", type=float, metavar="W", help="of its loss (default: 0.2)")
    return parser


def _add_run(parser: argparse.ArgumentParser, steps: int, rate: float | None) -> None:
    parser.add_argument(
        "--data", required=True, action="append", metavar="FILE", help="may be repeated"
    )
    parser.add_argument(
        "--valid", action="append", default=[], metavar="FILE",
        help="held-out files (default: a share of the data)",
    )  # fmt: skip
    parser.add_argument(
        "--held-out", type=float, metavar="X",
        help="share of the documents that is held out without --valid (default: 0.02)",
    )  # fmt: skip
    parser.add_argument(
        "--run", required=True, dest="run_folder", metavar="DIR",
        help="folder for states, metrics.jsonl and curves.png",
    )  # fmt: skip
    parser.add_argument(
        "--resume", nargs="?", type=int, default=False, const=True, metavar="STEP",
        help="go on with the run in --run from its newest state, or from that of STEP, which "
        "removes newer ones",
    )  # fmt: skip
    group = parser.add_argument_group("training")
    rate_help = f"default: {rate}" if rate else "default: 2e-3, in mode full 3e-4"
    group.add_argument("--steps", type=int, default=steps, metavar="N", help=f"default: {steps}")
    group.add_argument("--learning-rate", type=float, default=rate, metavar="R", help=rate_help)
    group.add_argument(
        "--optimizer", choices=("adamw", "adafactor", "lion"), default="adamw",
        help="default: adamw",
    )  # fmt: skip
    group.add_argument(
        "--schedule", choices=("cosine", "linear", "constant"), default="cosine",
        help="after the warm-up (default: cosine)",
    )  # fmt: skip
    numbers = (
        ("--warmup-steps", int, 50, "steps of growing learning rate"),
        ("--weight-decay", float, 0.0, "on matrices"),
        ("--clip-norm", float, 1.0, "of the gradient"),
        ("--ema-decay", float, 0.99, "of the running average that is kept; 0: none"),
        ("--batch-size", int, 16, "rows per step"),
        ("--accumulate", int, 1, "parts that a batch is worked off in, to save memory"),
        ("--seed", int, 0, "of everything random"),
        ("--save-every", int, 200, "steps between states; 0: one at the end"),
        ("--keep-states", int, 2, "states that stay on disk"),
        ("--validate-every", int, 200, "steps between validations; 0: at both ends"),
        ("--log-every", int, 10, "steps between lines of metrics.jsonl"),
    )
    for name, kind, default, text in numbers:
        group.add_argument(
            name, type=kind, default=default, metavar="X" if kind is float else "N",
            help=f"{text} (default: {default})",
        )  # fmt: skip
    row = "256" if rate else "chosen, so that nine in ten of the documents fit"
    group.add_argument(
        "--row-length", type=int, metavar="N", help=f"tokens per row (default: {row})"
    )
    for name, text in (
        ("valid_prompts", "prompts decoded in a validation"),
        ("valid_tokens", "tokens decoded per prompt"),
        ("prompt_tokens", "length of a prompt that is the beginning of a text"),
    ):
        group.add_argument(
            flag(name), type=int, metavar="N", help=f"{text} (default: {DECODED[name]})"
        )
    group.add_argument(
        "--remat", action="store_true",
        help="compute activations anew in the backward pass: less memory, more time",
    )  # fmt: skip


def _add_draft(parser: argparse.ArgumentParser) -> Any:
    group = parser.add_argument_group("draft")
    group.add_argument("--gamma", type=int, metavar="G", help="default: 4")
    group.add_argument(
        "--skip", metavar="LAYERS", help='skipped layers: "2-5", "2,3,6" (default: the middle half)'
    )
    group.add_argument(
        "--block-attention", choices=("causal", "bidirectional"),
        help="inside the draft block (default: causal)",
    )  # fmt: skip
    group.add_argument("--rank", type=int, metavar="R", help="of deltas (default: 16)")
    group.add_argument("--bridge-rank", type=int, metavar="R", help="of bridges (default: 64)")
    group.add_argument(
        "--objective", choices=("ce", "kl", "tv"),
        help="cross-entropy on the text (default), KL to the target, or total variation",
    )  # fmt: skip
    group.add_argument(
        "--decay", type=float, metavar="X", help="the i-th draft token weighs X^i (default: 0.85)"
    )
    group.add_argument("--anchors", type=int, metavar="N", help="blocks per row (default: 16)")
    group.add_argument(
        "--random-anchors", action="store_true",
        help="blocks at random places, not where decoding would begin them: one draft pass less",
    )  # fmt: skip
    return group


def add_distill(commands: Any) -> argparse.ArgumentParser:
    """The parser of `s3d distill`."""
    parser = commands.add_parser(
        "distill",
        help="write a model's own continuations, to train its draft on",
        description="Continues the beginnings of texts, and chats, and writes the outcome as "
        "jsonl\nfor s3d train. A call that was interrupted goes on when it is repeated.",
        epilog=_DISTILL_EPILOG,
        formatter_class=_RAW,
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="native checkpoint folder")
    parser.add_argument(
        "--prompts", required=True, action="append", metavar="FILE",
        help="texts or chats, as for s3d train; a chat may end with the user's turn; may be "
        "repeated",
    )  # fmt: skip
    parser.add_argument("--out", required=True, metavar="FILE", help="the .jsonl file")
    parser.add_argument(
        "--draft", metavar="NAME",
        help="which of the trained drafts makes it faster (default: the model's default one)",
    )  # fmt: skip
    parser.add_argument("--whole-prompts", action="store_true", help="texts are prompts as a whole")
    numbers = (
        ("--limit", int, None, "prompts at most", "all"),
        ("--prompt-tokens", int, None, "tokens of a text that are its prompt", 16),
        ("--max-new-tokens", int, 256, "tokens per continuation", 256),
        ("--batch-size", int, 32, "prompts at once", 32),
        ("--sampled-fraction", float, 0.5, "share that is sampled, not greedy", 0.5),
        ("--temperature", float, 1.0, "of the sampled ones", 1.0),
        ("--top-p", float, 1.0, "of the sampled ones", 1.0),
        ("--seed", int, 0, "of sampling, and of the choice of prompts", 0),
    )
    for name, kind, default, text, shown in numbers:
        parser.add_argument(
            name, type=kind, default=default, metavar="X" if kind is float else "N",
            help=f"{text} (default: {shown})",
        )  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of weights")
    parser.add_argument(
        "--overwrite", action="store_true",
        help="replace --out, and what a call with other options left unfinished",
    )  # fmt: skip
    return parser
