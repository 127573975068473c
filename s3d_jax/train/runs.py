"""Whole training runs: from a checkpoint and files to a trained draft, or to a trained model."""

import dataclasses
import functools
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from s3d_jax.drafters.stored import (
    DEFAULT_NAME,
    S3D,
    check_name,
    draft_kind,
    draft_names,
    read_draft,
    save_draft,
    write_draft,
)
from s3d_jax.errors import CheckpointError, ConfigError, TrainingError
from s3d_jax.jax_settings import under_usual_jax_settings
from s3d_jax.lm import LM, tokenizer_or_none
from s3d_jax.machine import default_device
from s3d_jax.mesh import by_first_host, is_first_host, on_mesh
from s3d_jax.nn.draft import DraftParams, untrained_draft
from s3d_jax.nn.sharding import on_host, shape_of
from s3d_jax.settings.drafting import DraftConfig, FeatureConfig
from s3d_jax.settings.model import ModelConfig
from s3d_jax.settings.training import PretrainConfig, TrainDraftConfig
from s3d_jax.storage import native as checkpoint
from s3d_jax.storage.staging import check_apart, check_replaceable
from s3d_jax.train.beginning import beginning, beginning_of_features, vocabulary_of
from s3d_jax.train.bridges import fitted_draft, fitted_fuse
from s3d_jax.train.data import Batches, concatenate, pack, row_length_for
from s3d_jax.train.draft import DraftTask, check_trainable
from s3d_jax.train.features import FeatureTask
from s3d_jax.train.folder import check_run, has_states
from s3d_jax.train.loop import fit
from s3d_jax.train.placement import Placement, mesh_for
from s3d_jax.train.pretrain import PretrainTask
from s3d_jax.train.session import Corpus, Files, check_row_length, read_corpus
from s3d_jax.train.tokenizer import end_token_ids, tokenizer_for, tokenizer_of_run
from s3d_jax.train.validation import (
    HeldOutDecoding,
    made_worse,
    perplexity,
    warn_if_useless,
)
from s3d_jax.weights.trees import Params, float_dtype


@under_usual_jax_settings
def train_draft(
    model: str | os.PathLike[str],
    data: Files,
    run: str | os.PathLike[str],
    config: TrainDraftConfig = TrainDraftConfig(),
    *,
    valid: Files = (),
    mesh: Any = None,
    resume: bool | int = False,
    overwrite: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Trains a draft for a checkpoint, and stores it there.

    Args:
        model: a native checkpoint folder.
        data: .txt and .jsonl files; see `read_documents`.
        run: a folder for states, metrics and curves.
        config: what is trained, and how.
        valid: held-out files; without them a share of `data` is held out.
        mesh: several devices, as in `load`; None is one. The rows of a step are divided over
            `data`, which must divide them, and so are matrices, trained ones and frozen ones, and
            what the optimizer keeps. A run may continue on another mesh, or on one device. Of
            several hosts each calls this, with the same arguments and folders; the first one
            writes. See docs/sharding.md.
        resume: continue the run in `run` from its newest state; a number names the step of an
            older state, and newer ones are removed.
        overwrite: replace a draft of that name (the `out` of mode "full").
        progress: show a bar, and before it how much there is to learn.

    Returns:
        JSON: the options and what was reached, as stored with the draft.

    Raises:
        InputError, ConfigError, CheckpointError: files, settings or folders that do not fit.
        TrainingError: see `fit`; or the trained draft is worse than the untrained one, or than the
            one that it would replace: it is not stored, and the run is kept.
        DeviceError: there is no device, or fewer than the mesh needs.
    """
    _check_destination(model, config, overwrite)
    check_run(run, resume)
    stored = checkpoint.read_header(model)
    if config.mode == "full":  # of what is stored: CPUs hold blocks as floats
        check_trainable(stored.config)
    check_row_length(config.row_length, stored.config)
    default_device()  # before files are read for minutes
    progress = progress and is_first_host()
    if mesh is not None and config.kind != S3D:
        raise ConfigError(f"a draft of kind {config.kind!r} is trained on one device: no mesh")
    devices = mesh_for(mesh, stored.config, config.loop)
    replaces = config.out is None and config.draft_name in draft_names(model)
    lm = checkpoint.load(model, config.dtype, mesh=devices, over_data=True, progress=progress)
    tokenizer, ends = tokenizer_or_none(stored.path), stored.eos_token_ids
    begin = beginning if config.kind == S3D else beginning_of_features
    draft, adapter, start = begin(model, lm.config.replace(shards=1, over_data=False), config)
    limit = stored.config.max_position_embeddings
    corpus = read_corpus(
        data,
        valid,
        tokenizer,
        ends[0] if ends else None,
        lm.config,
        config,
        lambda documents: pack(documents, config.row_length or row_length_for(documents, limit)),
        learns_text=config.mode == "full",
    )
    _show(corpus, progress)
    common: dict[str, Any] = dict(
        objective=config.objective,
        start=start,
        vocabulary=vocabulary_of(config, start, corpus, lm.config.vocab_size),
    )
    task: DraftTask | FeatureTask
    if isinstance(draft, FeatureConfig):
        task = FeatureTask(config.kind, lm.config, lm.params, draft, **common)
    else:
        task = DraftTask(
            lm.config,
            lm.params,
            draft,
            mode=config.mode,
            adapter=adapter,
            next_token_weight=config.next_token_weight,
            remat=config.remat,
            **common,
        )
    if config.fit_rows and not has_states(run):
        size = config.loop.batch_size // config.loop.accumulate
        batches = Batches(corpus.rows, size, config.loop.seed)
        count = -(-min(config.fit_rows, len(corpus.rows)) // size)
        if isinstance(task, FeatureTask):
            task.fuse = fitted_fuse(lm.config, lm.params, batches, count, progress=progress)
        else:
            task.start = fitted_draft(
                lm.config,
                lm.params,
                task.draft_config,
                adapter,
                batches,
                count,
                start=task.start,
                seed=config.loop.seed,
                progress=progress,
            )
    make_lm = functools.partial(LM, lm.config, eos_token_ids=ends)
    new_tokens = config.validation.new_tokens
    decoding = HeldOutDecoding(corpus.prompts, new_tokens, make_lm, draft, config.kind)
    place = None if devices is None else Placement(devices, lm.config)
    # In a program on a mesh, so that all that decodes lies where decoding expects it.
    arranged = task.arranged if place is None else jax.jit(task.arranged, static_argnames="dtype")

    def merged(tree: Mapping[str, Any]) -> tuple[Params, Any]:
        with on_mesh(devices):
            layers, trained = arranged(tree, dtype=float_dtype(lm.params))
        return {**lm.params, **layers}, trained

    def validate(tree: Mapping[str, Any]) -> dict[str, Any]:
        params, trained = merged(_cast(dict(tree), stored.config.dtype))
        trained = _cast(trained, lm.config.dtype)
        report = decoding.measure(params, trained)
        if config.mode == "full":
            report["perplexity"] = perplexity(lm.config, params, corpus.held_out)
        return report

    more = {
        # Older runs have no kind, and go on.
        **({} if config.kind == S3D else {"kind": config.kind}),
        "mode": config.mode,
        "draft": draft.to_dict(),
        "adapter": dataclasses.asdict(task.adapter) if isinstance(task, DraftTask) else None,
        "vocabulary": None if task.vocabulary is None else len(task.vocabulary),
        "start": config.start,
        "fit_rows": config.fit_rows,
        "loss_weights": task.loss_weights,
        "dtype": lm.config.dtype,
        "target_crc32": checkpoint.weights_checksum(model),
        "mesh": _in_words(devices),
    }
    options = corpus.options(config, more)
    tree, validations = fit(
        task,
        corpus.batches(config),
        config.loop,
        run,
        options=options,
        validate=validate,
        place=place,
        resume=resume,
        progress=progress,
    )
    before, reached = validations[0], validations[-1]
    # A smaller vocabulary accepts less, on purpose: all are compared with the new one's.
    same = {"vocabulary": task.vocabulary}
    untrained = before
    if start is not None or config.fit_rows:
        untrained = decoding.measure(lm.params, task.untrained().replace(**same))
    tau = reached["tokens_per_iteration"]
    worse = made_worse(untrained["tokens_per_iteration"], tau, "the untrained one", run)
    if replaces:
        old = read_draft(model, config.draft_name, lm.config, mesh=devices)
        # τ grows with γ. So the old draft proposes no more than the new one.
        old_config = old.config.replace(gamma=min(old.config.gamma, draft.gamma))
        held_out = HeldOutDecoding(corpus.prompts, new_tokens, make_lm, old_config, old.kind)
        replaced = held_out.measure(lm.params, old.params.replace(**same))["tokens_per_iteration"]
        worse = worse or made_worse(replaced, tau, "the one that it would replace", run)
    if worse:
        raise TrainingError(worse)
    report = {name: value for name, value in options.items() if name != "draft"} | {
        "before": before,
        "reached": reached,
        "trained_parameters": sum(x.size for x in jax.tree.leaves(tree)),
    }
    if task.vocabulary is not None:
        report |= _about_vocabulary(
            corpus, decoding, merged(_cast(dict(tree), stored.config.dtype)), lm.config.dtype
        )
    tree = on_host(tree)
    trained = tree["draft"].replace(vocabulary=task.vocabulary)
    if config.out is not None:
        del report["target_crc32"]  # it is for the weights next to which it is stored

    def store() -> None:
        if config.out is None:
            name = config.draft_name
            save_draft(model, name, draft, trained, report, kind=config.kind, overwrite=True)
            return
        assert isinstance(draft, DraftConfig)  # `out` belongs to mode "full"
        layers = _cast(tree["layers"], stored.config.dtype)
        _save_model(
            config.out,
            stored.config,
            {
                name: layers.get(name) or checkpoint.read_group(stored, name)
                for name in stored.groups
            },
            (config.draft_name, draft, trained, report),
            source={"target": stored.source, "changed_by": "s3d train --mode full"},
            generation_config=stored.generation_config,
            tokenizer=model,
            overwrite=overwrite,
        )

    by_first_host(store)
    # Last, so that nothing is lost where warnings are errors.
    warn_if_useless(untrained["tokens_per_iteration"], tau, draft)
    return report


@under_usual_jax_settings
def pretrain(
    data: Files,
    out: str | os.PathLike[str],
    run: str | os.PathLike[str],
    model: ModelConfig,
    config: PretrainConfig = PretrainConfig(),
    *,
    valid: Files = (),
    mesh: Any = None,
    resume: bool | int = False,
    overwrite: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Trains a small model from scratch, and writes it as a native checkpoint.

    Args:
        data: .txt and .jsonl files; see `read_documents`.
        out: the checkpoint folder.
        run: a folder for states, metrics, curves and the tokenizer.
        model: the model; its dtype is what is written, the trained weights are float32.
        config: how it is trained, and whether it also learns to draft.
        valid, mesh, resume, overwrite, progress: as in `train_draft`; `overwrite` replaces `out`. A
            draft that is worse than the untrained one is not stored with the model.

    Returns:
        JSON: the options and what was reached.

    Raises:
        InputError, ConfigError, CheckpointError, TrainingError, DeviceError: as `train_draft`.
    """
    default_device()  # before files are read for minutes
    progress = progress and is_first_host()
    check_replaceable(out, overwrite)
    check_run(run, resume)
    check_row_length(config.row_length, model)
    devices = mesh_for(mesh, model, config.loop)
    if config.tokenizer is None:  # the first host writes it into the run
        by_first_host(lambda: tokenizer_of_run(data, model.vocab_size, run))
    vocabulary = config.tokenizer or tokenizer_of_run(data, model.vocab_size, run)
    tokenizer = tokenizer_for(vocabulary, model.vocab_size)
    ends = end_token_ids(tokenizer)
    corpus = read_corpus(
        data,
        valid,
        tokenizer,
        tokenizer.eos_token_id,
        model,
        config,
        # Unlike a draft, the model learns every token of a chat, the user's too.
        lambda documents: concatenate(documents, config.row_length, config.loop.seed),
        texts=True,  # ids in the files belong to another tokenizer
        learns_text=True,
    )
    _show(corpus, progress)
    draft, place, on_devices = config.draft, None, model
    if devices is not None:
        on_devices = model.replace(shards=shape_of(devices).model, over_data=True)
        place = Placement(devices, on_devices)
    trained_model = on_devices.replace(dtype="float32")
    task = PretrainTask(
        on_devices,
        draft_config=draft,
        draft_weight=config.draft_weight,
        objective=config.objective,
        adapter=config.adapter,
        compute_dtype=config.compute_dtype,
        remat=config.remat,
    )
    decoding = None
    if draft is not None:
        make_lm = functools.partial(LM, trained_model, eos_token_ids=ends)
        new_tokens = config.validation.new_tokens
        decoding = HeldOutDecoding(corpus.prompts, new_tokens, make_lm, draft)

    arranged = task.arranged if place is None else jax.jit(task.arranged)

    def as_stored(tree: Mapping[str, Any]) -> dict[str, Any]:
        with on_mesh(devices):
            return arranged(_cast(_cast(dict(tree), model.dtype), "float32"))

    def validate(tree: Mapping[str, Any]) -> dict[str, Any]:
        tree = as_stored(tree)
        loss = float(np.log(perplexity(trained_model, tree["params"], corpus.held_out)))
        acceptance = decoding.measure(tree["params"], tree["draft"]) if decoding else {}
        return {"next_token_loss": loss, **acceptance}

    more = {
        "model": model.to_dict(),
        "tokens": int(corpus.rows.tokens.size),
        "draft": None if draft is None else draft.to_dict() | {"weight": config.draft_weight},
        "adapter": dataclasses.asdict(config.adapter),
        "compute_dtype": config.compute_dtype,
        "mesh": _in_words(devices),
    }
    options = corpus.options(config, more)
    tree, validations = fit(
        task,
        corpus.batches(config),
        config.loop,
        run,
        options=options,
        validate=validate,
        place=place,
        resume=resume,
        progress=progress,
    )
    reached = validations[-1]
    report = options | {"reached": reached}
    worse = None
    if decoding:
        params = as_stored(tree)["params"]
        untrained = decoding.measure(params, untrained_draft(trained_model, params))
        taus = untrained["tokens_per_iteration"], reached["tokens_per_iteration"]
        worse = made_worse(*taus, "the untrained one", run)
    tree = on_host(tree)
    by_first_host(
        lambda: _save_model(
            out,
            model,
            _cast(tree["params"], model.dtype),
            (DEFAULT_NAME, draft, tree["draft"], report) if draft and not worse else None,
            source={"trained_by": "s3d pretrain", **report},
            generation_config={"bos_token_id": tokenizer.bos_token_id, "eos_token_id": ends},
            tokenizer=vocabulary,
            overwrite=overwrite,
        )
    )
    if worse:
        warnings.warn(f"{worse}. The model itself is in {out}", stacklevel=2)
    elif draft:
        warn_if_useless(*taus, draft)
    return report


def _check_destination(
    model: str | os.PathLike[str], config: TrainDraftConfig, overwrite: bool
) -> None:
    """Refuses early a draft or a model that cannot be stored where it is to go."""
    if config.kind != S3D and config.mode != "adapter":
        raise ConfigError(f"mode {config.mode!r} belongs to kind 's3d', not {config.kind!r}")
    check_name(config.draft_name, config.kind)
    if config.mode == "full":
        if config.out is None:
            raise ConfigError(
                "mode 'full' changes the target: say where the new one goes (out, --out)"
            )
        check_apart(config.out, model)
        check_replaceable(config.out, overwrite)
    elif config.out is not None:
        raise ConfigError(
            f"mode {config.mode!r} adds a draft to the checkpoint itself: it takes no out"
        )
    elif config.draft_name in draft_names(model) and not overwrite:
        raise CheckpointError(
            f"{model} has a draft {config.draft_name!r} already: choose another name, or replace "
            "it (--overwrite, overwrite=True)"
        )
    else:
        folder = Path(model) / "drafts" / config.draft_name
        check_replaceable(folder, overwrite)
        if folder.exists() and (kind := draft_kind(model, folder.name)) != config.kind:
            raise CheckpointError(
                f"the draft {folder.name!r} of {model} is of the kind {kind!r}, not "
                f"{config.kind!r}: choose another name"
            )


def _about_vocabulary(
    corpus: Corpus, decoding: HeldOutDecoding, merged: tuple[Params, Any], dtype: str
) -> dict[str, Any]:
    """What a vocabulary of its own costs the draft, whose arrays are cast to `dtype`: JSON."""
    params, trained = merged
    report = decoding.measure(params, _cast(trained.replace(vocabulary=None), dtype))
    rows, coverage = corpus.held_out, None
    if rows.num_learnt:
        vocabulary = np.asarray(trained.vocabulary)
        coverage = float(np.isin(rows.tokens[rows.learn], vocabulary).mean())
    return {
        "vocabulary_coverage": coverage,
        "tokens_per_iteration_with_all_tokens": report["tokens_per_iteration"],
    }


def _in_words(mesh: Mesh | None) -> str | None:
    """The mesh as options name it."""
    return None if mesh is None else str(shape_of(mesh))


def _show(corpus: Corpus, progress: bool) -> None:
    """Says before the training what there is to learn."""
    if progress:
        from tqdm import tqdm

        tqdm.write(corpus.summary, file=sys.stderr)


def _cast(tree: Any, dtype: str) -> Any:
    """The tree with its float arrays in that type."""
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def _save_model(
    out: str | os.PathLike[str],
    config: ModelConfig,
    params: Params,
    draft: tuple[str, DraftConfig, DraftParams, Mapping[str, Any]] | None,
    *,
    tokenizer: str | os.PathLike[str],
    **options: Any,
) -> None:
    """Writes a checkpoint and its draft, whole or not at all.

    Args:
        out, config, params: the checkpoint.
        draft: (name, settings, arrays, report), or None.
        tokenizer: the folder whose tokenizer files are copied.
        **options: as in `checkpoint_writer`.
    """
    with checkpoint.checkpoint_writer(out, config, **options) as writer:
        for group, tree in params.items():
            writer.write_group(group, tree)
        writer.add_tokenizer(tokenizer)
        if draft is not None:
            name, settings, arrays, report = draft
            folder = writer.folder / "drafts" / name
            folder.mkdir(parents=True)
            write_draft(folder, config, settings, arrays, report)
