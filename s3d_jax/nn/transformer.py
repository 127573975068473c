"""The decoder in flax linen. One forward pass serves prefill, AR step, draft, verify and training.

Transformer > Block > Attention, MLP, RMSNorm. The model families differ in ModelConfig only.
"""

import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from s3d_jax.jax_settings import under_usual_jax_settings
from s3d_jax.keys import make_key
from s3d_jax.mesh import DATA, MODEL, constrained
from s3d_jax.nn.attention import (
    Attention,
    Layout,
    layout_after_committed,
    layout_of_comb,
    layout_of_merged,
)
from s3d_jax.nn.cache import KVCache, init_cache
from s3d_jax.nn.draft import (
    DraftParams,
    OwnVocabulary,
    bridge_name,
    recall,
    recalled_layers,
    with_head,
)
from s3d_jax.nn.layers import MLP, Embedding, Linear, RMSNorm, bridge, settle
from s3d_jax.nn.rope import Rotary, rotary_table
from s3d_jax.nn.rounded import Stored
from s3d_jax.settings.model import ModelConfig
from s3d_jax.weights.base import num_bytes
from s3d_jax.weights.formats import head_format
from s3d_jax.weights.trees import Params


def _residual(cfg: ModelConfig, norm: str, y: jax.Array) -> jax.Array:
    """What attention or MLP adds to the residual stream, computed from its output."""
    if not cfg.post_norms and cfg.residual_scale == 1.0:
        return y
    if cfg.post_norms:
        y = settle(cfg, RMSNorm(cfg, name=norm)(y))
    if cfg.residual_scale != 1.0:
        y = settle(cfg, (y.astype(jnp.float32) * cfg.residual_scale).astype(y.dtype))
    return y


class Block(nn.Module):
    """One layer: attention and MLP, each with its norms and a residual connection.

    Attributes:
        config: the model.
        token_rows: see `Linear`.
    """

    config: ModelConfig
    token_rows: int = 0

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        keys: Stored,
        values: Stored,
        layout: Layout,
        rotary: Rotary | None,
        deltas: Mapping[str, Any],
    ) -> tuple[jax.Array, Stored, Stored]:
        cfg = self.config
        y = RMSNorm(cfg, name="attention_norm")(x) if cfg.pre_norms else x
        attention = Attention(cfg, self.token_rows, name="attention")
        y, keys, values = attention(y, keys, values, layout, rotary, deltas.get("attention", {}))
        x = x + _residual(cfg, "post_attention_norm", y)
        y = RMSNorm(cfg, name="mlp_norm")(x) if cfg.pre_norms else x
        y = MLP(cfg, self.token_rows, name="mlp")(y, deltas.get("mlp", {}))
        x = x + _residual(cfg, "post_mlp_norm", y)
        return x, keys, values


# Where the masks of tokens stand in a block: after each token; after all tokens, those of the first
# token first; or alone, without the tokens.
MaskPlaces = Literal["each", "last", "alone"]


class Pass(NamedTuple):
    """What the layers of one pass share.

    Attributes:
        layouts: one for each layer.
        rotary: each layer's cosines and sines; None if the layer has no rotation.
        draft: the draft's own parameters; None in a pass of the target.
        recalled: what bridges read of the token before each block; None if they do not.
    """

    layouts: tuple[Layout, ...]
    rotary: tuple[Rotary | None, ...]
    draft: DraftParams | None
    recalled: jax.Array | None = None


class Transformer(nn.Module):
    """The decoder. Its parameter tree is documented in docs/checkpoint.md.

    A pass is `begin`, `cross` and `layer` for each layer, `cross` for the head, `final_norm` and
    `head`. `bound` gives an instance whose methods may be called one by one.

    Attributes:
        config: the model.
        remat: the backward pass computes activations again, layer by layer.
        token_rows: see `Linear`.
    """

    config: ModelConfig
    remat: bool = False
    token_rows: int = 0

    def setup(self) -> None:
        cfg = self.config
        block = nn.remat(Block) if self.remat else Block
        self.embed = Embedding(cfg)
        self.layers = [block(cfg, self.token_rows) for _ in range(cfg.num_layers)]
        self.final_norm = RMSNorm(cfg)
        if not cfg.tie_embeddings:
            self.lm_head = Linear(cfg, cfg.vocab_size, out_dtype="float32")

    def __call__(self, tokens: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """A pass of the target, which `init` runs: see `forward`."""
        x, shared = self.begin(tokens, cache)
        x, cache = self.run_layers(x, cache, shared)
        return self.head(self.final_norm(x)), cache

    def begin(
        self,
        tokens: jax.Array,
        cache: KVCache,
        *,
        draft: DraftParams | None = None,
        num_masks: int = 0,
        mask_places: MaskPlaces = "each",
        leaf_depths: tuple[int, ...] = (),
        bidirectional: bool = False,
        visible: int | None = None,
        layout: Layout | None = None,
    ) -> tuple[jax.Array, Pass]:
        """The inputs of the first layer, [B, T, D] (`hidden_states`), and what all layers share."""
        cfg = self.config
        x = settle(cfg, constrained(self.embed(tokens), DATA))
        if num_masks:
            assert draft is not None
            x = _with_masks(x, draft.masks(num_masks).astype(x.dtype), mask_places)
        if cfg.embedding_scale != 1.0:
            x = settle(cfg, x * jnp.asarray(cfg.embedding_scale, x.dtype))

        # Layers of equal window and slots share a layout. Layers of equal rotary settings share a
        # table.
        kinds = [(cfg.window(i), keys.shape[2]) for i, keys in enumerate(cache.keys)]
        layouts = {}
        for window, slots in dict.fromkeys(kinds):
            if layout is not None:
                whole = layout
            elif num_masks and mask_places == "last":
                whole = layout_of_merged(
                    cache, tokens.shape[1], num_masks, bidirectional, slots, visible
                )
            elif leaf_depths:
                count = x.shape[1] - len(leaf_depths)
                whole = layout_of_comb(cache, count, leaf_depths, slots, visible)
            else:
                whole = layout_after_committed(cache, x.shape[1], bidirectional, slots, visible)
            if whole.ring and slots < (window or slots) + x.shape[1] - 1:
                raise ValueError(
                    f"a block of {x.shape[1]} tokens does not fit a ring of {slots} slots and a "
                    f"window of {window}: init_cache with largest_block={x.shape[1]} or more"
                )
            layouts[window, slots] = whole.within(window)
        positions = whole.positions
        ropes = [cfg.layer_rope(i) for i in range(cfg.num_layers)]
        rotary = {
            rope: rotary_table(rope, cfg.head_dim, positions, cache.prompt_length)
            for rope in dict.fromkeys(ropes)
            if rope is not None
        }
        by_layer = tuple(None if rope is None else rotary[rope] for rope in ropes)
        by_kind = tuple(layouts[kind] for kind in kinds)
        recalled = None
        if draft is not None and (count := recalled_layers(cfg, draft.bridges)):
            copies = cfg.cached_heads // cfg.num_kv_heads
            recalled = recall(cache, by_kind, count, 1 + num_masks, cfg.norm_eps, copies)
        return x, Pass(by_kind, by_layer, draft, recalled)

    def run_layers(
        self,
        x: jax.Array,
        cache: KVCache,
        shared: Pass,
        *,
        skip: tuple[bool, ...] | None = None,
        keep: jax.Array | None = None,
        layers: range | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Runs the layers that `skip` or `keep` leave: input of the final norm, and the cache.

        With `layers` it runs some that follow each other: input of the one after them.
        """
        assert skip is None or keep is None
        layers = range(self.config.num_layers) if layers is None else layers
        gap: bool | jax.Array = False  # whether the layer before is skipped
        for i in layers:
            if skip is not None and skip[i]:
                gap = True
                continue
            y, cache = self.layer(i, self.cross(i, x, gap, shared), cache, shared)
            if keep is None:
                x, gap = y, False
            else:
                x, gap = jnp.where(keep[i], y, x), ~keep[i]
        return self.cross(layers.stop, x, gap, shared), cache

    def cross(self, i: int, x: jax.Array, gap: bool | jax.Array, shared: Pass) -> jax.Array:
        """Takes x over the bridge to layer i (L: the head), if there is one, where `gap` is True.

        Args:
            i: the layer after the gap.
            x: [B, T, D].
            gap: whether the layer before is skipped; an array is broadcast to [B, T, D].
            shared: of this pass.
        """
        name = bridge_name(i, self.config.num_layers)
        factors = None if shared.draft is None else shared.draft.bridges.get(name)
        if factors is None or gap is False:
            return x
        crossed = bridge(x, factors, self.config.norm_eps, shared.recalled)
        return crossed if gap is True else jnp.where(gap, crossed, x)

    def layer(
        self, i: int, x: jax.Array, cache: KVCache, shared: Pass
    ) -> tuple[jax.Array, KVCache]:
        """Layer i: from [B, T, D] to [B, T, D]; its keys and values are written into the cache."""
        deltas = {} if shared.draft is None else shared.draft.deltas.get(f"layers_{i}", {})
        keys, values = list(cache.keys), list(cache.values)
        x, keys[i], values[i] = self.layers[i](
            x, keys[i], values[i], shared.layouts[i], shared.rotary[i], deltas
        )
        return constrained(x, DATA), cache.replace(keys=tuple(keys), values=tuple(values))

    def head(self, x: jax.Array, draft: OwnVocabulary | None = None) -> jax.Array:
        """Logits float32 [B, T, V] of what the final norm gives, [B, T, D].

        A draft with a vocabulary of its own, and its head, gives [B, T, V'].
        """
        cfg = self.config
        if draft is not None and draft.vocabulary is not None:
            logits = head_format(cfg).multiply(x, draft.head, jnp.float32)
        else:
            logits = self.embed.logits(x) if cfg.tie_embeddings else self.lm_head(x)
        logits = constrained(logits, DATA, None, MODEL)
        if cfg.logit_divisor != 1.0:
            logits = logits / cfg.logit_divisor
        if cfg.logit_softcap is not None:
            logits = cfg.logit_softcap * jnp.tanh(logits / cfg.logit_softcap)
        return logits


def _with_masks(x: jax.Array, masks: jax.Array, places: MaskPlaces) -> jax.Array:
    """A block of T tokens [B, T, D] and the M masks [M, D] of each: [B, T·(1+M) or T·M, D]."""
    b, t, d = x.shape
    masks = jnp.broadcast_to(masks, (b, t, *masks.shape))
    if places == "each":
        return jnp.concatenate([x[:, :, None], masks], axis=2).reshape(b, -1, d)
    masks = masks.reshape(b, -1, d)
    return masks if places == "alone" else jnp.concatenate([x, masks], axis=1)


def bound(
    config: ModelConfig,
    params: Params,
    draft: DraftParams | None = None,
    *,
    remat: bool = False,
    token_rows: int = 0,
) -> Transformer:
    """The model with its parameters; the merged layers of a draft replace the target's."""
    if draft is not None:
        params = {**params, **draft.layers}
    return Transformer(config, remat, token_rows).bind({"params": params})


@under_usual_jax_settings
def hidden_states(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    cache: KVCache,
    *,
    skip: tuple[bool, ...] | None = None,
    keep: jax.Array | None = None,
    draft: DraftParams | None = None,
    num_masks: int = 0,
    mask_places: MaskPlaces = "each",
    leaf_depths: tuple[int, ...] = (),
    bidirectional: bool = False,
    visible: int | None = None,
    layout: Layout | None = None,
    remat: bool = False,
) -> tuple[jax.Array, KVCache]:
    """Runs a block of tokens that follows each row's committed tokens.

    Args:
        config: the model.
        params: its parameter tree.
        tokens: int [B, T], at positions length … length+T-1 of each row.
        cache: keys and values of the committed tokens.
        skip: static, one entry per layer; True leaves the layer out of the program. None runs all.
        keep: bool [L]; a layer whose entry is False is computed and its output is not used. One
            program then serves all sets of layers. Excludes `skip`.
        draft: the draft's own parameters; None runs the target.
        num_masks: static, mask tokens of the draft for each of the tokens, as more inputs:
            T·(1+num_masks) in all, the T below.
        mask_places: static. "each": the masks follow each token, and what is of the draft is so for
            all rows. "last": they follow all tokens, which run as the target (`layout_of_merged`).
            "alone": there are no others, T·num_masks in all; `tokens` count, and do nothing else.
        leaf_depths: static; the last of the tokens are leaves of a comb, at these depths
            (`layout_of_comb`).
        bidirectional: the block's tokens see each other both ways, not only backwards.
        visible: static; only the first `visible` slots of the cache are read, so that a long cache
            costs nothing while it is empty. The block must end before it. None reads all.
        layout: positions and mask of a block that does not follow the committed tokens (training);
            `bidirectional` and `visible` are then ignored.
        remat: static; the backward pass computes activations again, layer by layer.

    Returns:
        (hidden, cache): the input of the head, [B, T, D]; and the cache with the block's keys and
        values written after `length`, which is unchanged: committing is the caller's decision.
    """
    token_rows = tokens.shape[1] if mask_places == "last" else 0
    model = bound(config, params, draft, remat=remat, token_rows=token_rows)
    x, shared = model.begin(
        tokens,
        cache,
        draft=draft,
        num_masks=num_masks,
        mask_places=mask_places,
        leaf_depths=leaf_depths,
        bidirectional=bidirectional,
        visible=visible,
        layout=layout,
    )
    x, cache = model.run_layers(x, cache, shared, skip=skip, keep=keep)
    return model.final_norm(x), cache


@under_usual_jax_settings
def forward(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    cache: KVCache,
    *,
    draft: DraftParams | None = None,
    **options: Any,
) -> tuple[jax.Array, KVCache]:
    """`hidden_states`, with the same options, and the head.

    Returns:
        (logits, cache): float32 [B, T, V]; of a draft with a vocabulary of its own, [B, T, V'].
    """
    hidden, cache = hidden_states(config, params, tokens, cache, draft=draft, **options)
    return logits_of(config, params, hidden, draft), cache


def logits_of(
    config: ModelConfig, params: Params, hidden: jax.Array, draft: OwnVocabulary | None = None
) -> jax.Array:
    """Logits of `hidden_states`, see `forward`."""
    if draft is not None:
        draft = with_head(config, params, draft)
    return bound(config, params).head(hidden, draft)


@under_usual_jax_settings
def fill_cache(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    cache: KVCache,
    *,
    visible: int | None = None,
    layout: Layout | None = None,
    remat: bool = False,
) -> KVCache:
    """`forward` of all layers without the logits: the cache with the block's keys and values."""
    model = bound(config, params, remat=remat)
    x, shared = model.begin(tokens, cache, visible=visible, layout=layout)
    return model.run_layers(x, cache, shared)[1]


@under_usual_jax_settings
@functools.partial(jax.jit, static_argnames="config")
def forward_logits(config: ModelConfig, params: Params, tokens: jax.Array) -> jax.Array:
    """Logits of whole sequences, without decoding.

    Args:
        config: the model.
        params: its parameter tree.
        tokens: int [B, T].

    Returns:
        float32 [B, T, V]; row t is the distribution of the token at t+1.
    """
    batch, length = tokens.shape
    cache = init_cache(config, batch, length, jnp.full((batch,), length))
    return forward(config, params, tokens, cache)[0]


@under_usual_jax_settings
def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Random parameters, N(0, 0.02²) for weights, in the tree that checkpoints hold."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    cache = init_cache(config, 1, 1, jnp.zeros((1,), jnp.int32))
    return Transformer(config).init(key, tokens, cache)["params"]


@under_usual_jax_settings
def abstract_params(config: ModelConfig) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct`s; nothing is allocated."""
    return jax.eval_shape(lambda: init_params(config, make_key(0)))


def num_params(config: ModelConfig) -> int:
    """Number of parameters. Tied embeddings count once; arrays of a weight format do not count."""
    plain = config.unquantized().replace(shards=1)
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(plain)))


def weight_bytes(config: ModelConfig) -> int:
    """Bytes of all arrays of the model."""
    return num_bytes(abstract_params(config))
