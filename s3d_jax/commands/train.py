"""The commands `s3d train`, `s3d pretrain` and `s3d distill`."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s3d_jax.commands.arguments import (
    DECODED,
    DRAFT,
    SIZES,
    add_distill,
    add_pretrain,
    add_train,
    flag,
)
from s3d_jax.errors import InputError

if TYPE_CHECKING:
    from s3d_jax.settings.drafting import DraftConfig
    from s3d_jax.settings.model import ModelConfig
    from s3d_jax.train.loop import LoopConfig
    from s3d_jax.train.objective import ObjectiveConfig
    from s3d_jax.train.runs import ValidationConfig


def add_commands(commands: Any) -> None:
    """Adds the three commands to the parser of `s3d`."""
    add_train(commands).set_defaults(run=_train)
    add_pretrain(commands).set_defaults(run=_pretrain)
    add_distill(commands).set_defaults(run=_distill)


def _train(arguments: argparse.Namespace) -> int:
    from s3d_jax.drafters.stored import choose_draft, read_draft
    from s3d_jax.storage.native import read_header
    from s3d_jax.train.draft import AdapterConfig
    from s3d_jax.train.runs import train_draft

    config = read_header(arguments.model).config
    mode, weight = arguments.mode, arguments.next_token_weight
    if mode != "adapter":
        _refuse(arguments, ("rank", "bridge_rank"), f"belong to --mode adapter, not {mode}")
    if mode != "full":
        _refuse(arguments, ("next_token_weight",), f"belongs to --mode full, not {mode}")
    begun = None
    if arguments.start is not None:
        names = ("skip", "block_attention")
        _refuse(arguments, names, "--start takes what that draft has")
        choose_draft(arguments.model, arguments.start)  # says which there are
        begun = read_draft(arguments.model, arguments.start, config, weights=False).config
        _settle(arguments, {"rank": 0, "bridge_rank": 0, "gamma": begun.gamma})
    _check_run(arguments)
    _settle(arguments, DRAFT | DECODED)
    if arguments.learning_rate is None:
        arguments.learning_rate = 3e-4 if mode == "full" else 2e-3
    draft = _draft(arguments, config)
    if begun is not None:
        draft = begun.replace(gamma=arguments.gamma)
    report = train_draft(
        arguments.model,
        arguments.data,
        arguments.run_folder,
        _loop(arguments),
        name=arguments.name,
        out=arguments.out,
        mode=arguments.mode,
        draft=draft,
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
        names = (*DRAFT, "draft_weight", *DECODED)
        _refuse(arguments, names, "without --joint-draft there is no draft")
    if arguments.config is not None:
        names = (*SIZES, "mlp_width", "dtype")
        _refuse(arguments, names, "--config says that already")
    _check_run(arguments)
    defaults = {"draft_weight": 0.2, "row_length": 256, "dtype": "bfloat16"}
    _settle(arguments, DRAFT | DECODED | SIZES | defaults)
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

    from s3d_jax.drafters.stored import DEFAULT, choose_draft, draft_names
    from s3d_jax.lm import load
    from s3d_jax.texts.documents import read_documents
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


def _refuse(arguments: argparse.Namespace, names: Sequence[str], reason: str) -> None:
    """Raises InputError for options that were given and would have no effect."""
    values = {name: getattr(arguments, name) for name in names}
    given = [flag(k) for k, v in values.items() if v is not None and v is not False]  # 0 is given
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
            raise InputError(f"{flag(name)} must be at least {value}, got {given}")


def _check_run(arguments: argparse.Namespace) -> None:
    """What the settings that are made of these options do not check, or under other names."""
    _check_least(arguments, row_length=2, **dict.fromkeys(DECODED, 1))
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
    from s3d_jax.settings.drafting import DraftConfig, symmetric_skip

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
    from s3d_jax.settings.model import ModelConfig

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
