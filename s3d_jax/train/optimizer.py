"""The optimiser: an optax chain of clipping, AdamW, Adafactor or Lion, and a schedule."""

import dataclasses

import optax

from s3d_jax.errors import ConfigError

OPTIMIZERS = ("adamw", "adafactor", "lion")
SCHEDULES = ("cosine", "linear", "constant")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How the trained weights are updated.

    Attributes:
        steps: updates in all.
        optimizer: "adamw" (Loshchilov and Hutter, arXiv 1711.05101), "adafactor" (Shazeer and
            Stern, 1804.04235; least memory) or "lion" (Chen et al., 2302.06675).
        learning_rate: at its peak.
        schedule: after the warm-up, "cosine" or "linear" down to `final_fraction`, or "constant".
        warmup_steps: updates in which the rate grows linearly from 0.
        final_fraction: of the peak rate that "cosine" and "linear" end with.
        weight_decay: decoupled, on matrices only (vectors are norms and biases).
        clip_norm: gradients of a larger global norm are scaled down to it.
        beta2: of AdamW's second moment.
    """

    steps: int
    optimizer: str = "adamw"
    learning_rate: float = 2e-3
    schedule: str = "cosine"
    warmup_steps: int = 50
    final_fraction: float = 0.05
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    beta2: float = 0.99

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ConfigError(f"optimizer must be one of {OPTIMIZERS}, got {self.optimizer!r}")
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"schedule must be one of {SCHEDULES}, got {self.schedule!r}")
        if self.steps < 1:
            raise ConfigError(f"steps must be at least 1, got {self.steps}")
        if self.warmup_steps < 0:
            raise ConfigError(f"warmup_steps must be at least 0, got {self.warmup_steps}")
        if not 0 <= self.final_fraction <= 1:
            raise ConfigError(f"final_fraction must be in [0, 1], got {self.final_fraction}")
        if not self.weight_decay >= 0:
            raise ConfigError(f"weight_decay must be >= 0, got {self.weight_decay}")
        if not 0 < self.beta2 < 1:
            raise ConfigError(f"beta2 must be in (0, 1), got {self.beta2}")
        for name in ("learning_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be > 0, got {getattr(self, name)}")

    @property
    def warmup(self) -> int:
        """Updates of the warm-up: `warmup_steps`, or all but the last one of a shorter run."""
        return min(self.warmup_steps, self.steps - 1)

    def learning_rate_at(self) -> optax.Schedule:
        """Update number -> learning rate."""
        warmup = self.warmup
        end, rest = self.learning_rate * self.final_fraction, self.steps - warmup
        after = {
            "cosine": optax.cosine_decay_schedule(self.learning_rate, rest, self.final_fraction),
            "linear": optax.linear_schedule(self.learning_rate, end, rest),
            "constant": optax.constant_schedule(self.learning_rate),
        }[self.schedule]
        # (i + 1) / warmup: the first update has a rate above 0.
        before = optax.linear_schedule(
            self.learning_rate / max(warmup, 1), self.learning_rate, max(warmup - 1, 1)
        )
        return optax.join_schedules([before, after], [warmup]) if warmup else after

    def build(self) -> optax.GradientTransformation:
        """The optax chain."""
        rate = self.learning_rate_at()
        decay = dict(weight_decay=self.weight_decay, mask=_is_matrix)
        update = {
            "adamw": lambda: optax.adamw(rate, b2=self.beta2, **decay),
            # optax.adafactor itself would apply the decay without the learning rate.
            "adafactor": lambda: optax.chain(
                optax.scale_by_factored_rms(min_dim_size_to_factor=8),
                optax.clip_by_block_rms(1.0),
                optax.add_decayed_weights(self.weight_decay, mask=_is_matrix),
                optax.scale_by_learning_rate(rate),
            ),
            "lion": lambda: optax.lion(rate, b2=self.beta2, **decay),
        }[self.optimizer]()
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), update)


def _is_matrix(tree: optax.Params) -> optax.Params:
    import jax

    return jax.tree.map(lambda x: x.ndim >= 2, tree)
