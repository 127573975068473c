"""The command `s3d draft`: hands drafts on, and takes them in."""

import argparse
from pathlib import Path
from typing import Any

from s3d_jax.settings.arguments import RAW

_EPILOG = """\
examples:
  s3d draft export default my-draft --model models/smollm2
  s3d draft export default my-draft --model models/smollm2 --gamma 3
  s3d draft add my-draft --model models/smollm2-int8
  s3d draft add owner/smollm2-draft --model models/smollm2"""


def add_command(commands: Any) -> None:
    """Adds `draft` to the subparsers of `s3d`."""
    parser = commands.add_parser(
        "draft",
        help="hand a trained draft on, or add one to a model",
        description="Takes a trained draft out of a model's folder, or adds one to it. A draft "
        "fits every\nmodel of the settings that it was trained for, in any precision.",
        epilog=_EPILOG,
        formatter_class=RAW,
    )
    kinds = parser.add_subparsers(title="what to do", required=True, metavar="export|add")
    export = kinds.add_parser("export", help="write a draft into a folder of its own")
    export.add_argument("name", metavar="NAME", help="the draft; s3d info lists them")
    export.add_argument("out", metavar="FOLDER", help="the folder to write; it must not exist")
    export.add_argument(
        "--gamma",
        type=int,
        metavar="N",
        help="draft tokens per iteration unless others are asked for; s3d bench shows which number "
        "is fastest (default: as trained)",
    )
    export.set_defaults(run=run_export)
    add = kinds.add_parser("add", help="add a draft from a folder or from the HF hub")
    add.add_argument("source", metavar="FOLDER_OR_ID", help="a folder, or an id on the hub")
    add.add_argument(
        "--name",
        help="its name in the model (default: default; of other kinds than s3d the kind)",
    )
    add.add_argument("--revision", help="branch, tag or commit on the hub (default: the main one)")
    add.add_argument("--overwrite", action="store_true", help="replace a draft of that name")
    add.set_defaults(run=run_add)
    for command in (export, add):
        command.add_argument(
            "--model", required=True, metavar="DIR", help="native checkpoint folder"
        )


def run_export(arguments: argparse.Namespace) -> int:
    """Writes a draft into a folder of its own."""
    from s3d_jax.drafters.portable import export_draft

    out, gamma = arguments.out, arguments.gamma
    draft = export_draft(arguments.model, arguments.name, out, gamma=gamma)
    print(f"{out}: draft {draft.name!r}, γ = {draft.config.gamma}, {draft.num_params:,} parameters")
    print(f"next: s3d draft add {out} --model DIR")
    return 0


def run_add(arguments: argparse.Namespace) -> int:
    """Adds a draft to a model."""
    from convert.sources import hub
    from s3d_jax.drafters.portable import FILES, add_draft
    from s3d_jax.drafters.stored import S3D, draft_kind
    from s3d_jax.settings.drafting import default_name

    folder = Path(arguments.source)
    if not folder.exists():
        folder = hub.fetch(arguments.source, arguments.revision, FILES)
    added = add_draft(folder, arguments.model, arguments.name, overwrite=arguments.overwrite)
    print(f"draft {added.name!r} is in {added}")
    kind = draft_kind(arguments.model, added.name)
    options = "" if kind == S3D else f" --method {kind}"
    if added.name != default_name(kind):
        options += f" --draft {added.name}"
    print(f'next: s3d generate "Once upon a time" --model {arguments.model}{options}')
    return 0
