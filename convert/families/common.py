"""What the families share: strict reading of a HF config, rope settings, tables of tensor names."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from s3d_jax.config import ModelConfig, RopeConfig
from s3d_jax.errors import ConfigError

# Defaults of HF's generate that old checkpoints keep in config.json. They do not touch the model.
GENERATION_FIELDS = frozenset(
    (
        *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
        *("forced_bos_token_id", "forced_eos_token_id", "sep_token_id", "suppress_tokens"),
        *("begin_suppress_tokens", "bad_words_ids", "do_sample", "temperature", "top_k", "top_p"),
        *("typical_p", "repetition_penalty", "encoder_no_repeat_ngram_size", "length_penalty"),
        *("no_repeat_ngram_size", "diversity_penalty", "num_beams", "num_beam_groups"),
        *("num_return_sequences", "early_stopping", "max_length", "min_length", "output_scores"),
        *("remove_invalid_values", "exponential_decay_length_penalty", "return_dict_in_generate"),
    )
)

# Fields on training, files, other tools or outputs, never on what the forward pass computes.
# pretraining_tp is among them: it only split the products of old implementations.
_HARMLESS_FIELDS = GENERATION_FIELDS | frozenset(
    (
        *("model_type", "architectures", "torch_dtype", "dtype", "transformers_version"),
        *("_name_or_path", "use_cache", "initializer_range", "pretraining_tp", "tokenizer_class"),
        *("attention_dropout", "resid_pdrop", "embd_pdrop", "hidden_dropout"),
        "attn_implementation",
        *("_attn_implementation", "_attn_implementation_autoset", "output_attentions"),
        *("output_hidden_states", "use_return_dict", "return_dict", "torchscript", "use_bfloat16"),
        *("chunk_size_feed_forward", "problem_type", "id2label", "label2id", "finetuning_task"),
        *("task_specific_params", "prefix", "unsloth_version", "unsloth_fixed"),
        *("is_llama_config", "transformers.js_config"),
        *("context_window_size", "prefill_chunk_size", "tensor_parallel_shards"),  # MLC presets
    )
)

# Switches of HF's that change the computation, or not where they are off, as full dumps have them.
_HARMLESS_IF_OFF = frozenset(
    (
        *("is_decoder", "is_encoder_decoder", "add_cross_attention", "tie_encoder_decoder"),
        *("pruned_heads", "tf_legacy_loss"),
    )
)

_MAX_SIZE = 2**31 - 1
_MAX_LAYERS = 4096  # so that a damaged config cannot ask for endless tables


class Fields:
    """The fields of a HF config.json, each to be taken by the family that understands it.

    What nobody has taken, and is not known to be harmless, is an error in `finish`: it may change
    what the model computes. A field that is null counts as absent, as in HF.
    """

    def __init__(self, fields: Mapping[str, Any], where: str = "config.json") -> None:
        self._fields = {key: value for key, value in fields.items() if value is not None}
        self._where = where

    def inside(self, name: str, fields: Mapping[str, Any]) -> "Fields":
        """The fields of the nested object `name`."""
        return Fields(fields, f"{self._where}: {name}")

    def error(self, message: str) -> ConfigError:
        return ConfigError(f"{self._where}: {message}")

    def take(self, name: str, default: Any = None) -> Any:
        """The field of any type, or `default`."""
        return self._fields.pop(name, default)

    def size(self, name: str, default: int | None = None, limit: int = _MAX_SIZE) -> int:
        """A positive integer."""
        value = self.take(name, default)
        if value is None:
            raise self.error(f"{name} is missing")
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= limit:
            raise self.error(f"{name} must be an integer from 1 to {limit}, got {value!r:.80}")
        return value

    def layers(self, name: str) -> int:
        return self.size(name, limit=_MAX_LAYERS)

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self.take(name, default)
        if value is None:
            raise self.error(f"{name} is missing")
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value <= 0:
            raise self.error(f"{name} must be a number above 0, got {value!r:.80}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise self.error(f"{name} must be true or false, got {value!r:.80}")
        return value

    def require(self, name: str, value: Any) -> None:
        """A field that, if there, must have the one value that is implemented."""
        found = self.take(name, value)
        if found != value or type(found) is not type(value):
            raise self.error(f"{name} is {found!r:.80}, and only {value!r} is supported")

    def choice(self, name: str, choices: Mapping[str, str], default: str | None = None) -> str:
        value = self.take(name, default)
        if not isinstance(value, str) or value not in choices:
            raise self.error(f"{name} is {value!r:.80}, and supported are {sorted(choices)}")
        return choices[value]

    def object(self, name: str) -> dict[str, Any]:
        """A nested object, or an empty one."""
        value = self.take(name, {})
        if not isinstance(value, dict):
            raise self.error(f"{name} must be an object, got {value!r:.80}")
        return value

    def finish(self, harmless: Iterable[str] = _HARMLESS_FIELDS) -> None:
        """Raises ConfigError if fields are left that nobody understood."""
        off = {name for name in _HARMLESS_IF_OFF & self._fields.keys() if not self._fields[name]}
        unknown = sorted(self._fields.keys() - set(harmless) - off)
        if unknown:
            listed = ", ".join(f"{name} = {self._fields[name]!r:.60}" for name in unknown)
            raise self.error(
                f"fields that are not understood and may change what the model computes: {listed}. "
                "If you know that they do not, remove them from a copy of config.json"
            )


def take_rope(fields: Fields, max_position_embeddings: int) -> RopeConfig:
    """Rotary settings, in either spelling of HF.

    transformers 4: `rope_theta`, and `rope_scaling` with "type" or "rope_type". transformers 5:
    all of it in `rope_parameters`.
    """
    old, new = fields.object("rope_scaling"), fields.object("rope_parameters")
    if old and new and old != new:
        raise fields.error("rope_scaling and rope_parameters are both there and differ: remove one")
    rope = fields.inside("rope_parameters" if new else "rope_scaling", new or old)
    kind = _agreed(rope, (rope, "rope_type"), (rope, "type")) or "default"
    settings: dict[str, Any] = {"type": kind}
    theta = _agreed(fields, (fields, "rope_theta"), (rope, "rope_theta"))
    if theta is not None:
        settings["theta"] = theta
    fraction = _agreed(fields, *((f, "partial_rotary_factor") for f in (fields, rope)))
    if fraction is not None:
        settings["rotary_fraction"] = fraction
    original = rope.take("original_max_position_embeddings")
    if kind in ("linear", "dynamic", "llama3"):
        settings["factor"] = rope.number("factor")
    if kind == "dynamic":
        # HF's formula grows from max_position_embeddings, and looks at no other original length.
        if original not in (None, max_position_embeddings):
            raise rope.error(
                f"original_max_position_embeddings {original!r:.80} differs from "
                f"max_position_embeddings {max_position_embeddings}, from which this type grows"
            )
        settings["original_max_position_embeddings"] = max_position_embeddings
    if kind == "llama3":
        settings["original_max_position_embeddings"] = original
        settings["low_freq_factor"] = rope.number("low_freq_factor")
        settings["high_freq_factor"] = rope.number("high_freq_factor")
    try:
        config = RopeConfig(**settings)
    except (ConfigError, TypeError) as error:  # TypeError: a string where a number belongs
        raise rope.error(str(error)) from error
    rope.finish(harmless=())
    return config


def _agreed(fields: Fields, *places: tuple[Fields, str]) -> Any:
    """The value of a field that has several places; None if it is in none of them."""
    values = [value for owner, name in places if (value := owner.take(name)) is not None]
    if any(value != values[0] for value in values):
        raise fields.error(f"{places[0][1]} is given twice, with different values {values!r:.80}")
    return values[0] if values else None


def rope_fields(rope: RopeConfig) -> dict[str, Any]:
    """HF's fields for rotary settings, in the spelling that transformers 4 and 5 both read."""
    scaling: dict[str, Any] = {"rope_type": rope.type, "factor": rope.factor}
    if rope.type == "llama3":
        scaling |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_position_embeddings,
        }
    return {
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.type == "default" else scaling,
    }


@dataclasses.dataclass(frozen=True)
class Part:
    """A HF tensor that makes up a native array, or a piece of one.

    Attributes:
        name: HF's name.
        shape: HF's shape.
        transposed: the native array holds it [in, out], and HF [out, in].
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool = False


# Path in the native parameter tree -> the HF tensors that, side by side along `out`, are the array.
Table = dict[str, tuple[Part, ...]]


def native_shape(parts: Sequence[Part]) -> tuple[int, ...]:
    """The shape of the array that the parts make up."""
    out, rest = sum(part.shape[0] for part in parts), parts[0].shape[1:]
    return (*rest, out) if parts[0].transposed else (out, *rest)


def pieces(parts: Iterable[Part], array: np.ndarray) -> Iterator[tuple[Part, np.ndarray]]:
    """Each part with its piece of the native array: a view, in HF's orientation."""
    start = 0
    for part in parts:
        rows = array.T if part.transposed else array
        yield part, rows[start : start + part.shape[0]]
        start += part.shape[0]


@dataclasses.dataclass(frozen=True)
class Family:
    """One kind of HF model.

    Attributes:
        model_type, architecture: HF's names.
        read: the family's own fields of config.json -> ModelConfig; leaves unknown ones untaken.
        write: ModelConfig -> fields of config.json, for exports.
        table: ModelConfig -> its table of tensor names.
        ignored_tensors: regular expressions of tensors that hold nothing to learn.
    """

    model_type: str
    architecture: str
    read: Callable[[Fields], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    table: Callable[[ModelConfig], Table]
    ignored_tensors: tuple[str, ...] = ()

    def config(self, fields: Mapping[str, Any]) -> ModelConfig:
        """The model that config.json describes; its dtype is left at the default.

        Raises:
            ConfigError: a field is missing, out of range, or not understood.
        """
        reader = Fields(fields)
        config = self.read(reader)
        reader.finish()
        return config


def decoder_table(config: ModelConfig, layer: Mapping[str, Iterable[str]]) -> Table:
    """The table of a decoder whose tensors are named as in Llama, "model.layers.0...." and so on.

    Args:
        config: the model.
        layer: for each native path inside a layer, the HF modules inside the layer that make it
            up. For "attention/qkv" and "mlp/gate_up" these are all the pieces, or one fused module.
    """
    c = config
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    pieces = {  # native module: rows of the pieces, columns, has a bias
        "attention/qkv": ((q, kv, kv), c.hidden_size, c.qkv_bias),
        "attention/out": ((c.hidden_size,), q, c.attention_out_bias),
        "mlp/gate_up": ((c.intermediate_size, c.intermediate_size), c.hidden_size, c.mlp_bias),
        "mlp/down": ((c.hidden_size,), c.intermediate_size, c.mlp_bias),
    }
    norm_sizes = {"attention/q_norm": c.head_dim, "attention/k_norm": c.head_dim}
    table: Table = {
        "embed/embedding": (Part("model.embed_tokens.weight", (c.vocab_size, c.hidden_size)),)
    }
    for i in range(c.num_layers):
        for module, names in layer.items():
            hf = [f"model.layers.{i}.{name}" for name in names]
            native = f"layers_{i}/{module}"
            if module not in pieces:
                size = norm_sizes.get(module, c.hidden_size)
                table[f"{native}/scale"] = (Part(f"{hf[0]}.weight", (size,)),)
                continue
            rows, columns, has_bias = pieces[module]
            if len(hf) == 1:
                rows = (sum(rows),)
            both = list(zip(hf, rows, strict=True))
            weights = (Part(f"{n}.weight", (r, columns), transposed=True) for n, r in both)
            table[f"{native}/weight"] = tuple(weights)
            if has_bias:
                table[f"{native}/bias"] = tuple(Part(f"{n}.bias", (r,)) for n, r in both)
    table["final_norm/scale"] = (Part("model.norm.weight", (c.hidden_size,)),)
    if not c.tie_embeddings:
        head = Part("lm_head.weight", (c.vocab_size, c.hidden_size), transposed=True)
        table["lm_head/weight"] = (head,)
    return table
