"""Settings of the model: sizes, switches of the families, rotary embedding.

Every class here is a static argument of `jax.jit`. Array letters: L layers, D model width, F
feed-forward width, V vocabulary, N query heads, K key/value heads, H head size.
"""

import dataclasses
import math
from typing import Any, Self

from s3d_jax.settings.options import option
from s3d_jax.settings.records import Record, check, is_integer, is_positive

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
DTYPES = ("float32", "bfloat16", "float16")
QUANTIZATIONS = {
    "int8": "linear layers, embeddings and head in int8, rotated, with one scale per output",
    "int8-plain": "the same without rotation, faster in models of a few million parameters",
    "int4": "linear layers in 4.25 bits, rotated, in groups of 32; embeddings and head as in int8",
    "blocks": "the blocks of a GGUF file as they are: no weight is rounded a second time",
}
KV_CACHES = {"int8": "a scale for each token and key head (nn.rounded)"}
_LAYER_MATRICES = ("attention/qkv", "attention/out", "mlp/gate_up", "mlp/down")
_IN_MEMORY = {"kv_cache", "shards", "over_data"}  # fields about arrays in memory, not the model
# Upper bounds, so that a corrupt config fails fast.
MAX_SIZE, MAX_LAYERS, MAX_HEAD_DIM = 2**31 - 1, 4096, 2**16


def check_kv_cache(kind: Any) -> None:
    """Raises ConfigError where `kind` is no `ModelConfig.kv_cache`."""
    check(
        kind is None or (isinstance(kind, str) and kind in KV_CACHES),
        f"kv_cache (--kv-cache) must be None or one of {tuple(KV_CACHES)}, got {kind!r:.80}",
    )


@dataclasses.dataclass(frozen=True)
class RopeConfig(Record):
    """Rotary position embedding (Su et al., arXiv 2104.09864) and its ways to scale.

    Attributes:
        type: "default"; "linear" (positions divided by `factor`); "dynamic" (NTK-aware base that
            grows with the sequence once it passes `original_max_position_embeddings`); "llama3"
            (Llama 3.1: long wavelengths divided by `factor`, with a smooth band between the two
            frequency factors); "yarn" (arXiv 2309.00071: as "llama3", but the band lies between the
            pairs that make `beta_fast` and `beta_slow` turns); "longrope" (Phi 3, arXiv 2402.13753:
            a stretch for each rotated pair, one set of them for sequences within
            `original_max_position_embeddings` and one for longer ones).
        theta: base of the geometric series of wavelengths.
        rotary_fraction: leading part of each head that is rotated (partial rotary); 1.0 rotates
            all.
        factor, low_freq_factor, high_freq_factor, original_max_position_embeddings: settings of the
            scaled types.
        short_factors, long_factors: "longrope" multiplies each pair's wavelength by its factor.
        beta_fast, beta_slow: turns within `original_max_position_embeddings` ("yarn").
        attention_factor: multiplies cosines and sines, so scores by its square ("yarn" and
            "longrope").
    """

    type: str = option("default", choices=ROPE_TYPES)
    theta: float = option(10000.0, above=1)
    rotary_fraction: float = option(1.0, above=0, most=1)
    factor: float = option(1.0, above=0)
    low_freq_factor: float = option(1.0, above=0)
    high_freq_factor: float = option(4.0, above=0)
    original_max_position_embeddings: int | None = option(None, above=1, most=MAX_SIZE)
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    beta_fast: float = option(32.0, above=0)
    beta_slow: float = option(1.0, above=0)
    attention_factor: float = option(1.0, above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("short_factors", "long_factors"):
            values = getattr(self, name)
            check(
                isinstance(values, tuple) and all(is_positive(value) for value in values),
                f"rope {name} must be a list of numbers > 0, got {values!r:.80}",
            )
        original = self.original_max_position_embeddings
        if self.type in ("dynamic", "llama3", "yarn", "longrope"):
            check(
                original is not None,
                f"rope type {self.type!r} needs original_max_position_embeddings",
            )
        if self.type == "llama3":
            check(
                self.low_freq_factor < self.high_freq_factor,
                "rope type 'llama3' needs 0 < low_freq_factor < high_freq_factor, "
                f"got {self.low_freq_factor} and {self.high_freq_factor}",
            )
        if self.type == "yarn":
            check(
                self.beta_slow < self.beta_fast,
                "rope type 'yarn' needs 0 < beta_slow < beta_fast, "
                f"got {self.beta_slow} and {self.beta_fast}",
            )

    @property
    def turning_point(self) -> int | None:
        """Length past which all positions of a sequence rotate with other factors ("longrope")."""
        return self.original_max_position_embeddings if self.type == "longrope" else None


@dataclasses.dataclass(frozen=True)
class ModelConfig(Record):
    """A decoder like Llama. The defaults are Llama's; switches cover the related families.

    Attributes:
        vocab_size, hidden_size, intermediate_size: V, D, F.
        num_layers, num_heads, num_kv_heads, head_dim: L, N, K, H. H need not be D / N.
        max_position_embeddings: longest sequence of the model in tokens; the default cache size.
        activation: of the gated MLP, "silu", "gelu" (erf) or "gelu_tanh".
        tie_embeddings: the output head is the embedding table.
        qkv_bias, attention_out_bias, mlp_bias: which linear layers carry a bias.
        qk_norm: RMS norm over each query and key head before the rotation (Qwen 3, Gemma 3).
        qk_norm_joint: this norm runs over all heads together instead of over each head (OLMo 2).
        norm_offset: added to each norm's scale (1.0 in Gemma, which stores scales around 0).
        pre_norms, post_norms: norms before, and after, attention and MLP (before only in Llama,
            both in Gemma 2 and 3, after only in OLMo 2).
        embedding_scale: multiplies token embeddings (sqrt(D) in Gemma).
        residual_scale: multiplies the outputs of attention and MLP (Granite).
        logit_divisor: divides logits (Granite).
        attention_scale: multiplies q·k; None means 1 / sqrt(H).
        attention_softcap, logit_softcap: c · tanh(x / c) on scores or logits (Gemma 2); None is
            off.
        sliding_window: one entry per layer, window size or None; None alone means that no layer has
            a window.
        rope_layers: one entry per layer, False if the layer has no rotation (NoPE, SmolLM 3); None
            alone means that every layer rotates.
        local_rope: rotary settings of layers with a window if they differ (Gemma 3).
        dtype: type of weights, activations and cache. Norms, rotations, softmax and logits are
            float32.
        quantization: a name of QUANTIZATIONS, the weight format of linear layers, embeddings and
            head. None means that their type is `dtype`.
        blocks: the kind of blocks of each matrix of quantization "blocks", such as
            "layers_0/mlp/down 4x32:float16+offset" (`weights.blocks`); matrices that are not named
            are floats.
        exact_sums: norms and attention give a token the same bits alone and in a block. None means
            that the weight format and the cache decide; int8 needs it.
        kv_cache: how the cache holds keys and values: a name of KV_CACHES, or None for `dtype`.
            Whoever decodes chooses it; never stored. Training has float caches.
        shards: into how many parts the rows of fused matrices, and the key heads, are arranged in
            memory (`nn.sharding`), one for each device along an axis of a mesh. Never stored.
        over_data: matrices lie divided along the axis `data` of a mesh too, as in training, and
            each product gathers its own. Never stored.
    """

    vocab_size: int = option(least=1, most=MAX_SIZE)
    hidden_size: int = option(least=1, most=MAX_SIZE)
    intermediate_size: int = option(least=1, most=MAX_SIZE)
    num_layers: int = option(least=1, most=MAX_LAYERS)
    num_heads: int = option(least=1, most=MAX_SIZE)
    num_kv_heads: int = option(least=1, most=MAX_SIZE)
    head_dim: int = option(least=1, most=MAX_HEAD_DIM)
    max_position_embeddings: int = option(2048, least=1, most=MAX_SIZE)
    rope: RopeConfig = RopeConfig()
    norm_eps: float = option(1e-5, above=0)
    activation: str = option("silu", choices=ACTIVATIONS)
    tie_embeddings: bool = False
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    qk_norm_joint: bool = False
    norm_offset: float = 0.0
    pre_norms: bool = True
    post_norms: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = option(1.0, above=0)
    logit_divisor: float = option(1.0, above=0)
    attention_scale: float | None = option(None, above=0)
    attention_softcap: float | None = option(None, above=0)
    logit_softcap: float | None = option(None, above=0)
    sliding_window: tuple[int | None, ...] | None = None
    rope_layers: tuple[bool, ...] | None = None
    local_rope: RopeConfig | None = None
    dtype: str = option("float32", choices=DTYPES)
    quantization: str | None = None
    blocks: tuple[str, ...] | None = None
    exact_sums: bool | None = None
    kv_cache: str | None = None
    shards: int = option(1, least=1)
    over_data: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads ({self.num_heads}) must be a multiple of "
            f"num_kv_heads ({self.num_kv_heads})",
        )
        check(
            self.quantization in (None, *QUANTIZATIONS),
            f"quantization must be None or one of {tuple(QUANTIZATIONS)}, "
            f"got {self.quantization!r:.80}",
        )
        check(
            (self.quantization == "blocks") == (self.blocks is not None),
            "blocks belong to quantization 'blocks', which names the kind of each matrix: convert "
            "a GGUF file to it (s3d-convert model.gguf OUT --quantize blocks)",
        )
        check_kv_cache(self.kv_cache)
        self._check_blocks()
        inputs = self.hidden_size, self.intermediate_size, self.num_heads * self.head_dim
        check(
            self.quantization != "int4" or not any(width % 2 for width in inputs),
            f"int4 needs matrices of even widths, and the model's are {inputs}: use int8",
        )
        check(self.qk_norm or not self.qk_norm_joint, "qk_norm_joint is True, and qk_norm is False")
        check(
            self.pre_norms or self.post_norms,
            "pre_norms and post_norms are both False: nothing would be normalised",
        )
        check(
            self.intermediate_size % self.shards == 0,
            f"shards ({self.shards}) must divide intermediate_size ({self.intermediate_size})",
        )
        self._check_positions()

    def _check_blocks(self) -> None:
        if self.blocks is None:
            return
        check(
            isinstance(self.blocks, tuple) and all(isinstance(x, str) for x in self.blocks),
            f'blocks must be a list of texts such as "embed 8x32:float16", got {self.blocks!r:.80}',
        )
        modules = [entry.partition(" ")[0] for entry in self.blocks]
        layers = {f"layers_{i}/{name}" for i in range(self.num_layers) for name in _LAYER_MATRICES}
        unknown = [name for name in modules if name not in layers | {"embed", "lm_head"}]
        check(not unknown, f"blocks names {unknown[:1]!r:.80}, which is no matrix of the model")
        check(len(set(modules)) == len(modules), "blocks names a matrix twice")

    def _check_positions(self) -> None:
        for name in ("sliding_window", "rope_layers"):
            entries = getattr(self, name)
            check(
                entries is None or isinstance(entries, tuple),
                f"{name} must be a list with one entry per layer, got {entries!r}",
            )
            check(
                entries is None or len(entries) == self.num_layers,
                f"{name} has {len(entries or ())} entries, the model {self.num_layers} layers",
            )
        windows, rotated = self.sliding_window or (), self.rope_layers or ()
        check(
            all(w is None or (is_integer(w) and 0 < w <= MAX_SIZE) for w in windows),
            f"sliding_window entries must be None or integers > 0, got {windows!r:.80}",
        )
        check(
            all(isinstance(r, bool) for r in rotated),
            f"rope_layers entries must be True or False, got {rotated}",
        )
        for name in ("rope", "local_rope"):
            rope = getattr(self, name)
            if name == "local_rope" and rope is None:
                continue
            check(isinstance(rope, RopeConfig), f"{name} must be a RopeConfig, got {rope!r}")
            rotary_dim = int(self.head_dim * rope.rotary_fraction)
            check(
                rotary_dim % 2 == 0 and rotary_dim > 0,
                f"the rotated part of a head must be even, got {rotary_dim} of {self.head_dim}",
            )
            check(
                name == "rope" or rope.turning_point is None,
                "local_rope must not be of type 'longrope'",
            )
            factors = (len(rope.short_factors), len(rope.long_factors))
            check(
                factors == ((rotary_dim // 2,) * 2 if rope.type == "longrope" else (0, 0)),
                f"{name} has {factors[0]} short_factors and {factors[1]} long_factors; rope type "
                f"'longrope' needs {rotary_dim // 2} of each here, and no other type has any",
            )

    @property
    def precision(self) -> str:
        """Name of the weights' type: the quantisation if there is one, else the dtype."""
        return self.quantization or self.dtype

    @property
    def overflows_float16(self) -> bool:
        """Whether the residual stream grows past 65,504, where float16 ends: in Gemma 2 and 3.

        Their layers add normalised outputs with learnt scales of any size. Gemma 3 270M's stream is
        infinite in float16; vLLM refuses float16 for both.
        """
        return self.post_norms and self.norm_offset == 1.0

    @property
    def precisions(self) -> str:
        """`precision`, and that of the cache where it is another, for reports."""
        cache = "" if self.kv_cache is None else f", {self.kv_cache} cache"
        return self.precision + cache

    def unquantized(self) -> Self:
        """The model with float weights, of its dtype."""
        return self.replace(quantization=None, blocks=None)

    @property
    def attention_shards(self) -> int:
        """`shards` of attention: 1 where they do not divide the query heads."""
        return 1 if self.num_heads % self.shards else self.shards

    @property
    def cached_heads(self) -> int:
        """Key heads in memory: K, or the least multiple of it that `attention_shards` divides.

        Where they are more than K, each head is there several times in succession.
        """
        return math.lcm(self.num_kv_heads, self.attention_shards)

    @property
    def qkv_features(self) -> int:
        """Rows of the fused query/key/value projection, (N + 2K)·H; K is `cached_heads`."""
        return (self.num_heads + 2 * self.cached_heads) * self.head_dim

    def window(self, layer: int) -> int | None:
        """Sliding window of `layer`, or None if it sees the whole context."""
        return None if self.sliding_window is None else self.sliding_window[layer]

    def layer_rope(self, layer: int) -> RopeConfig | None:
        """Rotary settings of `layer`, or None if it has no rotation."""
        if self.rope_layers is not None and not self.rope_layers[layer]:
            return None
        local = self.local_rope is not None and self.window(layer) is not None
        return self.local_rope if local else self.rope

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        if isinstance(fields, dict):
            ropes = {k: fields[k] for k in ("rope", "local_rope") if fields.get(k) is not None}
            fields = fields | {name: RopeConfig.from_dict(rope) for name, rope in ropes.items()}
            unknown = sorted(_IN_MEMORY & fields.keys())
            check(not unknown, f"ModelConfig: unknown fields {unknown}")
        return super().from_dict(fields)

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in super().to_dict().items() if k not in _IN_MEMORY}
