"""Drafts that read the target's last hidden state, which the head makes the next token of.

In the style of EAGLE (Li et al., arXiv 2401.15077): a decoder layer over the hidden state before
each token and the token's embedding, token by token. In the style of Medusa (Cai et al., arXiv
2401.10774): a residual head for each of the γ positions, all at once. Both use the target's
embeddings and its head.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from s3d_jax.jax_settings import under_usual_jax_settings
from s3d_jax.nn.attention import Layout, layout_after_committed
from s3d_jax.nn.cache import KVCache, init_cache
from s3d_jax.nn.draft import OwnVocabulary, with_head
from s3d_jax.nn.layers import Linear, RMSNorm, rms_norm
from s3d_jax.nn.rope import rotary_table
from s3d_jax.nn.streams import text_cache
from s3d_jax.nn.transformer import Block, bound, logits_of
from s3d_jax.settings.model import ModelConfig
from s3d_jax.weights.base import Arrays
from s3d_jax.weights.trees import Params, store_tree, widen_tree


class FeatureDraft(flax.struct.PyTreeNode, OwnVocabulary):
    """The arrays of a draft that reads hidden states.

    Attributes:
        weights: the parameters of `EagleLayer` or `MedusaHeads`.
        vocabulary, head: see `OwnVocabulary`.
    """

    weights: Mapping[str, Any]
    vocabulary: jax.Array | None = None
    head: Arrays = ()


def layer_config(config: ModelConfig) -> ModelConfig:
    """The model of one layer that an EAGLE-style draft adds to a target.

    It has the target's widths and sees the whole past. Its matrices are int8 where the target's are
    rounded. Nothing that it computes has to be exact.
    """
    rounded = config.quantization in ("int8", "int8-plain", "int4")
    return config.replace(
        num_layers=1,
        sliding_window=None,
        rope_layers=None,
        local_rope=None,
        quantization="int8" if rounded else None,
        blocks=None,
        exact_sums=False,
        kv_cache=None,
        shards=1,
        over_data=False,
    )


class EagleLayer(nn.Module):
    """One decoder layer over pairs of a hidden state and the token that was chosen from it.

    Attributes:
        config: from `layer_config`.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, embedded: jax.Array, hidden: jax.Array, cache: KVCache, layout: Layout
    ) -> tuple[jax.Array, KVCache]:
        """Estimates of the hidden states after the tokens, [B, T, D], and the layer's cache.

        Args:
            embedded: [B, T, D], of the tokens.
            hidden: [B, T, D], before each token.
            cache: of one layer.
            layout: where the pairs stand.
        """
        cfg = self.config
        x = Linear(cfg, cfg.hidden_size, name="fuse")(joined(cfg, embedded, hidden))
        rope = cfg.layer_rope(0)
        assert rope is not None  # `layer_config` has it
        rotary = rotary_table(rope, cfg.head_dim, layout.positions, cache.prompt_length)
        layer = Block(cfg, name="layers_0")
        x, keys, values = layer(x, cache.keys[0], cache.values[0], layout, rotary, {})
        x = RMSNorm(cfg, name="final_norm")(x)
        return x, cache.replace(keys=(keys,), values=(values,))


def joined(config: ModelConfig, embedded: jax.Array, hidden: jax.Array) -> jax.Array:
    """Embeddings and the hidden states before them, each normed: twice [B, T, D] -> [B, T, 2·D]."""
    parts = [rms_norm(x.astype(jnp.float32), config.norm_eps) for x in (embedded, hidden)]
    return jnp.concatenate(parts, axis=-1).astype(embedded.dtype)


class MedusaHeads(nn.Module):
    """A residual layer for each position after the next token.

    Attributes:
        config: from `layer_config`.
        heads: γ.
    """

    config: ModelConfig
    heads: int

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """[B, A, D] before the next tokens -> [B, A, γ, D], for the γ tokens after them."""
        cfg = self.config
        each = [Linear(cfg, cfg.hidden_size, True, name=f"heads_{i}") for i in range(self.heads)]
        return jnp.stack([hidden + jax.nn.silu(layer(hidden)) for layer in each], axis=2)


def eagle_pass(
    config: ModelConfig,
    params: Params,
    layer: ModelConfig,
    draft: FeatureDraft,
    tokens: jax.Array,
    hidden: jax.Array,
    cache: KVCache,
    *,
    visible: int | None = None,
    layout: Layout | None = None,
) -> tuple[jax.Array, KVCache]:
    """`EagleLayer` over tokens that follow the cache's committed ones.

    Args:
        config, params: the target.
        layer, draft: what the draft's arrays are of (`layer_config`), and these.
        tokens: int [B, T].
        hidden: [B, T, D], what the target's head read to choose each of them, or an estimate.
        cache: of one layer, `length` pairs.
        visible: static, slots to read; None is all.
        layout: of pairs that do not follow the committed ones (training).
    """
    if layout is None:
        layout = layout_after_committed(cache, tokens.shape[1], False, cache.slots, visible)
    embedded = bound(config, params).embed(tokens)
    return EagleLayer(layer).bind({"params": draft.weights})(
        embedded, hidden.astype(embedded.dtype), cache, layout
    )


def medusa_states(
    layer: ModelConfig, draft: FeatureDraft, hidden: jax.Array, gamma: int
) -> jax.Array:
    """`MedusaHeads` for the first γ positions: [B, A, D] -> [B, A, γ, D]."""
    return MedusaHeads(layer, gamma).bind({"params": draft.weights})(hidden)


@under_usual_jax_settings
def in_memory(config: ModelConfig, params: Params, draft: FeatureDraft) -> FeatureDraft:
    """A draft with float arrays, as decoding with a target needs it.

    Its matrices are stored in the format of `layer_config`, and it has its rows of the head.
    """
    plain = jax.tree.map(lambda x: np.asarray(x).astype(config.dtype), draft.weights)
    stored = jax.device_put(store_tree(layer_config(config), plain))
    return with_head(config, params, draft.replace(weights=stored, head=()))


@under_usual_jax_settings
def new_weights(kind: str, config: ModelConfig, params: Params, gamma: int, key: jax.Array) -> Any:
    """The float32 parameters before training.

    EAGLE's layer begins as the target's last one, on hidden states that pass through. Medusa's
    heads begin without effect.

    Args:
        kind: "eagle" or "medusa".
        config, params: the target.
        gamma: heads of Medusa.
        key: typed PRNG key.
    """
    plain, size = layer_config(config.unquantized()), config.hidden_size
    if kind == "medusa":
        empty = jax.eval_shape(
            lambda: MedusaHeads(plain, gamma).init(key, jnp.zeros((1, 1, size), plain.dtype))
        )
        return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), empty["params"])
    # Small enough that the layer hears the hidden state first.
    deviation = 0.1 * size**-0.5
    embedded = deviation * jax.random.normal(key, (size, size))
    passed = jnp.eye(size)
    last = f"layers_{config.num_layers - 1}"
    layer = widen_tree(config, params[last], jnp.float32, last)
    return {
        "fuse": {"weight": jnp.concatenate([embedded, passed], axis=1)},
        "layers_0": jax.tree.map(lambda x: jnp.array(x, jnp.float32), layer),
        "final_norm": {"scale": jnp.array(params["final_norm"]["scale"], jnp.float32)},
    }


def eagle_targets(
    config: ModelConfig, params: Params, tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What EAGLE's layer is given for each token of a text, and what the target's last layer is.

    Args:
        config, params: the target.
        tokens: int [B, T].

    Returns:
        (inputs, wanted): `joined` [B, T, 2·D], and the residual stream [B, T, D].
    """
    cache, last = text_cache(config, params, tokens, tokens.shape[1]), config.num_layers - 1
    model = bound(config, params)
    x, shared = model.begin(tokens, cache, visible=tokens.shape[1])
    wanted, cache = model.run_layers(x, cache, shared, layers=range(last))
    x, _ = model.run_layers(wanted, cache, shared, layers=range(last, last + 1))
    before = _before(model.final_norm(x))
    return joined(config, model.embed(tokens), before), wanted


def _before(hidden: jax.Array) -> jax.Array:
    """What the head read before each token, zeros before the first."""
    return jnp.pad(hidden[:, :-1], ((0, 0), (1, 0), (0, 0)))


def feature_stream(
    kind: str,
    config: ModelConfig,
    params: Params,
    gamma: int,
    draft: FeatureDraft,
    tokens: jax.Array,
    anchors: jax.Array,
    hidden: jax.Array,
) -> jax.Array:
    """What the draft gives at many anchors of a text: `streams.draft_stream` of these drafts.

    As in decoding, all but the first of a block's tokens see the draft's own estimates of the
    hidden states (EAGLE-3, arXiv 2503.01840, calls this training-time test).

    Args:
        kind: "eagle" or "medusa".
        config, params, gamma, draft: the target, γ, and the draft, with float arrays.
        tokens: int [B, T].
        anchors: int [B, A], the position of each block's first token.
        hidden: [B, T, D], what the target's head reads at each token.

    Returns:
        float32 [B, A·γ, V], or V' of the draft's vocabulary; row a·γ+i is q for the token at
        position anchors[a] + 1 + i.
    """
    draft, layer = with_head(config, params, draft), layer_config(config.unquantized())
    before = _before(hidden)
    if kind == "medusa":
        known = jnp.take_along_axis(before, anchors[:, :, None], axis=1)
        states = medusa_states(layer, draft, known, gamma)
    else:
        states = _eagle_states(config, params, layer, gamma, draft, tokens, anchors, before)
    states = states.reshape(len(tokens), -1, states.shape[-1])
    return logits_of(config, params, states, draft)


def _eagle_states(
    config: ModelConfig,
    params: Params,
    layer: ModelConfig,
    gamma: int,
    draft: FeatureDraft,
    tokens: jax.Array,
    anchors: jax.Array,
    before: jax.Array,
) -> jax.Array:
    """[B, A, γ, D]: one pass over the text, then γ - 1 over the anchors' next tokens."""
    (rows, length), count = tokens.shape, anchors.shape[1]
    slots = length + count * (gamma - 1) + 1  # a write of one token takes two
    cache = init_cache(layer, rows, slots, np.zeros(rows, np.int32))
    run = functools.partial(eagle_pass, config, params, layer, draft)
    states, cache = run(tokens, before, cache, visible=length)
    state = jnp.take_along_axis(states, anchors[:, :, None], axis=1)
    found = [state]
    text = jnp.arange(length, dtype=jnp.int32)
    context = text <= anchors[:, :, None]  # bool [B, A, T]
    text = jnp.broadcast_to(text, (rows, length))
    own = jnp.broadcast_to(jnp.eye(count, dtype=bool), (rows, count, count))
    for i in range(1, gamma):
        positions = jnp.minimum(anchors + i, length - 1)
        layout = Layout(
            start=jnp.full(rows, length + (i - 1) * count, jnp.int32),
            positions=positions,
            slot_positions=jnp.concatenate([text, *(anchors + k for k in range(1, i + 1))], axis=1),
            seen=jnp.concatenate([context, *(own,) * i], axis=2),
        )
        following = jnp.take_along_axis(tokens, positions, axis=1)
        state, cache = run(following, state, cache, layout=layout)
        found.append(state)
    return jnp.stack(found, axis=2)
