"""The optimizer: an optax chain of clipping, an update rule, and a schedule."""

import optax

from s3d_jax.settings.training import OptimizerConfig


def learning_rate_schedule(config: OptimizerConfig) -> optax.Schedule:
    """Update number (from 0) -> learning rate."""
    warmup, peak = config.warmup, config.learning_rate
    rest = config.steps - warmup
    after = {
        "cosine": optax.cosine_decay_schedule(peak, rest, config.final_fraction),
        "linear": optax.linear_schedule(peak, peak * config.final_fraction, rest),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    # (i + 1) / warmup: the first update has a rate above 0.
    before = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    return optax.join_schedules([before, after], [warmup]) if warmup else after


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """The optax chain of the settings."""
    rate = learning_rate_schedule(config)
    decay = dict(weight_decay=config.weight_decay, mask=_is_matrix)
    update = {
        "adamw": lambda: optax.adamw(rate, b2=config.beta2, **decay),
        # optax.adafactor itself applies the decay without the learning rate.
        "adafactor": lambda: optax.chain(
            optax.scale_by_factored_rms(min_dim_size_to_factor=8),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(config.weight_decay, mask=_is_matrix),
            optax.scale_by_learning_rate(rate),
        ),
        "lion": lambda: optax.lion(rate, b2=config.beta2, **decay),
    }[config.optimizer]()
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)


def _is_matrix(tree: optax.Params) -> optax.Params:
    import jax

    return jax.tree.map(lambda x: x.ndim >= 2, tree)
