"""What a training run begins with: the draft's settings, ranks, arrays and vocabulary."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from s3d_jax.drafters.stored import choose_draft, read_draft
from s3d_jax.errors import ConfigError
from s3d_jax.lm import default_draft
from s3d_jax.nn.draft import DraftParams, OwnVocabulary, recalled_layers
from s3d_jax.nn.features import FeatureDraft
from s3d_jax.settings.drafting import DraftConfig, FeatureConfig
from s3d_jax.settings.model import ModelConfig
from s3d_jax.settings.training import AdapterConfig, TrainDraftConfig
from s3d_jax.train.draft import NO_ADAPTER, frequent_tokens
from s3d_jax.train.session import Corpus


def beginning(
    model: str | os.PathLike[str], target: ModelConfig, config: TrainDraftConfig
) -> tuple[DraftConfig, AdapterConfig, DraftParams | None]:
    """The settings and ranks of the draft to train, and the arrays of the draft it starts from."""
    _check_vocabulary_size(target, config)
    if isinstance(config.draft, FeatureConfig):
        raise ConfigError("kind 's3d' takes a DraftConfig as its draft, got a FeatureConfig")
    if config.start is None:
        adapter = config.adapter or AdapterConfig()
        draft = config.draft or default_draft(target)
        _check_fit(config, draft, adapter)
        return draft, adapter, None
    if config.mode != "adapter":
        raise ConfigError(f"mode {config.mode!r} starts from scratch: leave out start (--start)")
    name = config.start
    choose_draft(model, name)  # says which drafts there are
    start = read_draft(model, name, target)
    assert start.params is not None
    _check_same_vocabulary(config, start.params)
    draft = config.draft or start.config
    if draft.replace(gamma=start.config.gamma, skip=start.config.skip) != start.config:
        raise ConfigError(
            f"start {name!r} has another block attention or mode: only γ and the skip may differ"
        )
    had = AdapterConfig(
        rank=_rank(start.params.deltas),
        bridge_rank=_rank(start.params.bridges),
        chain_rank=_rank(start.params.chain),
        recall=recalled_layers(target, start.params.bridges),
    )
    params = start.params
    if draft.skip != start.config.skip:
        # A bridge stands for the layers of its gap, and the gaps are others now.
        kept = {f"layers_{i}" for i, skipped in enumerate(draft.skip) if not skipped}
        deltas = {layer: x for layer, x in params.deltas.items() if layer in kept}
        params = params.replace(deltas=deltas, bridges={})
    elif config.fit_rows:
        raise ConfigError(
            "start (--start) takes that draft's bridges: leave out fit_rows (--fit-rows), or "
            "choose another skip (--skip)"
        )
    ranks = config.adapter or NO_ADAPTER
    if ranks.bridge_rank and not any(draft.skip):
        raise ConfigError(
            f"a draft that starts from {name!r} and skips no layer has no gap to bridge "
            "(--bridge-rank)"
        )
    if not any(draft.skip):
        had = dataclasses.replace(had, bridge_rank=0, recall=0)
    names = [field.name for field in dataclasses.fields(AdapterConfig)]
    adapter = AdapterConfig(*(getattr(ranks, n) or getattr(had, n) for n in names))
    for n in names:
        if n in ("bridge_rank", "recall") and not params.bridges:
            continue  # they do not carry over
        if getattr(adapter, n) < getattr(had, n):
            raise ConfigError(
                f"the draft {name!r} has {n.replace('_', ' ')} {getattr(had, n)}, which can grow "
                f"but not shrink: got {getattr(adapter, n)} (--{n.replace('_', '-')})"
            )
    _check_fit(config, draft, adapter)
    return draft, adapter, params


def _check_fit(config: TrainDraftConfig, draft: DraftConfig, adapter: AdapterConfig) -> None:
    if not config.fit_rows:
        return
    if not any(draft.skip):
        raise ConfigError(
            "fit_rows (--fit-rows) fits bridges, and without skipped layers there are none"
        )
    if config.mode != "adapter" or adapter.bridge_rank < 2:
        raise ConfigError(
            "fit_rows (--fit-rows) fits bridges: it needs mode 'adapter' and a bridge_rank "
            "(--bridge-rank) of 2 or more"
        )


def beginning_of_features(
    model: str | os.PathLike[str], target: ModelConfig, config: TrainDraftConfig
) -> tuple[FeatureConfig, AdapterConfig, FeatureDraft | None]:
    """`beginning` of the kinds that read hidden states."""
    _check_vocabulary_size(target, config)
    if config.adapter is not None:
        raise ConfigError(f"kind {config.kind!r} has no adapter (--rank, --bridge-rank, …)")
    if config.fit_rows and (config.kind != "eagle" or config.start is not None):
        raise ConfigError(
            "fit_rows (--fit-rows) fits what a new draft begins with, of the kinds 's3d' and "
            "'eagle': leave it out"
        )
    if config.remat:
        raise ConfigError("remat (--remat) is of kind 's3d': one layer has few activations")
    if not isinstance(config.draft, FeatureConfig | None):
        raise ConfigError(f"kind {config.kind!r} takes a FeatureConfig, got {config.draft!r}")
    if config.start is None:
        return config.draft or FeatureConfig(), NO_ADAPTER, None
    choose_draft(model, config.start, config.kind)
    found = read_draft(model, config.start, target)
    _check_same_vocabulary(config, found.params)
    draft = config.draft or found.config
    if config.kind == "medusa" and draft.gamma != (heads := len(found.params.weights)):
        raise ConfigError(
            f"the draft {config.start!r} has {heads} heads: γ (--gamma) must be that, "
            f"got {draft.gamma}"
        )
    return draft, NO_ADAPTER, found.params


def _check_same_vocabulary(config: TrainDraftConfig, start: OwnVocabulary) -> None:
    own, wanted = start.vocabulary, config.vocabulary
    if own is not None and wanted not in (None, len(own)):
        raise ConfigError(
            f"the draft {config.start!r} drafts {len(own)} tokens, not {wanted} (--draft-vocab): "
            "train a new one without --start"
        )


def _check_vocabulary_size(target: ModelConfig, config: TrainDraftConfig) -> None:
    wanted = config.vocabulary
    if wanted is not None and wanted > target.vocab_size:
        raise ConfigError(
            f"vocabulary (--draft-vocab) is {wanted}: the model has {target.vocab_size} tokens"
        )


def _rank(parts: Mapping[str, Any]) -> int:
    """The largest rank of the low-rank parts in a tree."""
    ranks = (
        _rank(part) if isinstance(part, Mapping) else part.shape[-1] * (name == "down")
        for name, part in parts.items()
    )
    return max(ranks, default=0)


def vocabulary_of(
    config: TrainDraftConfig, start: OwnVocabulary | None, corpus: Corpus, vocab_size: int
) -> np.ndarray | None:
    """The tokens that can be drafted: those of the draft to start from, or the data's frequent."""
    wanted = config.vocabulary
    if start is not None and start.vocabulary is not None:
        return np.asarray(start.vocabulary)
    if wanted is None:
        return None
    learnt = np.bincount(corpus.rows.tokens[corpus.rows.learn], minlength=vocab_size)
    # What is only read counts a little: answers repeat words of their questions.
    read = np.bincount(corpus.rows.tokens[~corpus.rows.learn], minlength=vocab_size)
    return frequent_tokens(learnt + 0.1 * read, wanted)
