"""The training task of a small model from scratch, optionally jointly with its draft."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from s3d_jax.errors import ConfigError
from s3d_jax.nn.sharding import in_memory
from s3d_jax.nn.streams import target_stream
from s3d_jax.nn.transformer import init_params
from s3d_jax.settings.drafting import DraftConfig
from s3d_jax.settings.model import ModelConfig
from s3d_jax.settings.training import AdapterConfig, ObjectiveConfig
from s3d_jax.train.draft import check_adapter, draft_losses, init_draft
from s3d_jax.train.objective import Mean, next_token_loss
from s3d_jax.weights.trees import Params


class PretrainTask:
    """The `Task` of training a model from scratch.

    The trained tree is {"params": Params}; where the model also learns to draft, it has {"draft":
    DraftParams} as well.

    Args:
        config: the model, with the `shards` of a mesh that it is trained on.
        draft_config, draft_weight, objective, adapter, remat: as in `PretrainConfig`.
        compute_dtype: of matrix products and activations, "float32" or "bfloat16" (mixed
            precision: weights, optimizer, losses and sums stay float32).

    Raises:
        ConfigError: another compute_dtype.

    Attributes:
        frozen: nothing.
        loss_weights, loss_scale: see `Task`; bfloat16 has the range of float32, and needs no scale.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        draft_config: DraftConfig | None = None,
        draft_weight: float = 0.2,
        objective: ObjectiveConfig = ObjectiveConfig(),
        adapter: AdapterConfig = AdapterConfig(),
        compute_dtype: str = "float32",
        remat: bool = False,
    ) -> None:
        if compute_dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"compute_dtype must be float32 or bfloat16, got {compute_dtype!r}")
        self.frozen: Params = {}
        self.config = config
        self.draft_config = draft_config
        self.loss_weights = {"next_token_loss": 1.0}
        self.loss_scale = 1.0
        if draft_config is not None:
            self.loss_weights["draft_loss"] = draft_weight
        self.objective = objective
        if draft_config is not None:
            check_adapter(config, draft_config, adapter)
        self.adapter = adapter
        self.compute_dtype = jnp.dtype(compute_dtype)
        self.remat = remat

    def init(self, key: jax.Array, frozen: Any = None) -> dict[str, Any]:
        """Random weights, N(0, 0.02²); at the end of residual branches they are √(2L) smaller."""
        key, draft_key = jax.random.split(key)
        params: Any = init_params(
            self.config.replace(dtype="float32", shards=1, over_data=False), key
        )
        shrink = (2 * self.config.num_layers) ** -0.5
        for i in range(self.config.num_layers):
            layer = params[f"layers_{i}"]
            for part, name in (("attention", "out"), ("mlp", "down")):
                layer[part][name]["weight"] = layer[part][name]["weight"] * shrink
        tree = {"params": params}
        if self.draft_config is not None:
            tree["draft"] = init_draft(
                self.config, params, self.draft_config, self.adapter, draft_key
            )
        return tree

    def arranged(self, tree: Mapping[str, Any]) -> dict[str, Any]:
        """The trained tree as the model needs it."""
        found = {"params": in_memory(self.config, tree["params"], over_data=True)}
        if "draft" in tree:
            found["draft"] = in_memory(self.config, tree["draft"], over_data=False)
        return found

    def losses(
        self, tree: Mapping[str, Any], frozen: Any, batch: Mapping[str, jax.Array], key: jax.Array
    ) -> dict[str, Mean]:
        """The losses of one batch; see `DraftTask.losses`."""
        tokens, learn = batch["tokens"], batch["learn"]
        params = jax.tree.map(lambda x: x.astype(self.compute_dtype), tree["params"])
        tree = self.arranged({**tree, "params": params})
        params = tree["params"]
        if self.draft_config is None:
            logits, _ = target_stream(
                self.config, params, tokens, tokens.shape[1], remat=self.remat
            )
            return {"next_token_loss": next_token_loss(logits, tokens, learn)}
        return draft_losses(
            self.config,
            params,
            self.draft_config,
            tree["draft"],
            self.objective,
            batch,
            key,
            target_is_trained=True,
            remat=self.remat,
        )
