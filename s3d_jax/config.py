"""What is to be computed: frozen, hashable, validated settings without arrays.

Every class here may be a static argument of `jax.jit`. Array letters as everywhere in the project:
L layers, D model width, F feed-forward width, V vocabulary, N query heads, K key/value heads, H
head size.
"""

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import Any, Literal, Self, get_args

from s3d_jax.errors import ConfigError

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
DTYPES = ("float32", "bfloat16", "float16")
QUANTIZATIONS = ("int8",)
Method = Literal["s3d", "ar", "prompt-lookup", "self-spec", "early-exit", "two-model"]
METHODS: tuple[Method, ...] = get_args(Method)
MAX_SIZE, MAX_LAYERS, MAX_HEAD_DIM = 2**31 - 1, 4096, 2**16  # so that damage costs no hours
MAX_NGRAM = 64
_LARGEST = 1e30  # of a temperature, bias or penalty: what they are multiplied to fits float32


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def is_integer(value: Any) -> bool:
    """Python's and numpy's; True and False are no numbers here."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_list(value: Any) -> bool:
    """Whether a setting holds several values: any sequence but a text."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def plain(value: Any) -> Any:
    """Python's own numbers and lists, from those of numpy or jax and from any sequence."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [plain(v) for v in value] if is_list(value) else value


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value


def _is_finite(value: Any) -> bool:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer past the largest float
        return False


def _is_positive(value: Any) -> bool:
    return _is_finite(value) and value > 0


class _Record:
    """JSON in and out for the frozen dataclasses below; an unknown field is an error."""

    def __post_init__(self) -> None:
        """Lists become tuples, and numpy's numbers Python's: hashable, and fit for JSON."""
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = _frozen(plain(getattr(self, field.name)))
            object.__setattr__(self, field.name, value)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        if not isinstance(fields, dict):
            raise ConfigError(f"{cls.__name__}: expected a JSON object, got {fields!r}")
        known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(fields) - set(known))
        _check(not unknown, f"{cls.__name__}: unknown fields {unknown}; known are {sorted(known)}")
        required = {
            name
            for name, f in known.items()
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        }
        missing = sorted(required - set(fields))
        _check(not missing, f"{cls.__name__}: missing fields {missing}")
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    def replace(self, **changes: Any) -> Self:
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


@dataclasses.dataclass(frozen=True)
class RopeConfig(_Record):
    """Rotary position embedding (Su et al., arXiv 2104.09864) and the ways to stretch it.

    Attributes:
        type: "default"; "linear" (positions divided by `factor`); "dynamic" (NTK-aware base that
            grows with the sequence once it passes `original_max_position_embeddings`); "llama3"
            (Llama 3.1: long wavelengths divided by `factor`, with a smooth band between the two
            frequency factors); "yarn" (arXiv 2309.00071: as "llama3", but the band lies between the
            pairs that make `beta_fast` and `beta_slow` turns); "longrope" (Phi 3, arXiv 2402.13753:
            a stretch for each rotated pair, one set of them for sequences within
            `original_max_position_embeddings` and one for longer ones).
        theta: base of the geometric series of wavelengths.
        rotary_fraction: leading part of each head that is rotated (partial rotary; 1.0 is all of
            it).
        factor, low_freq_factor, high_freq_factor, original_max_position_embeddings: of the scaled
            types.
        short_factors, long_factors: of "longrope", what each pair's wavelength is multiplied by.
        beta_fast, beta_slow: of "yarn", turns within `original_max_position_embeddings`.
        attention_factor: multiplies cosines and sines, and so scores by its square ("yarn" and
            "longrope").
    """

    type: str = "default"
    theta: float = 10000.0
    rotary_fraction: float = 1.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int | None = None
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(
            self.type in ROPE_TYPES, f"rope type {self.type!r} is unknown; known are {ROPE_TYPES}"
        )
        for name in (
            *("theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"),
            "attention_factor",
        ):
            value = getattr(self, name)
            _check(_is_positive(value), f"rope {name} must be > 0, got {value!r}")
        _check(self.theta > 1, f"rope theta must be > 1, got {self.theta!r}")
        for name in ("short_factors", "long_factors"):
            values = getattr(self, name)
            _check(
                isinstance(values, tuple) and all(_is_positive(value) for value in values),
                f"rope {name} must be a list of numbers > 0, got {values!r:.80}",
            )
        _check(
            _is_positive(self.rotary_fraction) and self.rotary_fraction <= 1,
            f"rotary_fraction must be in (0, 1], got {self.rotary_fraction!r}",
        )
        original = self.original_max_position_embeddings
        _check(
            original is None or (is_integer(original) and 1 < original <= MAX_SIZE),
            f"original_max_position_embeddings must be an integer > 1, got {original!r:.80}",
        )
        if self.type in ("dynamic", "llama3", "yarn", "longrope"):
            _check(
                original is not None,
                f"rope type {self.type!r} needs original_max_position_embeddings",
            )
        if self.type == "llama3":
            _check(
                self.low_freq_factor < self.high_freq_factor,
                "rope type 'llama3' needs 0 < low_freq_factor < high_freq_factor, "
                f"got {self.low_freq_factor} and {self.high_freq_factor}",
            )
        if self.type == "yarn":
            _check(
                self.beta_slow < self.beta_fast,
                "rope type 'yarn' needs 0 < beta_slow < beta_fast, "
                f"got {self.beta_slow} and {self.beta_fast}",
            )

    @property
    def turning_point(self) -> int | None:
        """Tokens past which a sequence is rotated otherwise, at all its positions ("longrope")."""
        return self.original_max_position_embeddings if self.type == "longrope" else None


@dataclasses.dataclass(frozen=True)
class ModelConfig(_Record):
    """A decoder of the Llama kind; the defaults are Llama's, the switches its relatives'.

    Attributes:
        vocab_size, hidden_size, intermediate_size: V, D, F.
        num_layers, num_heads, num_kv_heads, head_dim: L, N, K, H. H need not be D / N.
        max_position_embeddings: longest sequence the model was made for; the default cache size.
        activation: of the gated MLP, "silu", "gelu" (erf) or "gelu_tanh".
        tie_embeddings: the output head is the embedding table.
        qkv_bias, attention_out_bias, mlp_bias: which linear layers carry a bias.
        qk_norm: RMS norm over each query and key head before the rotation (Qwen 3, Gemma 3).
        qk_norm_joint: that norm runs over all heads together, not over each (OLMo 2).
        norm_offset: added to each norm's scale (1.0 in Gemma, whose scales are stored around 0).
        pre_norms, post_norms: norms before, and after, attention and MLP (before only in Llama,
            both in Gemma 2 and 3, after only in OLMo 2).
        embedding_scale: token embeddings are multiplied by it (sqrt(D) in Gemma).
        residual_scale: multiplies what attention and MLP add to the residual stream (Granite).
        logit_divisor: logits are divided by it (Granite).
        attention_scale: multiplies q·k; None means 1 / sqrt(H).
        attention_softcap, logit_softcap: c · tanh(x / c) on scores or logits (Gemma 2); None is
            off.
        sliding_window: one entry per layer, window size or None; a plain None means no layer has
            one.
        rope_layers: one entry per layer, False where nothing is rotated (NoPE, SmolLM 3); a plain
            None means that every layer rotates.
        local_rope: rotary settings of the layers with a window, where they differ (Gemma 3).
        dtype: of weights, activations and cache. Norms, rotations, softmax and logits are float32.
        quantization: "int8" for linear layers, embeddings and head in int8, one scale per output;
            None means that they are of the dtype.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rope: RopeConfig = RopeConfig()
    norm_eps: float = 1e-5
    activation: str = "silu"
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
    residual_scale: float = 1.0
    logit_divisor: float = 1.0
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    sliding_window: tuple[int | None, ...] | None = None
    rope_layers: tuple[bool, ...] | None = None
    local_rope: RopeConfig | None = None
    dtype: str = "float32"
    quantization: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_sizes()
        self._check_switches()
        self._check_positions()

    def _check_sizes(self) -> None:
        for name in (
            *("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads"),
            *("num_kv_heads", "head_dim", "max_position_embeddings"),
        ):
            value = getattr(self, name)
            limit = {"num_layers": MAX_LAYERS, "head_dim": MAX_HEAD_DIM}.get(name, MAX_SIZE)
            _check(
                is_integer(value) and 0 < value <= limit,
                f"{name} must be a positive integer up to {limit}, got {value!r:.80}",
            )
        _check(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads ({self.num_heads}) must be a multiple of "
            f"num_kv_heads ({self.num_kv_heads})",
        )

    def _check_switches(self) -> None:
        _check(
            self.activation in ACTIVATIONS,
            f"activation {self.activation!r} is unknown; known are {ACTIVATIONS}",
        )
        _check(
            isinstance(self.dtype, str) and self.dtype in DTYPES,
            f"dtype {self.dtype!r} is unknown; known are {DTYPES}",
        )
        _check(
            self.quantization in (None, *QUANTIZATIONS),
            f"quantization must be None or one of {QUANTIZATIONS}, got {self.quantization!r:.80}",
        )
        for name in (
            *("tie_embeddings", "qkv_bias", "attention_out_bias", "mlp_bias"),
            *("qk_norm", "qk_norm_joint", "pre_norms", "post_norms"),
        ):
            value = getattr(self, name)
            _check(isinstance(value, bool), f"{name} must be True or False, got {value!r}")
        _check(
            self.qk_norm or not self.qk_norm_joint, "qk_norm_joint is True, and qk_norm is False"
        )
        _check(
            self.pre_norms or self.post_norms,
            "pre_norms and post_norms are both False: nothing would be normalised",
        )
        for name in ("norm_eps", "residual_scale", "logit_divisor"):
            value = getattr(self, name)
            _check(_is_positive(value), f"{name} must be > 0, got {value!r}")
        for name in ("norm_offset", "embedding_scale"):
            value = getattr(self, name)
            _check(_is_finite(value), f"{name} must be a number, got {value!r}")
        scale = self.attention_scale
        _check(
            scale is None or _is_positive(scale),
            f"attention_scale must be a number > 0, or None for 1/sqrt(H), got {scale!r}",
        )
        for name in ("attention_softcap", "logit_softcap"):
            value = getattr(self, name)
            _check(
                value is None or _is_positive(value),
                f"{name} must be a number > 0, or None for no cap, got {value!r}",
            )

    def _check_positions(self) -> None:
        for name in ("sliding_window", "rope_layers"):
            entries = getattr(self, name)
            _check(
                entries is None or isinstance(entries, tuple),
                f"{name} must be a list with one entry per layer, got {entries!r}",
            )
            _check(
                entries is None or len(entries) == self.num_layers,
                f"{name} has {len(entries or ())} entries, the model {self.num_layers} layers",
            )
        windows, rotated = self.sliding_window or (), self.rope_layers or ()
        _check(
            all(w is None or (is_integer(w) and 0 < w <= MAX_SIZE) for w in windows),
            f"sliding_window entries must be None or integers > 0, got {windows!r:.80}",
        )
        _check(
            all(isinstance(r, bool) for r in rotated),
            f"rope_layers entries must be True or False, got {rotated}",
        )
        for name in ("rope", "local_rope"):
            rope = getattr(self, name)
            if name == "local_rope" and rope is None:
                continue
            _check(isinstance(rope, RopeConfig), f"{name} must be a RopeConfig, got {rope!r}")
            rotary_dim = int(self.head_dim * rope.rotary_fraction)
            _check(
                rotary_dim % 2 == 0 and rotary_dim > 0,
                f"the rotated part of a head must be even, got {rotary_dim} of {self.head_dim}",
            )
            _check(
                name == "rope" or rope.turning_point is None,
                "local_rope must not be of type 'longrope'",
            )
            factors = (len(rope.short_factors), len(rope.long_factors))
            _check(
                factors == ((rotary_dim // 2,) * 2 if rope.type == "longrope" else (0, 0)),
                f"{name} has {factors[0]} short_factors and {factors[1]} long_factors; rope type "
                f"'longrope' needs {rotary_dim // 2} of each here, and no other type has any",
            )

    @property
    def precision(self) -> str:
        """What the weights are: the dtype, or "int8"."""
        return self.quantization or self.dtype

    @property
    def qkv_features(self) -> int:
        """Rows of the fused query/key/value projection, (N + 2K)·H."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    def window(self, layer: int) -> int | None:
        """Sliding window of `layer`, or None where it sees the whole context."""
        return None if self.sliding_window is None else self.sliding_window[layer]

    def layer_rope(self, layer: int) -> RopeConfig | None:
        """Rotary settings of `layer`, or None where nothing is rotated."""
        if self.rope_layers is not None and not self.rope_layers[layer]:
            return None
        local = self.local_rope is not None and self.window(layer) is not None
        return self.local_rope if local else self.rope

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        if isinstance(fields, dict):
            ropes = {k: fields[k] for k in ("rope", "local_rope") if fields.get(k) is not None}
            fields = fields | {name: RopeConfig.from_dict(rope) for name, rope in ropes.items()}
        return super().from_dict(fields)


def symmetric_skip(num_layers: int, num_skipped: int) -> tuple[bool, ...]:
    """The middle `num_skipped` of `num_layers` layers, as a static skip mask.

    Where the halves cannot be equal, the first half keeps the extra layer. S3D skips symmetrically
    around the middle (arXiv 2405.20314, abstract).
    """
    _check(
        0 <= num_skipped < num_layers,
        f"can skip 0 to {num_layers - 1} of {num_layers} layers, not {num_skipped}",
    )
    first = (num_layers - num_skipped + 1) // 2
    return tuple(first <= i < first + num_skipped for i in range(num_layers))


@dataclasses.dataclass(frozen=True)
class DraftConfig(_Record):
    """How the model drafts for itself.

    Attributes:
        skip: one entry per layer; True means that the draft pass jumps over the layer.
        gamma: draft tokens proposed per iteration (γ), at least 1.
        block_attention: inside the draft block, "causal" or "bidirectional".
    """

    skip: tuple[bool, ...]
    gamma: int = 4
    block_attention: Literal["causal", "bidirectional"] = "causal"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_gamma(self.gamma)
        _check(
            isinstance(self.skip, tuple),
            f"skip must be a list with one entry per layer, got {self.skip!r}",
        )
        _check(
            all(isinstance(s, bool) for s in self.skip),
            f"skip must hold only True and False, got {self.skip}",
        )
        _check(not all(self.skip), f"skip {self.skip} keeps no layer; the draft needs at least one")
        _check(
            self.block_attention in ("causal", "bidirectional"),
            f"block_attention must be 'causal' or 'bidirectional', got {self.block_attention!r}",
        )

    def validate_for(self, config: ModelConfig) -> None:
        """Raises ConfigError unless `skip` has one entry per layer of the model."""
        _check(
            len(self.skip) == config.num_layers,
            f"skip has {len(self.skip)} entries, the model has {config.num_layers} layers",
        )

    @property
    def draft_depth(self) -> float:
        """Fraction of the layers that the draft pass runs (β)."""
        return 1.0 - sum(self.skip) / len(self.skip)


@dataclasses.dataclass(frozen=True)
class PassCosts(_Record):
    """What the passes of an S3D iteration cost on a device, in steps of plain decoding.

    Attributes:
        draft: the draft pass of the settings that they belong to.
        verify: the verify pass with w draft tokens, w = 0 … γ. With none it is a step: 1.
    """

    draft: float
    verify: tuple[float, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(_is_positive(self.draft), f"the cost of a pass must be > 0, got {self.draft!r}")
        _check(
            isinstance(self.verify, tuple)
            and len(self.verify) >= 2
            and all(map(_is_positive, self.verify))
            and self.verify[0] == 1,
            "verify must hold the costs of 0, 1, … draft tokens, the first of them 1, got "
            f"{self.verify!r:.80}",
        )

    @classmethod
    def estimated(cls, draft: DraftConfig, bound_by_memory: bool) -> Self:
        """What the passes of S3D cost by the layers that they run, where nothing was measured.

        Args:
            draft: skip and γ.
            bound_by_memory: the device multiplies a few tokens by a weight while it reads it. Then
                a draft pass costs its share of the layers, and a verify pass a step, at the least.
                Otherwise (CPUs in float32 and int8) more, about as much as docs/performance.md
                measured for four and five tokens.
        """
        draft_extra, verify = (0.0, 1.0) if bound_by_memory else (0.15, 1.3)
        return cls(draft.draft_depth + draft_extra, (1.0, *(verify,) * draft.gamma))

    def iteration(self, gamma: int) -> float:
        """The draft pass, and the verify pass with `gamma` draft tokens."""
        return self.draft + self.verify[gamma]


@dataclasses.dataclass(frozen=True)
class PromptLookupConfig(_Record):
    """How the text so far drafts for itself.

    Attributes:
        gamma: draft tokens proposed per iteration (γ), at least 1.
        ngram: the last tokens that are looked for further up, at most.
    """

    gamma: int = 4
    ngram: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_gamma(self.gamma)
        _check(
            is_integer(self.ngram) and 1 <= self.ngram <= MAX_NGRAM,
            f"ngram must be an integer from 1 to {MAX_NGRAM}, got {self.ngram!r}",
        )


@dataclasses.dataclass(frozen=True)
class TwoModelConfig(_Record):
    """How a second, smaller model drafts.

    Attributes:
        model: the second model; its vocabulary is the target's.
        gamma: draft tokens proposed per iteration (γ), at least 1.
    """

    model: ModelConfig
    gamma: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_gamma(self.gamma)


def _check_gamma(gamma: Any) -> None:
    _check(
        is_integer(gamma) and gamma >= 1,
        f"gamma must be an integer >= 1, got {gamma!r}; for no speculation use method='ar'",
    )


@dataclasses.dataclass(frozen=True)
class SamplingConfig(_Record):
    """How one row's next token is chosen from its logits. The defaults are greedy decoding.

    Applied in this order, in float32: logit bias, repetition penalty, frequency and presence
    penalty; then temperature, top-k, top-p, min-p.

    Attributes:
        temperature: 0 is greedy (argmax); otherwise logits are divided by it.
        top_k: keep the k most likely tokens (ties at the border are kept); 0 keeps all.
        top_p: keep the smallest set of most likely tokens whose probability reaches top_p; 1 keeps
            all.
        min_p: keep tokens at least min_p times as likely as the most likely one; 0 keeps all.
        repetition_penalty: logits of tokens in prompt or output are divided (if > 0) or
            multiplied (if < 0) by it (Keskar et al., arXiv 1909.05858); 1 is off.
        presence_penalty, frequency_penalty: subtracted from the logits of tokens in the output,
            once or per occurrence (as in the OpenAI API); 0 is off.
        logit_bias: (token id, bias) pairs, added to the logits; -inf forbids a token.

    Temperature, biases and penalties are bounded, so that no step of it leaves float32.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(
            _is_finite(self.temperature) and 0 <= self.temperature <= _LARGEST,
            f"temperature must be a number >= 0, up to 1e30, got {self.temperature!r}",
        )
        _check(
            is_integer(self.top_k) and 0 <= self.top_k < 2**31,
            f"top_k must be an integer >= 0 (0 is off), got {self.top_k!r}",
        )
        _check(
            _is_positive(self.top_p) and self.top_p <= 1,
            f"top_p must be in (0, 1], got {self.top_p!r}",
        )
        _check(
            _is_finite(self.min_p) and 0 <= self.min_p <= 1,
            f"min_p must be in [0, 1], got {self.min_p!r}",
        )
        _check(
            _is_finite(self.repetition_penalty) and 1e-6 <= self.repetition_penalty <= 1e6,
            "repetition_penalty must be a number > 0, from 1e-6 to 1e6, "
            f"got {self.repetition_penalty!r}",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _check(
                _is_finite(value) and abs(value) <= _LARGEST,
                f"{name} must be a number within ±1e30, got {value!r}",
            )
        self._check_bias()

    def _check_bias(self) -> None:
        pairs = self.logit_bias
        _check(
            isinstance(pairs, tuple) and all(isinstance(p, tuple) and len(p) == 2 for p in pairs),
            f"logit_bias must be (token id, bias) pairs, got {pairs!r:.80}",
        )
        for token, bias in pairs:
            known = bias == -math.inf or (_is_finite(bias) and abs(bias) <= _LARGEST)
            _check(
                is_integer(token) and token >= 0 and known,
                "logit_bias needs (token id >= 0, bias within ±1e30 or -inf) pairs, "
                f"got ({token!r}, {bias!r})",
            )
        _check(
            len({token for token, _ in pairs}) == len(pairs),
            f"logit_bias names a token twice, got {pairs!r:.80}",
        )
