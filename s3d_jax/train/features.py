"""The training task of drafts that read hidden states: in the style of EAGLE, and of Medusa."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from s3d_jax.keys import make_key
from s3d_jax.nn.features import FeatureDraft, feature_stream, new_weights
from s3d_jax.settings.drafting import FeatureConfig
from s3d_jax.settings.model import ModelConfig
from s3d_jax.settings.training import ObjectiveConfig
from s3d_jax.train.draft import losses_at_anchors
from s3d_jax.train.objective import Mean
from s3d_jax.weights.trees import Params, float_dtype


class FeatureTask:
    """The `Task` of training a draft of the kinds "eagle" and "medusa".

    The trained tree is {"draft": FeatureDraft}. Blocks, anchors and losses are those of S3D's
    drafts, so that the kinds can be compared.

    Args:
        kind: "eagle" or "medusa".
        config, params: the target.
        draft_config: γ.
        objective: as in `TrainDraftConfig`.
        start: a draft of the kind to start from; None begins as `new_weights`.
        vocabulary: int32 [V'], ascending, the tokens that can be drafted; None is all.

    Attributes:
        frozen, loss_weights, loss_scale: see `Task`.
        fuse: float32 [D, 2·D] of EAGLE to begin with (`bridges.fitted_fuse`); None does not.
    """

    def __init__(
        self,
        kind: str,
        config: ModelConfig,
        params: Params,
        draft_config: FeatureConfig,
        *,
        objective: ObjectiveConfig = ObjectiveConfig(),
        start: FeatureDraft | None = None,
        vocabulary: np.ndarray | None = None,
    ) -> None:
        self.kind = kind
        self.config = config
        self.frozen = params
        self.draft_config = draft_config
        self.objective = objective
        self.start = start
        self.fuse: np.ndarray | None = None
        self.vocabulary = None if vocabulary is None else jnp.asarray(vocabulary)
        self.loss_weights = {"draft_loss": 1.0}
        self.loss_scale = 1024.0 if config.dtype == "float16" else 1.0

    def init(self, key: jax.Array, frozen: Params) -> dict[str, Any]:
        """The trained tree, float32."""
        if self.start is not None:
            weights = jax.tree.map(lambda x: jnp.array(x, jnp.float32), self.start.weights)
        else:
            weights = new_weights(self.kind, self.config, frozen, self.draft_config.gamma, key)
        if self.fuse is not None:
            weights["fuse"] = {"weight": jnp.asarray(self.fuse)}
        return {"draft": FeatureDraft(weights)}

    def untrained(self) -> FeatureDraft:
        """A draft before any training or fit."""
        gamma, key = self.draft_config.gamma, make_key(0)
        weights = new_weights(self.kind, self.config, self.frozen, gamma, key)
        return FeatureDraft(jax.tree.map(lambda x: x.astype(self.config.dtype), weights))

    def arranged(self, tree: Mapping[str, Any], dtype: Any) -> tuple[Params, FeatureDraft]:
        """({}, draft): there are no layers of the target; the draft is of that type."""
        weights = jax.tree.map(lambda x: x.astype(dtype), tree["draft"].weights)
        return {}, FeatureDraft(weights, vocabulary=self.vocabulary)

    def losses(
        self,
        tree: Mapping[str, Any],
        frozen: Params,
        batch: Mapping[str, jax.Array],
        key: jax.Array,
    ) -> dict[str, Mean]:
        """The losses of one batch, see `losses_at_anchors`."""
        _, draft = self.arranged(tree, float_dtype(frozen))
        gamma = self.draft_config.gamma
        return losses_at_anchors(
            self.config,
            frozen,
            gamma,
            draft,
            lambda params, draft, tokens, anchors, hidden, _: feature_stream(
                self.kind, self.config, params, gamma, draft, tokens, anchors, hidden
            ),
            self.objective,
            batch,
            key,
        )
