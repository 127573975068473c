"""What `s3d train` and `s3d pretrain` have in common: their options, and settings from them."""

import argparse
from typing import Any

from s3d_jax.commands.hosts import add_hosts
from s3d_jax.settings.arguments import add_options, build, refuse
from s3d_jax.settings.training import (
    AdapterConfig,
    DraftOptions,
    LoopConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainDraftConfig,
    ValidationConfig,
)


def add_files(parser: argparse.ArgumentParser, overwrite: str) -> None:
    """Adds the options that name files; `overwrite` is the help of --overwrite."""
    parser.add_argument(
        "--data", required=True, action="append", metavar="FILE", help="may be repeated"
    )
    parser.add_argument(
        "--valid",
        action="append",
        default=[],
        metavar="FILE",
        help="held-out files (default: a share of the data)",
    )
    parser.add_argument(
        "--run",
        required=True,
        dest="run_folder",
        metavar="DIR",
        help="folder for states, metrics.jsonl and curves.png",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        type=int,
        default=False,
        const=True,
        metavar="STEP",
        help="resume the run in --run from its newest state, or from the state of STEP, which "
        "removes newer ones",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help=f"replace {overwrite}; a run in --run is never replaced",
    )


def add_training(parser: argparse.ArgumentParser, config: type, learning_rate: Any) -> None:
    """Adds the groups "training" and "draft"; `config` has a row length and `remat`."""
    group = parser.add_argument_group("training")
    add_options(group, OptimizerConfig, learning_rate=learning_rate)
    add_options(group, LoopConfig)
    add_options(group, config, ["row_length", "remat"])
    add_options(group, ValidationConfig)
    group.add_argument(
        "--mesh",
        metavar="AXES",
        help='several devices: "data=4" divides the rows of a step over 4, and weights and the '
        'optimizer\'s state with them; "data=2,model=2" also divides matrices and heads over 2 '
        "(default: one device)",
    )
    add_hosts(parser)
    group = parser.add_argument_group("draft")
    for settings in (DraftOptions, AdapterConfig, ObjectiveConfig):
        add_options(group, settings)


def run_settings(arguments: argparse.Namespace, learning_rate: float) -> dict[str, Any]:
    """The settings of a run that both commands have, by their names in the configs.

    Raises:
        InputError, ConfigError: options that exclude each other, or wrong values.
    """
    if arguments.valid:
        reason = "is a share of the data, and --valid names files: give one of them"
        refuse(arguments, reason, {ValidationConfig: ["held_out"]})
    merged = getattr(arguments, "draft_mode", None) == "merged"
    if merged or getattr(arguments, "skip", "some").strip() == "":
        reason = "no layer is skipped, so there is no gap to bridge"
        fields = {AdapterConfig: ["bridge_rank", "recall"], TrainDraftConfig: ["fit_rows"]}
        refuse(arguments, reason, fields)
    optimizer = build(OptimizerConfig, arguments, learning_rate=learning_rate)
    return {
        "loop": build(LoopConfig, arguments, optimizer=optimizer),
        "objective": build(ObjectiveConfig, arguments),
        "validation": build(ValidationConfig, arguments),
    }
