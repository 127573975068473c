"""Layers of the model: linear, norm, MLP, embedding; and the low-rank parts of a draft.

Matrices are stored and multiplied by the model's weight format.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from s3d_jax.nn.sharding import split, with_whole
from s3d_jax.settings.model import ModelConfig
from s3d_jax.weights import exact
from s3d_jax.weights.base import INIT_DEVIATION, Arrays
from s3d_jax.weights.dense import product
from s3d_jax.weights.formats import EMBED, exact_sums, weight_format

_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def random_weight(key: jax.Array, shape: tuple[int, int], dtype: Any) -> jax.Array:
    """N(0, 0.02²), [out, in].

    Drawn as [in, out]: seeds still give the models of the recipes' logs, which are from before
    weights were stored as [out, in].
    """
    return jax.random.normal(key, shape[::-1], dtype).T * jnp.asarray(INIT_DEVIATION, dtype)


class Linear(nn.Module):
    """A linear layer: weight [out, in], an optional bias [out], a low-rank delta if given one.

    Attributes:
        config: of the model; names the weight format.
        features: out.
        use_bias: whether there is a bias.
        out_dtype: of the result; None is the input's.
        token_rows: rows of [B, T, in], the first ones, that get no delta.
    """

    config: ModelConfig
    features: int
    use_bias: bool = False
    out_dtype: str | None = None
    token_rows: int = 0

    @nn.compact
    def __call__(self, x: jax.Array, delta: Mapping[str, jax.Array] | None = None) -> jax.Array:
        """[..., in] -> [..., out]."""
        path, dtype = "/".join(self.path), self.config.dtype
        weights = weight_format(self.config, path)
        shape = self.features, x.shape[-1]
        matrix = weights.declare(self, "weight", shape, dtype, random_weight)
        multiply = functools.partial(
            weights.multiply, out_dtype=jnp.dtype(self.out_dtype or x.dtype)
        )
        y = with_whole(self.config, path, weights.parts("weight"), multiply, x, matrix)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,), jnp.dtype(dtype))
        if delta is None:
            return y
        if not self.token_rows:
            return y + low_rank(x, delta)
        # Nothing is added to the other rows, not even 0: they are the target's to the bit.
        tokens, masks = slice(self.token_rows), slice(self.token_rows, None)
        return jnp.concatenate([y[:, tokens], y[:, masks] + low_rank(x[:, masks], delta)], axis=1)


def low_rank(
    x: jax.Array,
    factors: Mapping[str, jax.Array],
    activation: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """`x @ down @ up`, with an optional activation between the two products.

    Args:
        x: [..., in].
        factors: {"down": [in, r], "up": [r, out]}, of any float type; cast to the type of `x`.
        activation: applied to the r features.

    Returns:
        [..., out], of the type of `x`.
    """
    rows = x.reshape(-1, x.shape[-1])
    features = product(rows, factors["down"].astype(x.dtype), 1, 0).astype(x.dtype)
    features = features if activation is None else activation(features)
    out = product(features, factors["up"].astype(x.dtype), 1, 0).astype(x.dtype)
    return out.reshape(*x.shape[:-1], -1)


def bridge(
    x: jax.Array,
    factors: Mapping[str, jax.Array],
    eps: float,
    recalled: jax.Array | None = None,
) -> jax.Array:
    """Adds a low-rank stand-in for skipped layers to the residual stream.

    Like the skipped layers it is nonlinear and normalises its input.

    Args:
        x: [B, T, D].
        factors: {"down": [D, r], "up": [r, D]}; with `recalled`, down is [D+F, r].
        eps: of the norm.
        recalled: see `bridge_inputs`.
    """
    return x + low_rank(bridge_inputs(x, eps, recalled), factors, jax.nn.silu)


def bridge_inputs(x: jax.Array, eps: float, recalled: jax.Array | None = None) -> jax.Array:
    """What a bridge multiplies: x, normed, and what is known of the token before its block.

    Args:
        x: [B, T, D].
        eps: of the norm.
        recalled: [B, A, F] of A blocks of T/A tokens each, or None.

    Returns:
        [B, T, D+F], of the type of `x`.
    """
    y = rms_norm(x.astype(jnp.float32), eps).astype(x.dtype)
    if recalled is None:
        return y
    known = jnp.repeat(recalled.astype(x.dtype), x.shape[1] // recalled.shape[1], axis=1)
    return jnp.concatenate([y, known], axis=-1)


def rms_norm(x: jax.Array, eps: float) -> jax.Array:
    """x over the root of its mean square and eps, along the last axis, float32."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def settle(config: ModelConfig, x: jax.Array) -> jax.Array:
    """`exact.settled` of x in a model whose sums are exact, else x."""
    return exact.settled(x) if exact_sums(config) else x


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang and Sennrich, arXiv 1910.07467), in float32."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg = self.config
        init = nn.initializers.constant(1.0 - cfg.norm_offset)
        scale = self.param("scale", init, (x.shape[-1],), jnp.dtype(cfg.dtype))
        norm = exact.norm if exact_sums(cfg) else rms_norm
        y = norm(x.astype(jnp.float32), cfg.norm_eps)
        return (y * (scale.astype(jnp.float32) + cfg.norm_offset)).astype(x.dtype)


class MLP(nn.Module):
    """Gated feed-forward layer: down(activation(gate(x)) · up(x)); token_rows: see `Linear`."""

    config: ModelConfig
    token_rows: int = 0

    @nn.compact
    def __call__(self, x: jax.Array, deltas: Mapping[str, Any]) -> jax.Array:
        cfg = self.config
        make = functools.partial(Linear, cfg, token_rows=self.token_rows)
        linear = make(2 * cfg.intermediate_size, cfg.mlp_bias, name="gate_up")
        sizes = (cfg.intermediate_size,) * 2
        gate, up = split(linear(x, deltas.get("gate_up")), sizes, cfg.shards)
        hidden = settle(cfg, _ACTIVATIONS[cfg.activation](gate)) * up
        linear = make(cfg.hidden_size, cfg.mlp_bias, name="down")
        return linear(hidden, deltas.get("down"))


class Embedding(nn.Module):
    """The table of token embeddings, [V, D]."""

    config: ModelConfig

    def setup(self) -> None:
        cfg = self.config
        init = nn.initializers.normal(INIT_DEVIATION)
        shape = (cfg.vocab_size, cfg.hidden_size)
        self.weights = weight_format(cfg, EMBED)
        self.table = self.weights.declare(self, "embedding", shape, cfg.dtype, init)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """The embeddings of tokens int [B, T]: [B, T, D]."""
        return self._of_table(
            lambda tokens, table: self.weights.look_up(table, tokens, self.config.dtype), tokens
        )

    def logits(self, x: jax.Array) -> jax.Array:
        """Output of a head that is tied to the table: [B, T, D] -> float32 [B, T, V]."""
        multiply = functools.partial(self.weights.multiply, out_dtype=jnp.float32)
        return self._of_table(multiply, x)

    def _of_table(self, function: Callable[[jax.Array, Arrays], jax.Array], x: jax.Array) -> Any:
        names = self.weights.parts("embedding")
        return with_whole(self.config, EMBED, names, function, x, self.table)
