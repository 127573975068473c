"""What the families share: the fields of all decoders, and the tables of tensor names."""

import dataclasses
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from convert.families.fields import Fields
from convert.families.rope import rope_fields, take_rope
from s3d_jax.settings.model import ModelConfig

# HF's names -> ours, and back.
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_HF_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}

# Native module inside a layer -> the HF modules inside the layer that make it up.
LAYER = {
    "attention_norm": ["input_layernorm"],
    "attention/qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention/out": ["self_attn.o_proj"],
    "mlp_norm": ["post_attention_layernorm"],
    "mlp/gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp/down": ["mlp.down_proj"],
}
QK_NORMS = {"attention/q_norm": ["self_attn.q_norm"], "attention/k_norm": ["self_attn.k_norm"]}


@dataclasses.dataclass(frozen=True)
class Part:
    """A HF tensor that makes up a native array, or a piece of one.

    Attributes:
        name: HF's name.
        shape: HF's shape.
    """

    name: str
    shape: tuple[int, ...]


# Path in the native parameter tree -> the HF tensors that, one below the other, are the array.
Table = dict[str, tuple[Part, ...]]


def native_shape(parts: Sequence[Part]) -> tuple[int, ...]:
    """The shape of the array that the parts make up."""
    return (sum(part.shape[0] for part in parts), *parts[0].shape[1:])


def pieces(parts: Iterable[Part], array: np.ndarray) -> Iterator[tuple[Part, np.ndarray]]:
    """Each part with its piece of the native array: a view."""
    start = 0
    for part in parts:
        yield part, array[start : start + part.shape[0]]
        start += part.shape[0]


@dataclasses.dataclass(frozen=True)
class Names:
    """Where a source keeps the decoder's tensors.

    Attributes:
        model: what stands before "layers.0....", "embed_tokens.weight" and "norm.weight".
        head: the output head.
    """

    model: str = "model."
    head: str = "lm_head.weight"

    @property
    def embeddings(self) -> str:
        """The table of token embeddings."""
        return f"{self.model}embed_tokens.weight"


@dataclasses.dataclass(frozen=True)
class Family:
    """One kind of HF model.

    Attributes:
        model_type, architecture: HF's names.
        read: the family's own fields of config.json -> ModelConfig; leaves unknown ones untaken.
        write: ModelConfig -> fields of config.json, for exports.
        layer: the tensors of a layer, as `decoder_table` takes them.
        names: where the tensors may be, the usual place first.
        defaults: HF's values of fields that config.json may leave out.
        renew: rewrites config.json, for exports, in the spelling that HF reads today without a
            warning.
        ignored_tensors: regular expressions of tensors that are no part of the model, and why.
    """

    model_type: str
    architecture: str
    read: Callable[[Fields], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    layer: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=lambda: LAYER)
    names: tuple[Names, ...] = (Names(),)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    renew: Callable[[dict[str, Any], ModelConfig], dict[str, Any]] = lambda fields, config: fields
    ignored_tensors: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {  # old versions saved them
            r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq": (
                "rotary tables follow from the config"
            )
        }
    )

    def config(self, fields: Mapping[str, Any], ignored: Sequence[str] = ()) -> ModelConfig:
        """The model that config.json describes; its dtype is left at the default.

        Args:
            fields: of config.json.
            ignored: names of fields that are not understood and have no effect, as the user says.

        Raises:
            ConfigError: a field is missing, out of range, or not understood; or one of `ignored` is
                understood, or is not there.
        """
        taken = Fields(fields, self.defaults, ignored=ignored)
        config = self.take(taken)
        if needless := [name for name in ignored if name not in taken.passed]:
            raise taken.error(
                f"--ignore-field {', '.join(needless):.200}: there is no such field whose meaning "
                "is unknown, so leave the option out"
            )
        return config

    def take(self, fields: Fields) -> ModelConfig:
        """As `config`, from fields that have their defaults already."""
        architectures = fields.take("architectures", [self.architecture])
        # Llama 1 is called LLaMAForCausalLM.
        if str(architectures).lower() != str([self.architecture]).lower():
            raise fields.error(
                f"architectures is {architectures!r:.80}, and supported is {self.architecture!r}"
            )
        config = self.read(fields)
        fields.finish()
        return config

    def why_ignored(self, tensor: str) -> str:
        """Why a tensor is no part of the model; "" if it should be one."""
        reasons = self.ignored_tensors.items()
        return next((why for pattern, why in reasons if re.fullmatch(pattern, tensor)), "")

    def names_in(self, tensors: Container[str]) -> Names:
        """Where the tensors are, in a source that has these."""
        return next((names for names in self.names if names.embeddings in tensors), self.names[0])

    def table(self, config: ModelConfig, tensors: Container[str] = ()) -> Table:
        """The model's table of tensor names, for a source that has `tensors`."""
        return decoder_table(config, self.layer, self.names_in(tensors))


def take_decoder(fields: Fields, **rope: Any) -> dict[str, Any]:
    """Takes the fields of every decoder with one rotary embedding, as arguments of ModelConfig.

    Args:
        fields: the model's.
        rope: options of `take_rope`.
    """
    sizes = take_sizes(fields)
    return sizes | {"rope": take_rope(fields, sizes["max_position_embeddings"], **rope)}


def write_decoder(config: ModelConfig) -> dict[str, Any]:
    """HF's fields for what `take_decoder` takes."""
    return {**write_sizes(config), **rope_fields(config)}


def take_sizes(fields: Fields, *, activation: str | None = None) -> dict[str, Any]:
    """Takes the fields of every decoder but the rotary ones, as arguments of ModelConfig.

    Args:
        fields: the model's.
        activation: the family's only one, or None to take `hidden_act`.
    """
    hidden_size, num_heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    if (head_dim := fields.optional_size("head_dim")) is None:
        if hidden_size % num_heads:
            raise fields.error(
                f"hidden_size {hidden_size} is no multiple of num_attention_heads {num_heads}, and "
                "there is no head_dim"
            )
        head_dim = hidden_size // num_heads
    return {
        "vocab_size": fields.size("vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": fields.size("intermediate_size"),
        "num_layers": fields.layers("num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": fields.size("num_key_value_heads", num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": fields.size("max_position_embeddings"),
        "norm_eps": fields.number("rms_norm_eps"),
        "activation": activation or fields.choice("hidden_act", _ACTIVATIONS),
        "tie_embeddings": fields.flag("tie_word_embeddings", False),
    }


def write_sizes(config: ModelConfig) -> dict[str, Any]:
    """HF's fields for what `take_sizes` takes."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": _HF_ACTIVATIONS[config.activation],
        "tie_word_embeddings": config.tie_embeddings,
    }


def take_biases(fields: Fields, *, mlp: bool = False) -> dict[str, Any]:
    """Takes `attention_bias`, and `mlp_bias` if the family has one, as arguments of ModelConfig."""
    bias = fields.flag("attention_bias", False)
    biases = {"qkv_bias": bias, "attention_out_bias": bias}
    return biases | ({"mlp_bias": fields.flag("mlp_bias", False)} if mlp else {})


def write_biases(config: ModelConfig, *, mlp: bool = False) -> dict[str, Any]:
    """HF's fields for what `take_biases` takes."""
    return {"attention_bias": config.qkv_bias} | ({"mlp_bias": config.mlp_bias} if mlp else {})


_FULL, _SLIDING = "full_attention", "sliding_attention"


def take_window(fields: Fields) -> int | None:
    """Takes the size of sliding windows, or None; some files name it twice."""
    window, again = (fields.optional_size(n) for n in ("sliding_window", "sliding_window_size"))
    if again not in (None, window):
        raise fields.error(f"sliding_window is {window}, and sliding_window_size {again}")
    return window


def take_windows(
    fields: Fields, window: int | None, is_sliding: Sequence[bool]
) -> tuple[int | None, ...] | None:
    """Takes the window of each layer, or None if no layer has one.

    Args:
        fields: the model's; `layer_types` is taken from them.
        window: the size, or None if windows are off.
        is_sliding: which layers have one if there are no `layer_types`.
    """
    usual = [_SLIDING if window is not None and sliding else _FULL for sliding in is_sliding]
    kinds = fields.take("layer_types", usual)
    if not isinstance(kinds, list) or any(kind not in (_FULL, _SLIDING) for kind in kinds):
        raise fields.error(f"layer_types must list {_FULL!r} or {_SLIDING!r}, got {kinds!r:.80}")
    if len(kinds) != len(is_sliding):
        raise fields.error(
            f"layer_types has {len(kinds)} entries, the model {len(is_sliding)} layers"
        )
    if _SLIDING not in kinds:
        return None
    if window is None:
        raise fields.error(f"layer_types has {_SLIDING!r}, and there is no sliding window")
    return tuple(window if kind == _SLIDING else None for kind in kinds)


def write_windows(config: ModelConfig) -> dict[str, Any]:
    """HF's `layer_types` and `sliding_window`; the latter is null if no layer has one."""
    windows = [config.window(i) for i in range(config.num_layers)]
    return {
        "layer_types": [_FULL if window is None else _SLIDING for window in windows],
        "sliding_window": next((window for window in windows if window is not None), None),
    }


def decoder_table(config: ModelConfig, layer: Mapping[str, Sequence[str]], names: Names) -> Table:
    """The table of a decoder whose tensors are named as in Llama, "model.layers.0...." and so on.

    Args:
        config: the model.
        layer: for each native path inside a layer, the HF modules inside the layer that make it
            up. For "attention/qkv" and "mlp/gate_up" these are all the pieces, or one fused module.
        names: where they are.
    """
    c = config
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    pieces = {  # native module: rows of the pieces, columns, has a bias
        "attention/qkv": ((q, kv, kv), c.hidden_size, c.qkv_bias),
        "attention/out": ((c.hidden_size,), q, c.attention_out_bias),
        "mlp/gate_up": ((c.intermediate_size, c.intermediate_size), c.hidden_size, c.mlp_bias),
        "mlp/down": ((c.hidden_size,), c.intermediate_size, c.mlp_bias),
    }
    norm_sizes = {
        "attention/q_norm": q if c.qk_norm_joint else c.head_dim,
        "attention/k_norm": kv if c.qk_norm_joint else c.head_dim,
    }
    table: Table = {"embed/embedding": (Part(names.embeddings, (c.vocab_size, c.hidden_size)),)}
    for i in range(c.num_layers):
        for module, modules in layer.items():
            hf = [f"{names.model}layers.{i}.{name}" for name in modules]
            native = f"layers_{i}/{module}"
            if module not in pieces:
                size = norm_sizes.get(module, c.hidden_size)
                table[f"{native}/scale"] = (Part(f"{hf[0]}.weight", (size,)),)
                continue
            rows, columns, has_bias = pieces[module]
            if len(hf) == 1:
                rows = (sum(rows),)
            both = list(zip(hf, rows, strict=True))
            table[f"{native}/weight"] = tuple(Part(f"{n}.weight", (r, columns)) for n, r in both)
            if has_bias:
                table[f"{native}/bias"] = tuple(Part(f"{n}.bias", (r,)) for n, r in both)
    table["final_norm/scale"] = (Part(f"{names.model}norm.weight", (c.hidden_size,)),)
    if not c.tie_embeddings:
        table["lm_head/weight"] = (Part(names.head, (c.vocab_size, c.hidden_size)),)
    return table
