"""Whole training runs: from a checkpoint and files to a trained draft, or to a trained model."""

import dataclasses
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from s3d_jax.drafters.stored import (
    DEFAULT,
    check_name,
    choose_draft,
    draft_names,
    read_draft,
    save_draft,
    write_draft,
)
from s3d_jax.errors import CheckpointError, ConfigError, InputError
from s3d_jax.lm import LM, default_draft, load
from s3d_jax.nn.transformer import DraftParams, Params, untrained_draft
from s3d_jax.settings.drafting import DraftConfig
from s3d_jax.settings.model import ModelConfig
from s3d_jax.storage import native as checkpoint
from s3d_jax.storage.staging import check_apart, check_replaceable
from s3d_jax.storage.tokenizer import tokenizer_files
from s3d_jax.texts.documents import Document, read_documents
from s3d_jax.train.data import Batches, Rows, concatenate, pack, row_length_for
from s3d_jax.train.draft import AdapterConfig, DraftTask
from s3d_jax.train.loop import LoopConfig, check_run, fit
from s3d_jax.train.objective import ObjectiveConfig
from s3d_jax.train.pretrain import PretrainTask
from s3d_jax.train.tokenizer import end_token_ids, tokenizer_for, tokenizer_of_run
from s3d_jax.train.validation import (
    held_out_prompts,
    measure_acceptance,
    perplexity,
    warn_if_useless,
)

Files = Sequence[str | os.PathLike[str]]


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """What held-out decoding looks at.

    Attributes:
        prompts: how many, evenly from all held-out documents.
        prompt_tokens: length of a prompt, where a document does not say itself what its prompt is.
        new_tokens: decoded per prompt.
        held_out: share of the documents that is held out where no files are given for that.
    """

    prompts: int = 32
    prompt_tokens: int = 16
    new_tokens: int = 128
    held_out: float = 0.02

    def __post_init__(self) -> None:
        for name in ("prompts", "prompt_tokens", "new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"validation {name} must be at least 1, got {getattr(self, name)}"
                )
        if not 0 < self.held_out < 1:
            raise ConfigError(f"held_out must be in (0, 1), got {self.held_out}")


def train_draft(
    model: str | os.PathLike[str],
    data: Files,
    run: str | os.PathLike[str],
    loop: LoopConfig,
    *,
    name: str = DEFAULT,
    out: str | os.PathLike[str] | None = None,
    mode: str = "adapter",
    draft: DraftConfig | None = None,
    objective: ObjectiveConfig = ObjectiveConfig(),
    adapter: AdapterConfig | None = None,
    start: str | None = None,
    next_token_weight: float = 1.0,
    row_length: int | None = None,
    valid: Files = (),
    validation: ValidationConfig = ValidationConfig(),
    dtype: str | None = None,
    remat: bool = False,
    resume: bool | int = False,
    overwrite: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Trains the draft of a checkpoint, and puts it there.

    Args:
        model: a native checkpoint folder.
        data: .txt and .jsonl files; see `read_documents`.
        run: a folder for states, metrics and curves.
        loop: steps, batch, optimiser, ...
        name: of the draft in the checkpoint.
        out: of mode "full", which changes the target: the folder of the new checkpoint.
        mode: "adapter", "mask" or "full".
        draft: skip, γ and block attention; None is the middle half, γ = 4, causal.
        objective: what is trained for.
        adapter: how large the low-rank parts are; None is `AdapterConfig()`, or as in `start`.
        start: the name of a draft of the checkpoint to go on from, in mode "adapter". `draft` may
            then have another γ than it, and ranks of `adapter` may be higher: what is added begins
            as in an untrained draft. None, or a rank of 0, is as it has.
        next_token_weight: of mode "full": of the next-token loss beside the draft's.
        row_length: tokens per row of a batch; None is what most documents need.
        valid: held-out files; without them a share of `data` is held out.
        validation: what held-out decoding looks at.
        dtype: that the frozen target has in training; None keeps the stored one. What is stored has
            the type of the checkpoint, and is judged as that.
        remat: compute activations anew in the backward pass: less memory, more time.
        resume: go on with the run in `run`, from its newest state; a number names the step of an
            older one, and newer ones are removed.
        overwrite: replace a draft of that name (an `out` in mode "full").
        progress: show a bar.

    Returns:
        JSON: what was reached, as stored with the draft.

    Raises:
        InputError, ConfigError, CheckpointError: files, settings or folders that do not fit.
        TrainingError: see `fit`.
    """
    check_name(name)
    if mode == "full":
        if out is None:
            raise ConfigError("mode 'full' changes the target: say where the new one goes (out)")
        check_apart(out, model)
        check_replaceable(out, overwrite)
    elif out is not None:
        raise ConfigError(f"mode {mode!r} adds a draft to the checkpoint itself: it takes no out")
    elif name in draft_names(model) and not overwrite:
        raise CheckpointError(
            f"{model} has a draft {name!r} already: choose another name, or replace it "
            "(--overwrite, overwrite=True)"
        )
    else:
        check_replaceable(Path(model) / "drafts" / name, overwrite)
    check_run(run, resume)
    stored = checkpoint.read_header(model)
    limit = stored.config.max_position_embeddings
    _check_row_length(row_length, limit)
    lm = load(model, dtype=dtype, progress=progress, use_draft=False)
    config = lm.config
    begun: DraftParams | None = None
    if start is not None:
        draft, adapter, begun = _begun(model, start, config, mode, draft, adapter)
    draft = draft or default_draft(config)
    task = DraftTask(
        *(config, lm.params, draft),
        mode=mode,
        objective=objective,
        adapter=adapter or AdapterConfig(),
        start=begun,
        next_token_weight=next_token_weight,
        remat=remat,
    )
    documents, held_out = _split(
        data, valid, lm.tokenizer, _end(lm), config.vocab_size, validation, loop.seed
    )
    row_length = row_length or row_length_for(documents, limit)
    rows = pack(documents, row_length)
    held_rows = pack(held_out, row_length)
    prompts = held_out_prompts(held_out, validation.prompts, validation.prompt_tokens, limit)
    judge = LM(
        *(config, lm.params),
        draft_config=draft,
        tokenizer=lm.tokenizer,
        eos_token_ids=lm.eos_token_ids,
        max_length=lm.max_length,
    )

    def as_stored(tree: Mapping[str, Any]) -> dict[str, Any]:
        return jax.tree.map(lambda x: x.astype(stored.config.dtype), dict(tree))

    def validate(tree: Mapping[str, Any]) -> dict[str, Any]:
        judge.params, trained = task.merged(as_stored(tree), lm.params)
        judge.draft_params = jax.tree.map(lambda x: x.astype(config.dtype), trained)
        report = measure_acceptance(judge, prompts, validation.new_tokens)
        if mode == "full":
            report["perplexity"] = perplexity(config, judge.params, held_rows)
        judge.params = lm.params  # or a second copy of the trained layers would live on
        return report

    settings = {
        "mode": mode,
        "draft": draft.to_dict(),
        "objective": dataclasses.asdict(objective),
        "adapter": dataclasses.asdict(task.adapter),
        "start": start,
        "loss_weights": task.loss_weights,
        "row_length": row_length,
        "validation": dataclasses.asdict(validation),
        "dtype": config.dtype,
        "remat": remat,
        "loop": dataclasses.asdict(loop),
        "data": [Path(f).name for f in data],
        "valid": [Path(f).name for f in valid],
        "rows_crc32": _checksum(rows),
        "target_crc32": zlib.crc32((Path(model) / "weights.json").read_bytes()),
    }
    tree, validations = fit(
        *(task, Batches(rows, loop.batch_size, loop.seed), loop, run),
        options=settings,
        validate=validate,
        resume=resume,
        progress=progress,
    )
    before, reached = validations[0], validations[-1]
    report = {k: v for k, v in settings.items() if k != "draft"} | {
        "before": before,
        "reached": reached,
        "trained_parameters": sum(x.size for x in jax.tree.leaves(tree)),
    }
    if mode == "full":
        assert out is not None
        same = config.dtype == stored.config.dtype
        params, trained = task.merged(tree, lm.params if same else checkpoint.load(model).params)
        _save_with_draft(
            *(out, stored.config, params, name, draft, trained, report),
            source={"target": stored.source, "changed_by": "s3d train --mode full"},
            generation_config=stored.generation_config,
            tokenizer=model,
            overwrite=overwrite,
        )
    else:
        save_draft(model, name, draft, tree["draft"], report, overwrite=True)
    untrained = before
    if start is not None:
        judge.draft_params = untrained_draft(lm.params)
        untrained = measure_acceptance(judge, prompts, validation.new_tokens)
    # Last, so that nothing is lost where warnings are errors.
    warn_if_useless(untrained["tokens_per_iteration"], reached["tokens_per_iteration"], draft.gamma)
    return report


def pretrain(
    data: Files,
    out: str | os.PathLike[str],
    run: str | os.PathLike[str],
    config: ModelConfig,
    loop: LoopConfig,
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    draft: DraftConfig | None = None,
    draft_weight: float = 0.2,
    objective: ObjectiveConfig = ObjectiveConfig(),
    adapter: AdapterConfig = AdapterConfig(),
    row_length: int = 256,
    compute_dtype: str = "float32",
    valid: Files = (),
    validation: ValidationConfig = ValidationConfig(),
    remat: bool = False,
    resume: bool | int = False,
    overwrite: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Trains a small model from nothing, and writes it as a native checkpoint.

    Args:
        data: .txt and .jsonl files; see `read_documents`.
        out: the checkpoint folder.
        run: a folder for states, metrics, curves and the tokenizer.
        config: the model; its dtype is what is written, the trained weights are float32.
        loop: steps, batch, optimiser, ...
        tokenizer: a folder with tokenizer files; None trains a byte-level BPE on `data`.
        draft: also teach the model to draft, with this skip and γ; the draft is written too.
        draft_weight: of the draft's loss beside the next-token loss.
        objective, adapter: of the draft.
        compute_dtype: see `PretrainTask`; bfloat16 is faster where the device multiplies it faster.
        row_length, valid, validation, remat, resume, overwrite, progress: as in `train_draft`.

    Returns:
        JSON: what was reached.

    Raises:
        InputError, ConfigError, CheckpointError, TrainingError: as `train_draft`.
    """
    check_replaceable(out, overwrite)
    check_run(run, resume)
    limit = config.max_position_embeddings
    _check_row_length(row_length, limit)
    vocabulary = tokenizer or tokenizer_of_run(data, config.vocab_size, run)
    words = tokenizer_for(vocabulary, config.vocab_size)
    end, ends = words.eos_token_id, end_token_ids(words)
    documents, held_out = _split(
        *(data, valid, words, end, config.vocab_size, validation, loop.seed),
        texts=True,  # ids in the files would be those of another tokenizer
    )
    # Unlike a draft, the model learns all words of a chat, the user's too.
    rows = concatenate(documents, row_length, loop.seed)
    held_rows = pack(held_out, row_length)
    prompts = held_out_prompts(held_out, validation.prompts, validation.prompt_tokens, limit)
    task = PretrainTask(
        config,
        draft_config=draft,
        draft_weight=draft_weight,
        objective=objective,
        adapter=adapter,
        compute_dtype=compute_dtype,
        remat=remat,
    )
    trained_config = config.replace(dtype="float32")
    judge: LM | None = None

    def acceptance(params: Params, draft_params: DraftParams) -> dict[str, Any]:
        nonlocal judge
        judge = judge or LM(trained_config, params, draft_config=draft, eos_token_ids=ends)
        judge.params, judge.draft_params = params, draft_params
        return measure_acceptance(judge, prompts, validation.new_tokens)

    def as_stored(tree: Mapping[str, Any]) -> dict[str, Any]:
        return jax.tree.map(lambda x: x.astype(config.dtype).astype("float32"), dict(tree))

    def validate(tree: Mapping[str, Any]) -> dict[str, Any]:
        tree = as_stored(tree)
        loss = float(np.log(perplexity(trained_config, tree["params"], held_rows)))
        report: dict[str, Any] = {"next_token_loss": loss}
        if draft is not None:
            report |= acceptance(tree["params"], tree["draft"])
        return report

    settings = {
        "model": config.to_dict(),
        "tokens": int(rows.tokens.size),
        "draft": None if draft is None else draft.to_dict() | {"weight": draft_weight},
        "objective": dataclasses.asdict(objective),
        "adapter": dataclasses.asdict(adapter),
        "row_length": row_length,
        "compute_dtype": compute_dtype,
        "remat": remat,
        "validation": dataclasses.asdict(validation),
        "loop": dataclasses.asdict(loop),
        "data": [Path(f).name for f in data],
        "valid": [Path(f).name for f in valid],
        "rows_crc32": _checksum(rows),
    }
    tree, validations = fit(
        *(task, Batches(rows, loop.batch_size, loop.seed), loop, run),
        options=settings,
        validate=validate,
        resume=resume,
        progress=progress,
    )
    tree, reached = as_stored(tree), validations[-1]
    report = settings | {"reached": reached}
    _save_with_draft(
        *(out, config, jax.tree.map(lambda x: x.astype(config.dtype), tree["params"])),
        *((DEFAULT, draft, tree["draft"], report) if draft else (DEFAULT, None, None, report)),
        source={"trained_by": "s3d pretrain", **report},
        generation_config={"bos_token_id": words.bos_token_id, "eos_token_id": ends},
        tokenizer=vocabulary,
        overwrite=overwrite,
    )
    if draft is not None:
        params = tree["params"]
        untrained = acceptance(params, untrained_draft(params))["tokens_per_iteration"]
        warn_if_useless(untrained, reached["tokens_per_iteration"], draft.gamma)
    return report


def _save_with_draft(
    out: str | os.PathLike[str],
    config: ModelConfig,
    params: Params,
    name: str,
    draft: DraftConfig | None,
    draft_params: DraftParams | None,
    report: Mapping[str, Any],
    *,
    tokenizer: str | os.PathLike[str],
    **options: Any,
) -> None:
    """A checkpoint and its draft, whole or not at all; options as in `checkpoint_writer`."""
    with checkpoint.checkpoint_writer(out, config, **options) as writer:
        for group, tree in params.items():
            writer.write_group(group, tree)
        for file in tokenizer_files(tokenizer):
            writer.add_file(file)
        if draft is not None and draft_params is not None:
            folder = writer.folder / "drafts" / name
            folder.mkdir(parents=True)
            write_draft(folder, config, draft, draft_params, report)


def _begun(
    model: str | os.PathLike[str],
    name: str,
    config: ModelConfig,
    mode: str,
    draft: DraftConfig | None,
    adapter: AdapterConfig | None,
) -> tuple[DraftConfig, AdapterConfig, DraftParams]:
    """The settings of a draft that goes on from one of the checkpoint, and that one's arrays."""
    if mode != "adapter":
        raise ConfigError(f"mode {mode!r} begins anew: leave out start (--start)")
    if name not in draft_names(model):
        choose_draft(model, name)  # says which there are
    begun = read_draft(model, name, config)
    assert begun.params is not None
    draft = draft or begun.config
    if draft.replace(gamma=begun.config.gamma) != begun.config:
        raise ConfigError(f"start {name!r} has another skip or block attention: only γ may differ")
    ranks = [
        max((x.shape[-1] for x in jax.tree.leaves(tree)[::2]), default=0)  # [down, up] each
        for tree in (begun.params.deltas, begun.params.bridges)
    ]
    given = (0, 0) if adapter is None else (adapter.rank, adapter.bridge_rank)
    wanted = AdapterConfig(*(g or rank for g, rank in zip(given, ranks, strict=True)))
    if wanted.rank < ranks[0] or wanted.bridge_rank < ranks[1]:
        raise ConfigError(
            f"the draft {name!r} has rank {ranks[0]} and bridge rank {ranks[1]}, which can grow "
            f"but not shrink: got {wanted.rank} and {wanted.bridge_rank} (--rank, --bridge-rank)"
        )
    return draft, wanted, begun.params


def _check_row_length(row_length: int | None, limit: int) -> None:
    if row_length is not None and row_length > limit:
        raise ConfigError(
            f"row_length (--row-length) is {row_length}, but the model is made for {limit} tokens "
            "(max_position_embeddings): take at most that"
        )


def _checksum(rows: Rows) -> int:
    """Of what is trained on, so that a run is not resumed on other data."""
    return zlib.crc32(rows.learn.tobytes(), zlib.crc32(rows.tokens.tobytes()))


def _end(lm: LM) -> int | None:
    return lm.eos_token_ids[0] if lm.eos_token_ids else None


def _split(
    data: Files,
    valid: Files,
    tokenizer: Any,
    end: int | None,
    vocab_size: int,
    validation: ValidationConfig,
    seed: int,
    texts: bool = False,
) -> tuple[list[Document], list[Document]]:
    """Documents to train on, and held-out ones."""
    documents = read_documents(data, tokenizer, end, texts=texts)
    if valid:
        held_out = read_documents(valid, tokenizer, end, texts=texts)
    else:
        count = max(1, round(validation.held_out * len(documents)))
        order = np.random.default_rng(seed).permutation(len(documents))
        held_out = [documents[i] for i in sorted(order[:count])]
        documents = [documents[i] for i in sorted(order[count:])]
    for name, part in (("to train on", documents), ("held out", held_out)):
        if not part:
            raise InputError(f"no document is {name}: give more data, or files with --valid")
        largest = max(int(d.tokens.max(initial=0)) for d in part)
        if largest >= vocab_size:
            raise InputError(f"the data holds token {largest}; the vocabulary has {vocab_size}")
    return documents, held_out
