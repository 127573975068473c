"""Training objectives of a draft: blocks at many anchors of a text, and losses of their tokens.

Letters: B rows, T tokens of a row, A anchors per row, γ draft tokens, V vocabulary.
"""

import flax.struct
import jax
import jax.numpy as jnp


def random_anchors(key: jax.Array, learn: jax.Array, count: int) -> jax.Array:
    """Draws anchors whose next token is learnt, without repetition.

    Args:
        key: typed PRNG key.
        learn: bool [B, T].
        count: A.

    Returns:
        int32 [B, A]. A row with fewer than A such places gets others as well, whose weight is 0
        since none of their tokens is learnt.
    """
    allowed = learn[:, 1:]
    score = jnp.where(allowed, jax.random.uniform(key, allowed.shape), -1.0)
    return jax.lax.top_k(score, count)[1].astype(jnp.int32)


def block_targets(
    tokens: jax.Array, learn: jax.Array, anchors: jax.Array, gamma: int, decay: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The tokens that each block should draft.

    Args:
        tokens, learn: [B, T].
        anchors: int [B, A], x_n of each block.
        gamma: γ.
        decay: see ObjectiveConfig.

    Returns:
        (rows, targets, weights), each [B, A·γ]: the place in the text before the token; the token;
        and its weight, 0 after the end of the text.
    """
    batch, length = tokens.shape
    offsets = jnp.arange(gamma)
    rows = anchors[:, :, None] + offsets
    at = jnp.minimum(rows + 1, length - 1).reshape(batch, -1)
    targets = jnp.take_along_axis(tokens, at, axis=1)
    learnt = jnp.take_along_axis(learn, at, axis=1).reshape(rows.shape) & (rows + 1 < length)
    # A block ends with the text that it starts in: no token after a gap counts.
    learnt = jnp.cumprod(learnt, axis=2)
    weights = (learnt * jnp.float32(decay) ** offsets).reshape(batch, -1)
    return jnp.minimum(rows, length - 1).reshape(batch, -1), targets, weights


def next_anchors(
    anchors: jax.Array, draft: jax.Array, targets: jax.Array, gamma: int, length: int
) -> jax.Array:
    """Where greedy decoding continues after these blocks: at their bonus tokens.

    Args:
        anchors: int [B, A].
        draft: float32 [B, A·γ, V], the blocks' logits.
        targets: int [B, A·γ], the text's tokens, as indices into the draft's vocabulary.
        gamma: γ.
        length: T.

    Returns:
        int32 [B, A], at most T - 1, the last place of the row.
    """
    right = (jnp.argmax(draft, axis=-1) == targets).reshape(*anchors.shape, gamma)
    accepted = jnp.sum(jnp.cumprod(right, axis=2), axis=2)
    return jnp.minimum(anchors + accepted + 1, length - 1).astype(jnp.int32)


def divergence(
    objective: str, draft: jax.Array, target: jax.Array | None, tokens: jax.Array
) -> jax.Array:
    """The loss of each prediction, float32 [...].

    Args:
        objective: "ce", "kl" or "tv", see ObjectiveConfig.
        draft: float32 [..., V], the draft's logits; of the tokens that it can draft, if these are
            not all.
        target: float32 [..., V], log p of the same tokens; "ce" does not use them.
        tokens: int [...], the text's tokens, as indices into V; only "ce" uses them.
    """
    log_q = jax.nn.log_softmax(draft, axis=-1)
    if objective == "ce":
        return -jnp.take_along_axis(log_q, tokens[..., None], axis=-1)[..., 0]
    assert target is not None
    if objective == "kl":
        return jnp.sum(jnp.exp(target) * (target - log_q), axis=-1)
    return 1.0 - jnp.sum(jnp.minimum(jnp.exp(target), jnp.exp(log_q)), axis=-1)


class Mean(flax.struct.PyTreeNode):
    """A weighted mean as its two sums, so that the means of the parts of a batch can be added.

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
        """The minimized value: the mean, scaled by the share of the batch that is learnt.

        Every token counts the same, in whichever batch or part of a batch it is.
        """
        return self.total / self.full_weight


def agreement(draft: jax.Array, tokens: jax.Array, weights: jax.Array, gamma: int) -> Mean:
    """Share of blocks whose first i + 1 draft tokens all equal the text's, [γ].

    On the target's greedy output decoding accepts exactly these, so 1 + the sum is nearly τ.
    """
    right = (jnp.argmax(draft, axis=-1) == tokens).reshape(-1, gamma)
    whole = (weights > 0).reshape(-1, gamma)[:, -1:]  # blocks with all γ tokens
    total = jnp.sum(jnp.cumprod(right, axis=1) * whole, axis=0, dtype=jnp.float32)
    return Mean(total, jnp.sum(whole, dtype=jnp.float32), len(whole))


def next_token_loss(logits: jax.Array, tokens: jax.Array, learn: jax.Array) -> Mean:
    """Mean cross-entropy of the next token, over the tokens that are learnt.

    Args:
        logits: float32 [B, T, V].
        tokens, learn: [B, T].
    """
    losses = divergence("ce", logits[:, :-1], None, tokens[:, 1:])
    weights = learn[:, 1:].astype(jnp.float32)
    return Mean(jnp.sum(losses * weights), jnp.sum(weights), weights.size)
