"""The command `s3d pretrain`."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from s3d_jax.commands.training import add_files, add_training, run_settings
from s3d_jax.errors import InputError
from s3d_jax.settings.arguments import RAW, add_options, build, refuse
from s3d_jax.settings.model import ModelConfig
from s3d_jax.settings.training import (
    AdapterConfig,
    DraftOptions,
    ObjectiveConfig,
    PretrainConfig,
    SizesConfig,
    ValidationConfig,
)

_EPILOG = """\
example:
  s3d pretrain --data stories.txt --out models/tiny --run runs/tiny --steps 2000 \\
      --vocab-size 2048 --layers 8 --width 192 --joint-draft"""

_LEARNING_RATE = 3e-3


def add_command(commands: Any) -> None:
    """Adds `pretrain` to the subparsers of `s3d`."""
    parser = commands.add_parser(
        "pretrain",
        help="train a small model from scratch",
        description="Trains a small model, and its byte-level BPE tokenizer, on texts.",
        epilog=_EPILOG,
        formatter_class=RAW,
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the native checkpoint")
    add_files(parser, "--out")
    add_options(parser, PretrainConfig, ["compute_dtype"])
    group = parser.add_argument_group("model")
    group.add_argument(
        "--config", metavar="FILE", help="a ModelConfig as JSON, instead of the sizes below"
    )
    add_options(group, SizesConfig)
    add_options(group, PretrainConfig, ["tokenizer"])
    add_training(parser, PretrainConfig, learning_rate=_LEARNING_RATE)
    group = parser.add_argument_group("joint training")
    group.add_argument(
        "--joint-draft",
        action="store_true",
        help="also teach the model to draft, and store that draft",
    )
    add_options(group, PretrainConfig, ["draft_weight"])
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Trains the model, and prints what it reached."""
    from s3d_jax.train.runs import pretrain

    if not arguments.joint_draft:
        fields = {
            DraftOptions: None,
            AdapterConfig: None,
            ObjectiveConfig: None,
            PretrainConfig: ["draft_weight"],
            ValidationConfig: ["prompts", "prompt_tokens", "new_tokens"],
        }
        refuse(arguments, "without --joint-draft there is no draft", fields)
    config = build(PretrainConfig, arguments, **run_settings(arguments, _LEARNING_RATE))
    model = _model_config(arguments, config.row_length)
    if arguments.joint_draft:
        draft = build(DraftOptions, arguments).config(model.num_layers)
        adapter = build(AdapterConfig, arguments)
        config = dataclasses.replace(config, draft=draft, adapter=adapter)
    report = pretrain(
        arguments.data,
        arguments.out,
        arguments.run_folder,
        model,
        config,
        valid=arguments.valid,
        mesh=arguments.mesh,
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


def _model_config(arguments: argparse.Namespace, row_length: int) -> ModelConfig:
    if arguments.config is None:
        return build(SizesConfig, arguments).model_config(row_length)
    refuse(arguments, "--config says that already", {SizesConfig: None})
    path = Path(arguments.config)
    try:
        return ModelConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
