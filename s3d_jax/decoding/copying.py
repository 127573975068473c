"""Copying: where a text repeats itself, what followed the last time is a draft that costs no pass.

As in prompt lookup decoding (Saxena 2023), and beside a drafter that runs a pass: an iteration in
which all rows copy leaves that pass out.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from s3d_jax.decoding.adaptive import ALWAYS, BY_BUDGET, NEVER

# Tokens that a copy continues, at least: as long as copies have not lost much, and after that.
_MATCH, _SURE_MATCH = 2, 4
_FIRST_STEPS, _CAPACITY = 4.0, 12.0  # tokens that may be lost


def repetition(tokens: jax.Array, n: jax.Array, longest: int) -> tuple[jax.Array, jax.Array]:
    """Where the end of each text stood before.

    Among all earlier places that end with the same tokens as the text, up to `longest` tokens, the
    longest match counts, and among equal ones the latest.

    Args:
        tokens: int [B, S]; a text is 0 … n.
        n: int [B].
        longest: static.

    Returns:
        (matched, period): int32 [B], how many tokens are the same, and how far back they are; 0
        where not even the last token occurs before.
    """
    n = n[:, None]
    slots = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    same, match = jnp.ones(tokens.shape, bool), jnp.zeros(tokens.shape, jnp.int32)
    # match[j]: how many of the tokens up to j equal the tokens up to n.
    for back in range(longest):
        ours = jnp.take_along_axis(tokens, jnp.maximum(n - back, 0), axis=1)
        theirs = jnp.pad(tokens, ((0, 0), (back, 0)), constant_values=-1)
        same = same & (theirs[:, : tokens.shape[1]] == ours)
        match = match + same
    match = jnp.where(slots < n, match, 0)
    matched = jnp.max(match, axis=1)
    found = (match == matched[:, None]) & (match > 0)
    place = jnp.max(jnp.where(found, slots, -1), axis=1)
    return matched, jnp.where(matched > 0, n[:, 0] - place, 0)


def continuation(tokens: jax.Array, n: jax.Array, period: jax.Array, count: int) -> jax.Array:
    """What followed the tokens up to n - period: int [B, count].

    A match less than `count` tokens back is continued as a repetition; period 0 repeats the last
    token.

    Args:
        tokens: int [B, S].
        n, period: int [B].
        count: static.
    """
    period = jnp.maximum(period, 1)[:, None]
    at = n[:, None] - period + 1 + jnp.arange(count) % period
    return jnp.take_along_axis(tokens, at, axis=1)


class Copying(flax.struct.PyTreeNode):
    """What each row may copy, and what it may still lose by copies that are not accepted.

    As in `Budget`, an iteration that commits t tokens gains t - c, where c tokens would be decoded
    in its time without copies. A row that has lost all copies only where more of the text matches.

    Attributes:
        matched: int32 [B], tokens at the text's end that stood there before.
        period: int32 [B], how far back.
        steps: float32 [B], tokens that the row may lose, 0 … `_CAPACITY`.
        cost: float32 [B], c.
        mode: int32 [B], BY_BUDGET, or NEVER or ALWAYS while costs are measured.
    """

    matched: jax.Array
    period: jax.Array
    steps: jax.Array
    cost: jax.Array
    mode: jax.Array

    @property
    def rows(self) -> jax.Array:
        """Rows that copy in the next iteration, bool [B]."""
        enough = self.matched >= jnp.where(self.steps > 0, _MATCH, _SURE_MATCH)
        return (enough & (self.mode != NEVER)) | (self.mode == ALWAYS)

    def settle(self, copied: jax.Array, accepted: jax.Array) -> "Copying":
        """After an iteration.

        Args:
            copied: bool [B], rows that copied in it and had not ended before.
            accepted: int32 [B], their accepted tokens.
        """
        counts = copied & (self.mode == BY_BUDGET)
        gained = jnp.where(counts, accepted + 1 - self.cost, 0.0)
        return self.replace(steps=jnp.clip(self.steps + gained, 0.0, _CAPACITY))

    def looked_up(self, tokens: jax.Array, n: jax.Array) -> "Copying":
        """For the texts 0 … n of `tokens`, int [B, S]."""
        matched, period = repetition(tokens, n, _SURE_MATCH)
        return self.replace(matched=matched, period=period)


def new_copying(batch: int, cost: float = 0.0) -> Copying:
    """Of `batch` rows before decoding; with a cost of 0 they always copy what they can."""
    arrays = (
        np.zeros(batch, np.int32),  # each its own array: the state is donated
        np.zeros(batch, np.int32),
        np.full(batch, _FIRST_STEPS, np.float32),
        np.full(batch, cost, np.float32),
        np.full(batch, BY_BUDGET, np.int32),
    )
    return Copying(*jax.device_put(arrays))
