"""Training a model from scratch: precision."""

import jax
import jax.numpy as jnp
import pytest

from s3d_jax.errors import ConfigError
from s3d_jax.settings.drafting import DraftConfig, symmetric_skip
from s3d_jax.settings.training import ObjectiveConfig
from s3d_jax.train.pretrain import PretrainTask
from tests.tiny import tiny_config


def test_mixed_precision_keeps_weights_and_gradients_in_float32():
    """Products are in bfloat16; gradients match float32 to within its rounding."""
    batch = {
        "tokens": jax.random.randint(jax.random.key(1), (2, 16), 0, 31),
        "learn": jnp.ones((2, 16), bool),
    }
    found = {}
    for dtype in ("float32", "bfloat16"):
        task = PretrainTask(
            tiny_config(),
            draft_config=DraftConfig(symmetric_skip(4, 2), 3),
            objective=ObjectiveConfig(anchors=4, hop=False),
            compute_dtype=dtype,
        )
        tree = task.init(jax.random.key(0))

        def minimized(tree, task=task):
            means = task.losses(tree, task.frozen, batch, jax.random.key(2))
            return sum(means[name].loss for name in task.loss_weights)

        gradient = jax.grad(minimized)
        program = str(jax.make_jaxpr(gradient)(tree))
        assert ("bf16" in program) == (dtype == "bfloat16")
        gradients = jax.jit(gradient)(tree)
        assert {x.dtype.name for x in jax.tree.leaves(gradients)} == {"float32"}
        found[dtype] = jnp.concatenate([x.ravel() for x in jax.tree.leaves(gradients)])
    difference = jnp.linalg.norm(found["bfloat16"] - found["float32"])
    assert 0 < difference < 0.02 * jnp.linalg.norm(found["float32"])


def test_other_precisions_are_refused():
    with pytest.raises(ConfigError, match="compute_dtype must be float32 or bfloat16"):
        PretrainTask(tiny_config(), compute_dtype="float16")
