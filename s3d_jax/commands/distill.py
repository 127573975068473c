"""The command `s3d distill`."""

import argparse
import sys
from pathlib import Path
from typing import Any

from s3d_jax.commands.generation import ModelOptions
from s3d_jax.settings.arguments import RAW, add_options, build, given, refuse
from s3d_jax.settings.training import DistillConfig, PromptsConfig

_EPILOG = """\
example:
  s3d distill --model models/m --prompts texts.txt --limit 2000 --out own.jsonl"""


def add_command(commands: Any) -> None:
    """Adds `distill` to the subparsers of `s3d`."""
    parser = commands.add_parser(
        "distill",
        help="write a model's own continuations, to train its draft on",
        description="Continues the beginnings of texts, and chats, and writes the outcome as "
        "jsonl\nfor s3d train. A call that was interrupted resumes when it is repeated.",
        epilog=_EPILOG,
        formatter_class=RAW,
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="native checkpoint folder")
    parser.add_argument(
        "--prompts",
        required=True,
        action="append",
        metavar="FILE",
        help="texts or chats, as for s3d train; a chat may end with the user's turn; may be "
        "repeated",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="the .jsonl file")
    for settings in (PromptsConfig, DistillConfig):
        add_options(parser, settings)
    add_options(parser, ModelOptions, ["draft", "dtype", "mesh", "kv_cache"])
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace --out, and what a call with other options left unfinished",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Writes the continuations."""
    import zlib

    import numpy as np

    from s3d_jax.drafters.stored import DEFAULT_NAME, draft_names
    from s3d_jax.lm import load
    from s3d_jax.texts.documents import read_documents
    from s3d_jax.train.distill import distill, prompts_of

    selection, config = build(PromptsConfig, arguments), build(DistillConfig, arguments)
    if selection.whole_prompts:
        reason = "--whole-prompts takes texts whole: leave out --prompt-tokens"
        refuse(arguments, reason, {PromptsConfig: ["prompt_tokens"]})
    options, names = given(ModelOptions, arguments), draft_names(arguments.model)
    # A draft changes the speed alone, so none of several has to be chosen.
    use_draft = "draft" in options or len(names) < 2 or DEFAULT_NAME in names
    lm = load(arguments.model, **options, use_draft=use_draft, progress=True)
    documents = read_documents(arguments.prompts, lm.tokenizer, None, prompts=True)
    order = np.random.default_rng(config.seed).permutation(len(documents))
    prompts = prompts_of([documents[i] for i in order], selection)
    used = lm.draft_name
    parts = ["config.json", "weights.json", *([f"drafts/{used}/config.json"] if used else [])]
    folder = Path(arguments.model)
    path = distill(
        lm,
        prompts,
        arguments.out,
        config,
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
