"""The training task of a draft, in three modes: mask, adapter, full (see docs/training.md)."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from s3d_jax.errors import ConfigError
from s3d_jax.nn.cache import KVCache
from s3d_jax.nn.draft import (
    DraftParams,
    OwnVocabulary,
    bridge_name,
    mean_embedding,
    untrained_draft,
)
from s3d_jax.nn.sharding import as_in_files, in_memory
from s3d_jax.nn.streams import draft_stream, text_states
from s3d_jax.nn.transformer import abstract_params, logits_of
from s3d_jax.settings.drafting import DraftConfig
from s3d_jax.settings.model import ModelConfig
from s3d_jax.settings.training import AdapterConfig, ObjectiveConfig
from s3d_jax.storage.trees import flatten, unflatten
from s3d_jax.train.bridges import gaps
from s3d_jax.train.objective import (
    Mean,
    agreement,
    block_targets,
    divergence,
    next_anchors,
    next_token_loss,
    random_anchors,
)
from s3d_jax.weights.formats import trainable
from s3d_jax.weights.trees import Params, float_dtype

NO_ADAPTER = AdapterConfig(rank=0, bridge_rank=0, chain_rank=0, recall=0)


def init_draft(
    config: ModelConfig,
    params: Params,
    draft_config: DraftConfig,
    adapter: AdapterConfig,
    key: jax.Array,
) -> DraftParams:
    """A draft that computes the same as the untrained one: every low-rank part starts with up = 0.

    Args:
        config, params: the target; of `params` the embedding and the norms' type are used. The
            draft has the shapes that it has in files, whatever its `shards`.
        draft_config: an embedding is made for each mask, one at least.
        adapter: ranks.
        key: typed PRNG key.

    Returns:
        Parameters in float32.
    """
    masks_key, key = jax.random.split(key)
    mean = untrained_draft(config, params).mask_embeddings.astype(jnp.float32)
    deviation = jnp.sqrt(jnp.mean(mean_embedding(config, params, 2)) - jnp.mean(mean) ** 2)
    shape = (max(draft_config.num_masks, 1), config.hidden_size)
    masks = mean + 1e-3 * deviation * jax.random.normal(masks_key, shape)

    keys = iter(jax.random.split(key, 8 * config.num_layers + 8))

    def factors(shape: tuple[int, int], rank: int) -> dict[str, jax.Array]:
        fan_in, fan_out = shape
        down = jax.random.normal(next(keys), (fan_in, rank)) * fan_in**-0.5
        return {"down": down, "up": jnp.zeros((rank, fan_out))}

    deltas: dict[str, Any] = {}
    kept = [i for i, skipped in enumerate(draft_config.skip) if not skipped]
    if adapter.rank:
        unquantized = abstract_params(config.unquantized().replace(shards=1, over_data=False))
        for i in kept:
            layer = unquantized[f"layers_{i}"]
            deltas[f"layers_{i}"] = {
                part: {
                    name: factors(layer[part][name]["weight"].shape[::-1], adapter.rank)
                    for name in names
                }
                for part, names in (("attention", ("qkv", "out")), ("mlp", ("gate_up", "down")))
            }
    bridges: dict[str, Any] = {}
    if adapter.bridge_rank:
        size = config.hidden_size
        known = adapter.recall * config.num_kv_heads * config.head_dim
        for layer in gaps(draft_config.skip):
            name = bridge_name(layer, config.num_layers)
            bridges[name] = factors((size + known, size), adapter.bridge_rank)
    chain = {}
    if adapter.chain_rank:
        size = config.hidden_size
        chain = factors((2 * size, size), adapter.chain_rank)
    return DraftParams(mask_embeddings=masks, deltas=deltas, bridges=bridges, chain=chain)


def check_adapter(config: ModelConfig, draft_config: DraftConfig, adapter: AdapterConfig) -> None:
    """Raises ConfigError unless the parts of a draft fit together and to the model."""
    draft_config.validate_for(config)
    if adapter.chain_rank and not draft_config.num_masks:
        raise ConfigError(
            "a chain (chain_rank, --chain-rank) joins draft tokens, and with gamma 1 there is "
            "only one"
        )
    if adapter.recall > config.num_layers:
        raise ConfigError(
            f"recall (--recall) is {adapter.recall}: the model has {config.num_layers} layers"
        )
    if adapter.recall and not (adapter.bridge_rank and any(draft_config.skip)):
        raise ConfigError(
            "bridges recall (recall, --recall), and there are none with bridge_rank 0 "
            "(--bridge-rank) or without skipped layers (--skip)"
        )


def _copied_into(new: Any, old: Any) -> Any:
    """The new arrays with the old ones written over their leading parts, as far as they fit."""
    if isinstance(new, Mapping):
        return {k: _copied_into(x, old[k]) if k in old else x for k, x in new.items()}
    common = tuple(slice(min(sizes)) for sizes in zip(new.shape, old.shape, strict=True))
    return new.at[common].set(old[common])


def _without_effect(bridges: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
    """The bridges, whose old features do not read what is newly recalled."""
    found = dict(bridges)
    for name, factors in old.items():
        rows, features = factors["down"].shape
        down = bridges[name]["down"].at[rows:, :features].set(0.0)
        found[name] = {**bridges[name], "down": down}
    return found


def frequent_tokens(counts: np.ndarray, count: int) -> np.ndarray:
    """The most frequent tokens, of equally frequent ones the lower ids: int32 [count], ascending.

    Tokenizers that merge pairs give frequent tokens low ids.

    Args:
        counts: [V], how often each token occurs.
        count: at most V.
    """
    return np.sort(np.argsort(-counts, kind="stable")[:count]).astype(np.int32)


def check_trainable(config: ModelConfig) -> None:
    """Raises ConfigError if the matrices of a model have no gradients."""
    if not trainable(config):
        raise ConfigError(
            f"mode 'full' changes the target's weights, and these are {config.quantization}: "
            "train the checkpoint that they were made from, and quantize the result"
        )


class DraftTask:
    """The `Task` of training a draft.

    The trained tree is {"draft": DraftParams}; in mode "full" it also has {"layers": the kept
    layers}.

    Args:
        config, params: the target.
        draft_config: skip, γ, block attention, mode.
        mode, objective, adapter, next_token_weight, remat: as in `TrainDraftConfig`.
        start: a draft to start from, with any γ and at most the ranks of `adapter`; None starts
            from the untrained one.
        vocabulary: int32 [V'], ascending, the tokens that can be drafted; None is all.

    Raises:
        ConfigError: settings that do not fit together.

    Attributes:
        frozen: the target's parameters, an argument of the step, never of the optimizer.
        loss_weights, loss_scale: see `Task`.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        draft_config: DraftConfig,
        *,
        mode: str = "adapter",
        objective: ObjectiveConfig = ObjectiveConfig(),
        adapter: AdapterConfig = AdapterConfig(),
        start: DraftParams | None = None,
        vocabulary: np.ndarray | None = None,
        next_token_weight: float = 1.0,
        remat: bool = False,
    ) -> None:
        if mode not in ("adapter", "mask", "full"):
            raise ConfigError(f"mode must be 'adapter', 'mask' or 'full', got {mode!r}")
        check_adapter(config, draft_config, adapter if mode == "adapter" else NO_ADAPTER)
        if mode == "mask" and not draft_config.num_masks:
            raise ConfigError("mode 'mask' with gamma 1 has nothing to train: no mask is used")
        if mode == "full":
            check_trainable(config)
        self.config = config
        self.frozen = params
        self.draft_config = draft_config
        self.mode = mode
        self.objective = objective
        self.adapter = adapter if mode == "adapter" else NO_ADAPTER
        self.start = start
        self.vocabulary = None if vocabulary is None else jnp.asarray(vocabulary)
        self.loss_weights = {"draft_loss": 1.0}
        if mode == "full":
            self.loss_weights["next_token_loss"] = next_token_weight
        self.loss_scale = 1024.0 if config.dtype == "float16" else 1.0
        self.remat = remat

    def init(self, key: jax.Array, frozen: Params) -> dict[str, Any]:
        """The trained tree, float32, with arrays as in files."""
        draft = init_draft(self.config, frozen, self.draft_config, self.adapter, key)
        if self.start is not None:
            draft = DraftParams(
                mask_embeddings=_copied_into(draft.mask_embeddings, self.start.mask_embeddings),
                deltas=_copied_into(draft.deltas, self.start.deltas),
                bridges=_without_effect(
                    _copied_into(draft.bridges, self.start.bridges), self.start.bridges
                ),
                chain=_copied_into(draft.chain, self.start.chain),
            )
        tree: dict[str, Any] = {"draft": draft}
        if self.mode == "full":
            kept = [f"layers_{i}" for i, s in enumerate(self.draft_config.skip) if not s]
            # Copies: the step donates the trained tree, and the frozen target must survive that.
            layers = flatten({name: dict(frozen[name]) for name in kept})
            tree["layers"] = unflatten(
                {
                    path: jnp.array(as_in_files(self.config, path, x), jnp.float32, copy=True)
                    for path, x in layers.items()
                }
            )
        return tree

    def untrained(self) -> DraftParams:
        """The draft before any training or fit."""
        return untrained_draft(self.config, self.frozen)

    def arranged(self, tree: Mapping[str, Any], dtype: Any) -> tuple[Params, DraftParams]:
        """(trained layers, draft), as the model needs them; layers of that type, {} without any."""
        layers = jax.tree.map(lambda x: x.astype(dtype), tree.get("layers", {}))
        layers = in_memory(self.config, layers, over_data=True)
        draft = in_memory(self.config, tree["draft"], over_data=False)
        # The vocabulary is not trained, and its ids are no numbers for the optimizer.
        return layers, draft.replace(vocabulary=self.vocabulary)

    def losses(
        self,
        tree: Mapping[str, Any],
        frozen: Params,
        batch: Mapping[str, jax.Array],
        key: jax.Array,
    ) -> dict[str, Mean]:
        """The losses of one batch, and other metrics.

        Args:
            tree: the trained tree.
            frozen: the target's parameters.
            batch: {"tokens": int [B, T], "learn": bool [B, T]}.
            key: of the anchors.
        """
        layers, draft = self.arranged(tree, float_dtype(frozen))
        return draft_losses(
            self.config,
            {**frozen, **layers},
            self.draft_config,
            draft,
            self.objective,
            batch,
            key,
            target_is_trained=self.mode == "full",
            remat=self.remat,
        )


def draft_losses(
    config: ModelConfig,
    params: Params,
    draft_config: DraftConfig,
    draft: DraftParams,
    objective: ObjectiveConfig,
    batch: Mapping[str, jax.Array],
    key: jax.Array,
    *,
    target_is_trained: bool,
    remat: bool,
) -> dict[str, Mean]:
    """`losses_at_anchors` of S3D's draft pass."""

    def stream(
        params: Params,
        draft: DraftParams,
        tokens: jax.Array,
        anchors: jax.Array,
        hidden: jax.Array,
        cache: KVCache,
    ) -> jax.Array:
        return draft_stream(
            config, params, draft_config, draft, tokens, anchors, cache, remat=remat
        )

    return losses_at_anchors(
        config,
        params,
        draft_config.gamma,
        draft,
        stream,
        objective,
        batch,
        key,
        block_slots=draft_config.gamma,
        target_is_trained=target_is_trained,
        remat=remat,
    )


# (the target's parameters, the draft's, tokens [B, T], anchors [B, A], what the target's head reads
# at the tokens [B, T, D], its cache of them) -> float32 [B, A·γ, V], as of `draft_stream`
DraftStream = Callable[[Params, Any, jax.Array, jax.Array, jax.Array, KVCache], jax.Array]


def losses_at_anchors(
    config: ModelConfig,
    params: Params,
    gamma: int,
    draft: OwnVocabulary,
    stream: DraftStream,
    objective: ObjectiveConfig,
    batch: Mapping[str, jax.Array],
    key: jax.Array,
    *,
    block_slots: int = 0,
    target_is_trained: bool = False,
    remat: bool = False,
) -> dict[str, Mean]:
    """The losses of one batch.

    Args:
        config, params, gamma, draft: the target, γ, and its draft.
        stream: what the draft gives at the anchors.
        objective: which losses, at which anchors.
        batch: {"tokens": int [B, T], "learn": bool [B, T]}.
        key: of the anchors.
        block_slots: of the cache, which the stream needs for each anchor.
        target_is_trained: gradients flow into `params` too, and the target has its own loss. The
            target's distributions stay constants of the draft's loss: the target is not trained
            to be easy to guess.
        remat: see `forward`.

    Returns:
        "draft_loss"; "agreement", see `agreement`; and "next_token_loss" where the target is
        trained.
    """
    tokens, learn = batch["tokens"], batch["learn"]
    anchors = random_anchors(key, learn, min(objective.anchors, tokens.shape[1] - 1))
    # KL compares what the target gives to the tokens that can be drafted, so it needs no others.
    fewer = objective.objective == "kl" and not target_is_trained
    slots = tokens.shape[1] + anchors.shape[1] * block_slots
    hidden, cache = text_states(config, params, tokens, slots, remat=remat)
    logits = logits_of(config, params, hidden, draft if fewer else None)
    if not target_is_trained:
        hidden, cache = jax.lax.stop_gradient((hidden, cache))
    if objective.hop:
        _, targets, _ = block_targets(tokens, learn, anchors, gamma, objective.decay)
        targets = draft.indices(targets, config.vocab_size)
        constant = jax.lax.stop_gradient((params, draft, hidden, cache))
        q = stream(*constant[:2], tokens, anchors, *constant[2:])
        anchors = next_anchors(anchors, q, targets, gamma, tokens.shape[1])
    rows, targets, weights = block_targets(tokens, learn, anchors, gamma, objective.decay)
    targets = draft.indices(targets, config.vocab_size)
    q = stream(params, draft, tokens, anchors, hidden, cache)
    log_p, learnt = None, weights
    if objective.objective != "ce":
        log_p = jnp.take_along_axis(jax.lax.stop_gradient(logits), rows[:, :, None], axis=1)
        if objective.objective == "tv":  # what cannot be drafted is lost
            log_p = jax.nn.log_softmax(log_p)
        if draft.vocabulary is not None and not fewer:
            log_p = log_p[:, :, draft.vocabulary]
        if objective.objective == "kl":
            log_p = jax.nn.log_softmax(log_p)
    else:
        # A block is worth nothing from a token on that the draft cannot propose.
        possible = jnp.cumprod((targets >= 0).reshape(-1, gamma), axis=1)
        learnt = weights * possible.reshape(weights.shape)
    losses = divergence(objective.objective, q, log_p, targets)
    full_weight = anchors.size * sum(objective.decay**i for i in range(gamma))
    loss = Mean(jnp.sum(losses * learnt), jnp.sum(learnt), full_weight)
    metrics = {"draft_loss": loss, "agreement": agreement(q, targets, weights, gamma)}
    if target_is_trained:
        metrics["next_token_loss"] = next_token_loss(logits, tokens, learn)
    return metrics
