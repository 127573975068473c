"""The command `s3d train`."""

import argparse
import dataclasses
from typing import Any

from s3d_jax.commands.training import add_files, add_training, run_settings
from s3d_jax.settings.arguments import RAW, add_options, build, given, refuse
from s3d_jax.settings.drafting import DraftConfig, FeatureConfig, parse_skip
from s3d_jax.settings.training import AdapterConfig, DraftOptions, TrainDraftConfig

_DESCRIPTION = """\
Teaches a model to draft for itself, and stores the draft in its checkpoint, where s3d generate
finds it. The target is not changed (except in mode full), so S3D generates the same text as plain
decoding; training raises the share of the draft that is accepted.

kinds:
  s3d      the model itself drafts, all tokens in one pass (the default)
  eagle    a layer over the model's last hidden state drafts token by token
  medusa   a head for each position over that state
modes of kind s3d:
  adapter  mask embeddings, low-rank deltas on the layers that the draft runs, and a low-rank
           bridge over the skipped ones (the default); with --chain-rank a chain from each draft
           token to the next
  mask     the mask embeddings alone: cheapest, and only of use where few layers are skipped
  full     the layers that the draft runs, with the next-token loss added: changes the target,
           which is written to --out"""

_EPILOG = """\
data files (.gz too):
  .txt     texts, separated by <|endoftext|>
  .jsonl   {"text": ...}, {"messages": [...]} (the assistant's turns are learnt), or what
           s3d distill writes, which is the best data there is

examples:
  s3d distill --model models/m --prompts texts.txt --out own.jsonl
  s3d train --model models/m --data own.jsonl --run runs/m --steps 2000
  s3d train --model models/m --data own.jsonl --run runs/m --steps 2000 --resume
  s3d train --model models/m --data own.jsonl --run runs/m7 --gamma 7 --skip 2-5 --name g7"""

_OWN = (
    "kind",
    "mode",
    "name",
    "start",
    "out",
    "dtype",
    "vocabulary",
    "fit_rows",
    "next_token_weight",
)


def add_command(commands: Any) -> None:
    """Adds `train` to the subparsers of `s3d`."""
    parser = commands.add_parser(
        "train",
        help="train the draft of a model",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=RAW,
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="native checkpoint folder")
    add_files(parser, "the draft of that name (mode full: --out)")
    add_options(parser, TrainDraftConfig, _OWN)
    add_training(parser, TrainDraftConfig, learning_rate="2e-3, in mode full 3e-4")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Trains the draft, and prints what it reached."""
    from s3d_jax.drafters.stored import choose_draft, read_draft
    from s3d_jax.storage.native import read_header
    from s3d_jax.train.runs import train_draft

    model = read_header(arguments.model).config
    config = build(TrainDraftConfig, arguments)
    if config.mode != "adapter":
        reason = f"belong to --mode adapter, not {config.mode}"
        refuse(arguments, reason, {AdapterConfig: None, TrainDraftConfig: ["fit_rows"]})
    if config.mode != "full":
        reason = f"belongs to --mode full, not {config.mode}"
        refuse(arguments, reason, {TrainDraftConfig: ["next_token_weight"]})
    draft: DraftConfig | FeatureConfig
    adapter: AdapterConfig | None
    if config.kind != "s3d":
        reason = f"belong to --kind s3d, not {config.kind}"
        own = {AdapterConfig: None, DraftOptions: ["skip", "block_attention", "draft_mode"]}
        refuse(arguments, reason, own)
        chosen = given(DraftOptions, arguments)
        if config.start is not None and not chosen:
            choose_draft(arguments.model, config.start, config.kind)
            draft = read_draft(arguments.model, config.start, model, weights=False).config
        else:
            draft = FeatureConfig(**chosen)
        adapter = None
    elif config.start is None:
        draft = build(DraftOptions, arguments).config(model.num_layers)
        adapter = build(AdapterConfig, arguments)
    else:
        reason = "--start takes what that draft has"
        refuse(arguments, reason, {DraftOptions: ["block_attention", "draft_mode"]})
        choose_draft(arguments.model, config.start)  # says which drafts there are
        start = read_draft(arguments.model, config.start, model, weights=False)
        changed = given(DraftOptions, arguments)
        if "skip" in changed:
            changed["skip"] = parse_skip(changed["skip"], model.num_layers)
        draft = start.config.replace(**changed)
        adapter = build(AdapterConfig, arguments, rank=0, bridge_rank=0, chain_rank=0, recall=0)
    rate = 3e-4 if config.mode == "full" else 2e-3
    config = dataclasses.replace(
        config, draft=draft, adapter=adapter, **run_settings(arguments, learning_rate=rate)
    )
    report = train_draft(
        arguments.model,
        arguments.data,
        arguments.run_folder,
        config,
        valid=arguments.valid,
        mesh=arguments.mesh,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        progress=True,
    )
    before, after = report["before"], report["reached"]
    beginning = "as fitted" if config.fit_rows else "before"
    print(
        f"tokens per iteration: {before['tokens_per_iteration']:.2f} {beginning}, "
        f"{after['tokens_per_iteration']:.2f} now"
    )
    print("accepted by position:", *(f"{x:.2f}" for x in after["acceptance_per_position"]))
    if (count := report["vocabulary"]) is not None:
        coverage = report["vocabulary_coverage"]
        covered = "" if coverage is None else f"{coverage:.1%} of the held-out text; "
        print(
            f"{count:,} tokens can be drafted: {covered}with all tokens "
            f"{report['tokens_per_iteration_with_all_tokens']:.2f} per iteration"
        )
    if "perplexity" in after:
        print(f"perplexity: {before['perplexity']:.3f} before, {after['perplexity']:.3f} now")
    print(f"draft {config.draft_name!r} is in {config.out or arguments.model}")
    return 0
