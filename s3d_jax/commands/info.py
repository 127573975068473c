"""The command `s3d info`."""

import argparse
import contextlib
import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from s3d_jax.commands.generation import ModelOptions, add_model
from s3d_jax.errors import InputError
from s3d_jax.settings.arguments import add_options, given
from s3d_jax.settings.drafting import shown_leaves

_CONTEXT = 2048  # tokens

if TYPE_CHECKING:
    from s3d_jax.engine.ledger import Ledger
    from s3d_jax.settings.drafting import DraftConfig
    from s3d_jax.settings.model import ModelConfig
    from s3d_jax.storage.native import Header


def add_command(commands: Any) -> None:
    """Adds `info` to the subparsers of `s3d`."""
    parser = commands.add_parser(
        "info",
        help="what a checkpoint is: shape, size, draft",
        description="Prints what a native checkpoint holds, without loading its weights. With "
        "one of the options below, also the memory that a generation will need, in each precision, "
        "and which of Colab's cards have it; this compiles programs, which takes seconds.",
    )
    add_model(parser)
    memory = parser.add_argument_group("memory")
    for flag, metavar, words in (
        ("--context", "N", "tokens of a row, half of them its prompt (default: 2048 at most)"),
        ("--batch", "B", "rows at once (default: 1)"),
        ("--gamma", "G", "draft tokens per iteration (default: the draft's own)"),
    ):
        memory.add_argument(flag, type=int, metavar=metavar, help=words)
    memory.add_argument("--method", choices=("s3d", "ar"), help="(default: s3d)")
    memory.add_argument("--draft", metavar="NAME", help="which of the trained drafts")
    parser.add_argument(
        "--mesh", metavar="AXES", help='what each device of a mesh holds: "model=4", as of generate'
    )
    add_options(parser, ModelOptions, ["kv_cache"])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints the facts."""
    from s3d_jax.decoding.sizes import PREFILL_BUCKETS
    from s3d_jax.drafters.stored import draft_names
    from s3d_jax.engine.ledger import CARDS
    from s3d_jax.lm import EMBEDDED, default_draft
    from s3d_jax.nn import transformer as model
    from s3d_jax.nn.cache import cache_bytes
    from s3d_jax.storage import native as checkpoint
    from s3d_jax.storage.tuning import read_entries, read_preferred

    header = checkpoint.read_header(arguments.model or EMBEDDED)
    config = header.config.replace(kv_cache=given(ModelOptions, arguments).get("kv_cache"))
    header = dataclasses.replace(header, config=config)
    drafts = {name: _draft_facts(header, name) for name in draft_names(header.path)}
    tuned, preferred = read_entries(header.path), read_preferred(header.path)
    parameters = model.num_params(config)
    weights = model.weight_bytes(config)
    cache = cache_bytes(config, 1, None)
    context = config.max_position_embeddings
    full_cache = cache_bytes(config, context, PREFILL_BUCKETS[-1])
    facts = {
        "model": str(header.path),
        "parameters": parameters,
        "weight_bytes": weights,
        "kv_cache": config.kv_cache,
        "cache_bytes_per_token": cache,
        "cache_bytes_of_full_row": full_cache,
        "config": config.to_dict(),
        "drafts": drafts,
        "tuning": tuned,
        "preferred_drafts": preferred,
        "tokenizer": header.has_tokenizer,
        "eos_token_ids": list(header.eos_token_ids),
        "generation_config_ignored": header.generation_config_ignored,
        "source": header.source,
    }
    asked = [getattr(arguments, name) for name in ("context", "batch", "method", "gamma", "draft")]
    if arguments.mesh and asked != [None] * 5:
        raise InputError(
            "--mesh says what each device holds of weights and cache per token, and the other "
            "options compute a generation on one device: give them apart"
        )
    ledgers = [] if asked == [None] * 5 else _ledgers(arguments, header)
    if ledgers:
        facts["memory"] = [
            dataclasses.asdict(x) | {"total": x.total, "fits": [c for c in CARDS if x.fits(c)]}
            for x in ledgers
        ]
    mesh = _mesh_facts(config, arguments.mesh) if arguments.mesh is not None else None
    if mesh is not None:
        facts["mesh"] = mesh
    if arguments.json:
        print(json.dumps(facts), file=arguments.stdout)
        return 0
    rows = [
        ("model", arguments.model or "the embedded one"),
        ("parameters", f"{parameters:,} in {config.precision}, {weights / 2**20:,.1f} MiB"),
        *_format_rows(config),
        (
            "shape",
            f"{config.num_layers} layers, width {config.hidden_size}, feed-forward "
            f"{config.intermediate_size}, {config.num_heads} heads / {config.num_kv_heads} "
            f"key-value heads of {config.head_dim}, vocabulary {config.vocab_size}",
        ),
        ("context", f"{config.max_position_embeddings} tokens, rope {config.rope.type}"),
        (
            "cache",
            f"{cache / 1024:,.1f} KiB per token and row; {full_cache / 2**20:,.1f} MiB for a row "
            f"of {context} tokens"
            + (", with windows" if full_cache < cache * context else "")
            + (f", in {config.kv_cache}" if config.kv_cache else ""),
        ),
        *_mesh_rows(mesh),
        *_draft_rows(drafts, default_draft(config)),
        *map(_tuning_row, tuned),
        *map(_preferred_row, preferred),
        ("tokenizer", "yes" if header.has_tokenizer else "none: use --ids"),
        ("end of text", ", ".join(map(str, header.eos_token_ids)) or "none"),
    ]
    if header.generation_config_ignored:
        ignored = ", ".join(f"{k}={v}" for k, v in header.generation_config_ignored.items())
        rows.append(("not used", f"from generation_config.json: {ignored} (pass what you want)"))
    for name, value in rows:
        print(f"{name:12} {value}")
    for row in _memory_rows(ledgers):
        print(row)
    return 0


def _format_rows(config: "ModelConfig") -> Iterator[tuple[str, str]]:
    """What the matrices are stored in, where that is not plain."""
    from s3d_jax.weights.formats import in_memory

    held = in_memory(config, "cpu")
    if config.blocks is not None:
        kinds = Counter(entry.partition(" ")[2] for entry in config.blocks)
        yield (
            "blocks",
            ", ".join(f"{count} of {kind}" for kind, count in kinds.items())
            + " (bits x group): the numbers of the GGUF file, not rounded again",
        )
    if held != config:
        yield "on CPUs", f"held as {held.precision}, with the same numbers"


def _mesh_facts(config: "ModelConfig", mesh: str) -> dict[str, Any]:
    """What each device of a mesh holds of a model; the devices need not be there."""
    from s3d_jax.nn.cache import cache_bytes
    from s3d_jax.nn.sharding import cache_share, share_bytes, without_devices
    from s3d_jax.nn.transformer import abstract_params
    from s3d_jax.settings.mesh import MeshShape
    from s3d_jax.storage.trees import flatten
    from s3d_jax.weights.formats import in_memory

    shape = MeshShape.of(mesh)
    shape.check_divides(config)
    config = in_memory(config, "gpu", mesh=True).replace(shards=shape.model)
    devices = without_devices(shape)
    cache = cache_share(devices, config, shape.data, shape.data * cache_bytes(config, 1, None))
    return {
        **shape.to_dict(),
        "weight_bytes_per_device": share_bytes(devices, config, flatten(abstract_params(config))),
        "cache_bytes_per_token_and_device": cache,
        "replicated": shape.replicated(config),
    }


def _mesh_rows(mesh: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
    if mesh is None:
        return
    yield (
        "mesh",
        f"data={mesh['data']},model={mesh['model']}: on each device "
        f"{mesh['weight_bytes_per_device'] / 2**20:,.1f} MiB of weights, and "
        f"{mesh['cache_bytes_per_token_and_device'] / 1024:,.1f} KiB of cache per token and row",
    )
    yield "not divided", "; ".join(mesh["replicated"]) or "nothing but norms and small vectors"


def _ledgers(arguments: argparse.Namespace, header: "Header") -> list["Ledger"]:
    """The ledgers of the checkpoint's own precision, and of those that it could have."""
    from s3d_jax.drafters.s3d import drafter_of
    from s3d_jax.drafters.stored import choose_draft, read_draft
    from s3d_jax.engine.ledger import Drafting, ledger, plan_of, scratch_bytes
    from s3d_jax.errors import ConfigError
    from s3d_jax.lm import default_draft
    from s3d_jax.settings.model import DTYPES
    from s3d_jax.weights.formats import in_memory

    config, drafts = header.config, arguments.method != "ar"
    for name in ("context", "batch", "gamma"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise ConfigError(f"--{name} must be at least 1, got {value}")
    if not drafts and (arguments.gamma or arguments.draft):
        raise ConfigError("--gamma and --draft are of --method s3d")
    context = arguments.context or min(_CONTEXT, config.max_position_embeddings)
    if context > config.max_position_embeddings:
        raise ConfigError(
            f"--context must be at most {config.max_position_embeddings}, which the model was made "
            f"for, got {context}"
        )
    drafting: Drafting | None = None
    if drafts:
        chosen = choose_draft(header.path, arguments.draft, config=config)
        stored = None if chosen is None else read_draft(header.path, chosen, config)
        drafting = (default_draft(config), None)
        if stored is not None:
            drafting = (stored.config, stored.params)
        if arguments.gamma:
            drafting = (drafting[0].replace(gamma=arguments.gamma), drafting[1])
    drafter = None if drafting is None else drafter_of(drafting[0], config)
    gamma, block = (0, 0) if drafter is None else (drafter.gamma, drafter.block)
    plan = plan_of(context, arguments.batch or 1, gamma, config.max_position_embeddings, block)
    precisions = [config]  # what is rounded stays so; CPUs may hold it otherwise
    if (held := in_memory(config, "cpu")) != config:
        precisions.append(held)
    if config.quantization is None:
        precisions = [config.replace(dtype=dtype) for dtype in DTYPES]
        precisions.append(config.replace(quantization="int8"))
        with contextlib.suppress(ConfigError):  # widths that are odd
            precisions.append(config.replace(quantization="int4"))
    scratch = scratch_bytes(config, plan, drafting)
    return [ledger(one, plan, drafting, scratch) for one in precisions]


def _memory_rows(ledgers: list["Ledger"]) -> Iterator[str]:
    from s3d_jax.engine.ledger import CARDS

    if not ledgers:
        return
    names = ("weights", "draft", "cache", "scratch", "total")
    yield ""
    yield f"{'memory, MiB':12}" + "".join(f"{name:>11}" for name in names) + "  fits"
    for ledger in ledgers:
        sizes = "".join(f"{getattr(ledger, name) / 2**20:11,.1f}" for name in names)
        fitting = ", ".join(
            card + "*" * (not ledger.fits_share(card)) for card in CARDS if ledger.fits(card)
        )
        fitting = fitting or "none of " + ", ".join(CARDS)
        yield f"{ledger.precision:12}{sizes}  {fitting}"
    if any(x.fits(card) and not x.fits_share(card) for x in ledgers for card in CARDS):
        yield "* with XLA_CLIENT_MEM_FRACTION=0.95: jax takes 75 % of a card unless that is set"


def _draft_facts(header: "Header", name: str) -> dict[str, Any]:
    import jax

    from s3d_jax.drafters.stored import KINDS, S3D, draft_kind, read_draft
    from s3d_jax.nn.draft import recalled_layers
    from s3d_jax.storage.trees import unflatten

    if (kind := draft_kind(header.path, name)) not in KINDS:
        return {"kind": kind}
    draft = read_draft(header.path, name, header.config, weights=False)
    arrays = {path: jax.ShapeDtypeStruct(x, "float32") for path, x in draft.shapes.items()}
    reached = draft.training.get("reached", {})
    common = {
        "kind": kind,
        **draft.config.to_dict(),
        "parameters": draft.num_params,
        "vocabulary": draft.shapes.get("vocabulary", [None])[0],
        "tokens_per_iteration": reached.get("tokens_per_iteration"),
        # A draft can be handed on with a smaller γ than it was trained for.
        "gamma_when_trained": len(reached.get("acceptance_per_position", ())) or draft.config.gamma,
    }
    if kind != S3D:
        return common
    return {
        **common,
        "draft_mode": draft.config.mode,
        "draft_depth": draft.config.draft_depth,
        "chain_rank": draft.shapes.get("chain/down", [0, 0])[1],
        "recall": recalled_layers(header.config, unflatten(arrays).get("bridges", {})),
        "mode": draft.training.get("mode"),
    }


def _draft_rows(
    drafts: dict[str, dict[str, Any]], untrained: "DraftConfig"
) -> list[tuple[str, str]]:
    def layers(skip: Sequence[bool]) -> str:
        return f"layers {[i for i, skipped in enumerate(skip) if not skipped]} of {len(skip)}"

    if not drafts:
        shape = f"{layers(untrained.skip)}, gamma {untrained.gamma}"
        return [("draft", f"untrained, {shape} (s3d train makes one)")]
    rows = []
    for name, facts in drafts.items():
        if "parameters" not in facts:
            unknown = f"{name}: of the kind {facts['kind']!r}, which is not known here"
            rows.append(("draft", unknown))
            continue
        tau = facts["tokens_per_iteration"]
        chosen = facts["vocabulary"]
        parts = ", merged" if facts.get("draft_mode") == "merged" else ""
        parts += f", drafts {chosen:,} tokens" if chosen else ""
        parts += f", chain of rank {facts['chain_rank']}" if facts.get("chain_rank") else ""
        if count := facts.get("recall"):
            parts += f", recalls {count} layer{'s' * (count > 1)}"
        what = layers(facts["skip"]) if "skip" in facts else f"of the kind {facts['kind']!r}"
        reached = "" if tau is None else f", {tau:.2f} tokens per iteration when trained"
        if reached and (gamma := facts["gamma_when_trained"]) != facts["gamma"]:
            reached += f" with gamma {gamma}"
        rows.append(
            (
                "draft",
                f"{name}: {what}, gamma {facts['gamma']}, "
                f"{facts['parameters']:,} parameters{parts}{reached}",
            )
        )
    return rows


def _tuning_row(entry: dict[str, Any]) -> tuple[str, str]:
    key, tuned = entry["key"], entry["tuning"]
    skipped = [i for i, skip in enumerate(tuned["skip"]) if skip]
    leaves = f", leaves {shown_leaves(tuned['leaves'])}" if "leaves" in tuned else ""
    return (
        "tuned",
        f"γ={tuned['gamma']}, layers {skipped} skipped{leaves}, improvement factor "
        f"{tuned['improvement_factor']:.2f}; {_precision(key)}, "
        f"draft {key['draft'] or 'untrained'}, {key['device']}",
    )


def _preferred_row(choice: dict[str, Any]) -> tuple[str, str]:
    key = choice["key"]
    return "preferred", f"draft {key['draft']}; {_precision(key)}, {key['device']}"


def _precision(key: dict[str, Any]) -> str:
    return key["dtype"] + (f", {key['kv_cache']} cache" if "kv_cache" in key else "")
