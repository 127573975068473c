"""What a draft is trained for: blocks at many anchors of a text, and the worth of their guesses.

Letters: B rows, T tokens of a row, A anchors per row, γ draft tokens, V vocabulary.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from s3d_jax.errors import ConfigError

OBJECTIVES = ("ce", "kl", "tv")


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """How draft predictions are judged.

    Attributes:
        objective: "ce", cross-entropy on the text's own tokens (best where the text is the target's
            output); "kl", KL divergence of the draft from the target's distribution; "tv", total
            variation, 1 - Σ min(p, q), which is one minus the acceptance rate of sampling.
        decay: the i-th draft token (from 0) weighs decay^i: it counts only if all before it were
            accepted.
        anchors: blocks per row.
        hop: train at the places where decoding would go on after a block at a random place, and
            not at the random places themselves. Blocks of decoding begin behind a token that was
            hard to guess, so random places are too easy; finding the others costs one more draft
            pass without gradients.
    """

    objective: str = "ce"
    decay: float = 0.85
    anchors: int = 16
    hop: bool = True

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"objective must be one of {OBJECTIVES}, got {self.objective!r}")
        if not 0 < self.decay <= 1:
            raise ConfigError(f"decay must be in (0, 1], got {self.decay}")
        if self.anchors < 1:
            raise ConfigError(f"anchors must be at least 1, got {self.anchors}")


def random_anchors(key: jax.Array, learn: jax.Array, count: int) -> jax.Array:
    """Anchors whose next token is to be learnt, drawn without repetition.

    Args:
        key: typed PRNG key.
        learn: bool [B, T].
        count: A.

    Returns:
        int32 [B, A]. A row with fewer than A such places is filled up with others, which weigh
        nothing since none of their tokens is learnt.
    """
    allowed = learn[:, 1:]
    score = jnp.where(allowed, jax.random.uniform(key, allowed.shape), -1.0)
    return jax.lax.top_k(score, count)[1].astype(jnp.int32)


def block_targets(
    tokens: jax.Array, learn: jax.Array, anchors: jax.Array, gamma: int, decay: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the draft tokens of each block should be.

    Args:
        tokens, learn: [B, T].
        anchors: int [B, A], x_n of each block.
        gamma: γ.
        decay: see ObjectiveConfig.

    Returns:
        (rows, targets, weights), each [B, A·γ]: the place in the text whose next token it is; that
        token; and its weight, 0 behind the end of the text.
    """
    batch, length = tokens.shape
    offsets = jnp.arange(gamma)
    rows = anchors[:, :, None] + offsets
    at = jnp.minimum(rows + 1, length - 1).reshape(batch, -1)
    targets = jnp.take_along_axis(tokens, at, axis=1)
    learnt = jnp.take_along_axis(learn, at, axis=1).reshape(rows.shape) & (rows + 1 < length)
    # A block ends with the text it began in: no token behind a gap counts.
    learnt = jnp.cumprod(learnt, axis=2)
    weights = (learnt * jnp.float32(decay) ** offsets).reshape(batch, -1)
    return jnp.minimum(rows, length - 1).reshape(batch, -1), targets, weights


def next_anchors(
    anchors: jax.Array, draft: jax.Array, targets: jax.Array, gamma: int, length: int
) -> jax.Array:
    """Where greedy decoding goes on after these blocks: behind the accepted tokens and the bonus.

    Args:
        anchors: int [B, A].
        draft: float32 [B, A·γ, V], the blocks' logits.
        targets: int [B, A·γ], the text's tokens.
        gamma: γ.
        length: T.

    Returns:
        int32 [B, A]; the last place of the row where decoding is through with it.
    """
    right = (jnp.argmax(draft, axis=-1) == targets).reshape(*anchors.shape, gamma)
    accepted = jnp.sum(jnp.cumprod(right, axis=2), axis=2)
    return jnp.minimum(anchors + accepted + 1, length - 1).astype(jnp.int32)


def divergence(
    objective: str, draft: jax.Array, target: jax.Array | None, tokens: jax.Array
) -> jax.Array:
    """The loss of each prediction, float32 [...].

    Args:
        objective: see ObjectiveConfig.
        draft: float32 [..., V], the draft's logits.
        target: float32 [..., V], the target's; "ce" needs none.
        tokens: int [...], the text's tokens; "ce" alone looks at them.
    """
    log_q = jax.nn.log_softmax(draft, axis=-1)
    if objective == "ce":
        return -jnp.take_along_axis(log_q, tokens[..., None], axis=-1)[..., 0]
    assert target is not None
    if objective == "kl":
        log_p = jax.nn.log_softmax(target, axis=-1)
        return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    p = jax.nn.softmax(target, axis=-1)
    return 1.0 - jnp.sum(jnp.minimum(p, jnp.exp(log_q)), axis=-1)


class Mean(flax.struct.PyTreeNode):
    """A weighted mean in parts, so that those of the parts of a batch can be added.

    Attributes:
        total: Σ w·v, float32 of any shape.
        weight: Σ w, float32 [].
        full_weight: static, the weight of a batch without padding.
    """

    total: jax.Array
    weight: jax.Array
    full_weight: float = flax.struct.field(pytree_node=False)

    @property
    def value(self) -> jax.Array:
        """The mean; 0 where nothing weighs."""
        return self.total / jnp.maximum(self.weight, 1e-9)

    @property
    def loss(self) -> jax.Array:
        """What is minimised: the mean, scaled by the share of the batch that is learnt.

        So every token counts the same, in whichever batch or part of a batch it is.
        """
        return self.total / self.full_weight


def agreement(draft: jax.Array, tokens: jax.Array, weights: jax.Array, gamma: int) -> Mean:
    """Share of blocks whose first i+1 draft tokens are all the text's own, [γ].

    On the target's greedy output this is what decoding would accept, so 1 + its sum is nearly τ.
    """
    right = (jnp.argmax(draft, axis=-1) == tokens).reshape(-1, gamma)
    whole = (weights > 0).reshape(-1, gamma)[:, -1:]  # blocks with all γ tokens
    total = jnp.sum(jnp.cumprod(right, axis=1) * whole, axis=0, dtype=jnp.float32)
    return Mean(total, jnp.sum(whole, dtype=jnp.float32), len(whole))


def next_token_loss(logits: jax.Array, tokens: jax.Array, learn: jax.Array) -> Mean:
    """Mean cross-entropy of the next token, over those that are learnt.

    Args:
        logits: float32 [B, T, V].
        tokens, learn: [B, T].
    """
    losses = divergence("ce", logits[:, :-1], None, tokens[:, 1:])
    weights = learn[:, 1:].astype(jnp.float32)
    return Mean(jnp.sum(losses * weights), jnp.sum(weights), weights.size)
