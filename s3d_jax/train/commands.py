"""The commands `s3d train`, `s3d pretrain` and `s3d distill`."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s3d_jax.errors import InputError

if TYPE_CHECKING:
    from s3d_jax.config import DraftConfig, ModelConfig
    from s3d_jax.train.loop import LoopConfig
    from s3d_jax.train.objective import ObjectiveConfig
    from s3d_jax.train.runs import ValidationConfig

# Options whose being given matters: None in argparse, and later what stands here.
_DRAFT = {
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
_DECODED = {"valid_prompts": 32, "valid_tokens": 128, "prompt_tokens": 16}
_SIZES = {"vocab_size": 4096, "layers": 8, "width": 256, "heads": 8, "kv_heads": 4}

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


def add_commands(commands: Any) -> None:
    """Adds the three commands to the parser of `s3d`."""
    _add_train(commands)
    _add_pretrain(commands)
    _add_distill(commands)


def _add_train(commands: Any) -> None:
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
        help="go on from this draft of the model, with its skip, gamma, block attention and ranks",
    )
    parser.add_argument("--out", metavar="DIR", help="mode full: the new checkpoint")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the frozen target (default: as stored)",
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
    parser.set_defaults(run=_train)


def _add_pretrain(commands: Any) -> None:
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
    for name, default in _SIZES.items():
        group.add_argument(_flag(name), type=int, metavar="N", help=f"default: {default}")
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
    parser.set_defaults(run=_pretrain)


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
        ("--save-every", int, 200, "steps between states"),
        ("--keep-states", int, 2, "states that stay on disk"),
        ("--validate-every", int, 200, "steps between validations"),
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
            _flag(name), type=int, metavar="N", help=f"{text} (default: {_DECODED[name]})"
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


def _add_distill(commands: Any) -> None:
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
    parser.set_defaults(run=_distill)


def _train(arguments: argparse.Namespace) -> int:
    from s3d_jax.checkpoint import read_header
    from s3d_jax.train.draft import AdapterConfig
    from s3d_jax.train.runs import train_draft

    mode, weight = arguments.mode, arguments.next_token_weight
    if mode != "adapter":
        _refuse(arguments, ("rank", "bridge_rank"), f"belong to --mode adapter, not {mode}")
    if mode != "full":
        _refuse(arguments, ("next_token_weight",), f"belongs to --mode full, not {mode}")
    if arguments.start is not None:
        names = ("gamma", "skip", "block_attention", "rank", "bridge_rank")
        _refuse(arguments, names, "--start takes what that draft has")
    _check_run(arguments)
    _settle(arguments, _DRAFT | _DECODED)
    if arguments.learning_rate is None:
        arguments.learning_rate = 3e-4 if mode == "full" else 2e-3
    config = read_header(arguments.model).config
    report = train_draft(
        arguments.model,
        arguments.data,
        arguments.run_folder,
        _loop(arguments),
        name=arguments.name,
        out=arguments.out,
        mode=arguments.mode,
        draft=_draft(arguments, config),
        objective=_objective(arguments),
        adapter=AdapterConfig(arguments.rank, arguments.bridge_rank),
        start=arguments.start,
        valid=arguments.valid,
        validation=_validation(arguments),
        row_length=arguments.row_length,
        next_token_weight=1.0 if weight is None else weight,
        dtype=arguments.dtype,
        remat=arguments.remat,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        progress=True,
    )
    before, after = report["before"], report["reached"]
    print(
        f"tokens per iteration: {before['tokens_per_iteration']:.2f} before, "
        f"{after['tokens_per_iteration']:.2f} now"
    )
    print("accepted by position:", *(f"{x:.2f}" for x in after["acceptance_per_position"]))
    if "perplexity" in after:
        print(f"perplexity: {before['perplexity']:.3f} before, {after['perplexity']:.3f} now")
    print(f"draft {arguments.name!r} is in {arguments.out or arguments.model}")
    return 0


def _pretrain(arguments: argparse.Namespace) -> int:
    from s3d_jax.train.draft import AdapterConfig
    from s3d_jax.train.runs import pretrain

    if not arguments.joint_draft:
        names = (*_DRAFT, "draft_weight", *_DECODED)
        _refuse(arguments, names, "without --joint-draft there is no draft")
    if arguments.config is not None:
        names = (*_SIZES, "mlp_width", "dtype")
        _refuse(arguments, names, "--config says that already")
    _check_run(arguments)
    defaults = {"draft_weight": 0.2, "row_length": 256, "dtype": "bfloat16"}
    _settle(arguments, _DRAFT | _DECODED | _SIZES | defaults)
    config = _model_config(arguments)
    report = pretrain(
        arguments.data,
        arguments.out,
        arguments.run_folder,
        config,
        _loop(arguments),
        tokenizer=arguments.tokenizer,
        draft=_draft(arguments, config) if arguments.joint_draft else None,
        draft_weight=arguments.draft_weight,
        objective=_objective(arguments),
        adapter=AdapterConfig(arguments.rank, arguments.bridge_rank),
        row_length=arguments.row_length,
        compute_dtype=arguments.compute_dtype,
        valid=arguments.valid,
        validation=_validation(arguments),
        remat=arguments.remat,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        progress=True,
    )
    reached = report["reached"]
    print(f"held-out loss: {reached['next_token_loss']:.3f} per token")
    if "tokens_per_iteration" in reached:
        print(f"tokens per iteration: {reached['tokens_per_iteration']:.2f}")
    print(f"the model is in {arguments.out}")
    return 0


def _distill(arguments: argparse.Namespace) -> int:
    import zlib

    import numpy as np

    from s3d_jax.drafts import DEFAULT, choose_draft, draft_names
    from s3d_jax.generate import load
    from s3d_jax.train.data import read_documents
    from s3d_jax.train.distill import distill, prompts_of

    _check_least(arguments, limit=1, prompt_tokens=1, seed=0)
    if arguments.whole_prompts and arguments.prompt_tokens is not None:
        raise InputError("--whole-prompts takes texts whole: leave out --prompt-tokens")
    length = None if arguments.whole_prompts else arguments.prompt_tokens or 16
    name, names = arguments.draft, draft_names(arguments.model)
    # Any draft does, so nobody has to say which.
    use_draft = name is not None or len(names) < 2 or DEFAULT in names
    lm = load(
        arguments.model, dtype=arguments.dtype, draft=name, use_draft=use_draft, progress=True
    )
    documents = read_documents(arguments.prompts, lm.tokenizer, None, prompts=True)
    order = np.random.default_rng(arguments.seed).permutation(len(documents))
    prompts = prompts_of([documents[i] for i in order], arguments.limit, length)
    used = choose_draft(arguments.model, name) if use_draft else None
    parts = ["config.json", "weights.json", *([f"drafts/{used}/config.json"] if used else [])]
    folder = Path(arguments.model)
    path = distill(
        lm,
        prompts,
        arguments.out,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
        sampled_fraction=arguments.sampled_fraction,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
        identity={
            "model": str(folder.resolve()),
            "dtype": lm.config.dtype,
            "crc32": {part: zlib.crc32((folder / part).read_bytes()) for part in parts},
        },
        overwrite=arguments.overwrite,
        progress=True,
    )
    print(f"{len(prompts)} continuations are in {path}", file=sys.stderr)
    return 0


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _refuse(arguments: argparse.Namespace, names: Sequence[str], reason: str) -> None:
    """Raises InputError for options that were given and would have no effect."""
    values = {name: getattr(arguments, name) for name in names}
    given = [_flag(k) for k, v in values.items() if v is not None and v is not False]  # 0 is given
    if given:
        raise InputError(f"{', '.join(given)}: {reason}")


def _settle(arguments: argparse.Namespace, defaults: Mapping[str, Any]) -> None:
    """Fills in what was not given."""
    for name, default in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)


def _check_least(arguments: argparse.Namespace, **least: int) -> None:
    """Raises InputError for options that were given and are below their least value."""
    for name, value in least.items():
        given = getattr(arguments, name)
        if given is not None and not given >= value:
            raise InputError(f"{_flag(name)} must be at least {value}, got {given}")


def _check_run(arguments: argparse.Namespace) -> None:
    """What the settings that are made of these options do not check, or under other names."""
    _check_least(arguments, row_length=2, **dict.fromkeys(_DECODED, 1))
    for name in ("draft_weight", "next_token_weight"):
        if hasattr(arguments, name):
            _check_least(arguments, **{name: 0})
    if arguments.skip is not None and not arguments.skip.strip():
        _refuse(arguments, ("bridge_rank",), "no layer is skipped, so there is no gap to bridge")
    share = arguments.held_out
    if share is not None and arguments.valid:
        raise InputError("--held-out is of the data, and --valid names files: give one of them")
    if share is not None and not 0 < share < 1:
        raise InputError(f"--held-out must be between 0 and 1, got {share}")


def _loop(arguments: argparse.Namespace) -> "LoopConfig":
    from s3d_jax.train.loop import LoopConfig
    from s3d_jax.train.optimizer import OptimizerConfig

    return LoopConfig(
        OptimizerConfig(
            steps=arguments.steps,
            optimizer=arguments.optimizer,
            learning_rate=arguments.learning_rate,
            schedule=arguments.schedule,
            warmup_steps=arguments.warmup_steps,
            weight_decay=arguments.weight_decay,
            clip_norm=arguments.clip_norm,
        ),
        batch_size=arguments.batch_size,
        accumulate=arguments.accumulate,
        ema_decay=arguments.ema_decay,
        seed=arguments.seed,
        log_every=arguments.log_every,
        save_every=arguments.save_every,
        validate_every=arguments.validate_every,
        keep_states=arguments.keep_states,
    )


def _objective(arguments: argparse.Namespace) -> "ObjectiveConfig":
    from s3d_jax.train.objective import ObjectiveConfig

    return ObjectiveConfig(
        arguments.objective,
        arguments.decay,
        arguments.anchors,
        hop=not arguments.random_anchors,
    )


def _validation(arguments: argparse.Namespace) -> "ValidationConfig":
    from s3d_jax.train.runs import ValidationConfig

    return ValidationConfig(
        prompts=arguments.valid_prompts,
        prompt_tokens=arguments.prompt_tokens,
        new_tokens=arguments.valid_tokens,
        **({} if arguments.held_out is None else {"held_out": arguments.held_out}),
    )


def _draft(arguments: argparse.Namespace, config: "ModelConfig") -> "DraftConfig":
    from s3d_jax.config import DraftConfig, symmetric_skip

    layers = config.num_layers
    skip = symmetric_skip(layers, layers // 2)
    if arguments.skip is not None:
        skip = parse_skip(arguments.skip, layers)
    return DraftConfig(skip, arguments.gamma, arguments.block_attention)


def parse_skip(text: str, num_layers: int) -> tuple[bool, ...]:
    """A skip mask from "2-5", "2,3,6" or "" (none is skipped).

    Raises:
        InputError: it is none of these, or names a layer that the model has not.
    """
    skipped: set[int] = set()
    try:
        for part in filter(None, text.replace(" ", "").split(",")):
            first, dash, last = part.partition("-")
            layers = range(int(first), int(last if dash else first) + 1)
            if not layers:
                raise ValueError(f"{part} is no range")
            skipped.update(layers)
    except ValueError as error:
        raise InputError(f'--skip takes layers like "2-5" or "2,3,6", got {text!r}') from error
    if skipped and not 0 <= min(skipped) <= max(skipped) < num_layers:
        raise InputError(f"--skip {text}: the model has the layers 0 to {num_layers - 1}")
    return tuple(i in skipped for i in range(num_layers))


def _model_config(arguments: argparse.Namespace) -> "ModelConfig":
    from s3d_jax.config import ModelConfig

    if arguments.config is not None:
        path = Path(arguments.config)
        try:
            return ModelConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read {path}: {error}") from error
    _check_least(arguments, vocab_size=1, layers=1, width=1, heads=1, kv_heads=1, mlp_width=1)
    width, heads = arguments.width, arguments.heads
    if width % heads:
        raise InputError(f"--width {width} must be a multiple of --heads {heads}")
    return ModelConfig(
        vocab_size=arguments.vocab_size,
        hidden_size=width,
        intermediate_size=arguments.mlp_width or 3 * width,
        num_layers=arguments.layers,
        num_heads=heads,
        num_kv_heads=arguments.kv_heads,
        head_dim=width // heads,
        max_position_embeddings=2 * arguments.row_length,
        tie_embeddings=True,
        dtype=arguments.dtype,
    )
