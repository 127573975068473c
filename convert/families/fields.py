"""Strict reading of a HF config.json: what no family understands is an error."""

from collections.abc import Iterable, Mapping
from typing import Any

from s3d_jax.errors import ConfigError
from s3d_jax.settings.model import MAX_LAYERS, MAX_SIZE
from s3d_jax.settings.records import is_integer, is_positive


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Settings of HF's generate (`GenerationConfig`) that old checkpoints keep in config.json. They do
# not touch the model.
_GENERATION_FIELDS = _names(
    """bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id
    decoder_start_token_id forced_bos_token_id forced_eos_token_id forced_decoder_ids
    suppress_tokens begin_suppress_tokens bad_words_ids force_words_ids constraints sequence_bias
    do_sample temperature top_k top_p top_h min_p typical_p epsilon_cutoff eta_cutoff
    repetition_penalty encoder_repetition_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size diversity_penalty length_penalty exponential_decay_length_penalty
    penalty_alpha guidance_scale renormalize_logits remove_invalid_values num_beams num_beam_groups
    num_return_sequences early_stopping max_length min_length max_new_tokens min_new_tokens max_time
    stop_strings token_healing low_memory dola_layers watermarking_config generation_config
    output_scores output_logits return_dict_in_generate use_cache cache_implementation cache_config
    max_cache_len return_legacy_cache prefill_chunk_size compile_config disable_compile
    continuous_batching_config is_assistant num_assistant_tokens num_assistant_tokens_schedule
    assistant_confidence_threshold assistant_early_exit assistant_lookbehind
    assistant_ensemble_weight target_lookbehind prompt_lookup_num_tokens max_matching_ngram_size
    speculation_type use_mtp"""
)

# Fields on names, files, dtypes, training, outputs, heads for other tasks and kinds of execution,
# never on what the forward pass computes. All of HF's `PreTrainedConfig` of versions 4 and 5, and
# of some tools. pretraining_tp only splits the products of old implementations. max_sequence_length
# was Llama 1's note. The last line is of MLC's runtime.
_HARMLESS_FIELDS = _GENERATION_FIELDS | _names(
    """model_type torch_dtype dtype use_bfloat16 transformers_version auto_map custom_pipelines
    name_or_path _name_or_path _model_name_or_path _commit_hash _auto_class _from_model_config
    _diffusers_version tokenizer_class prefix max_sequence_length model_max_length
    initializer_range initializer_factor pretraining_tp gradient_checkpointing xla_device
    attention_dropout attn_dropout attn_pdrop attention_probs_dropout_prob resid_pdrop resid_dropout
    embd_pdrop embd_dropout hidden_dropout hidden_dropout_prob mlp_dropout activation_dropout
    dropout classifier_dropout layerdrop attn_implementation _attn_implementation
    _attn_implementation_internal _attn_implementation_autoset _flash_attn_2_enabled
    _experts_implementation _experts_implementation_internal base_model_tp_plan base_model_pp_plan
    base_model_ep_plan base_model_fsdp_plan use_flash_attn use_flash_attention
    use_flash_attention_2 output_attentions _output_attentions output_hidden_states output_past
    tie_last_hidden_states use_return_dict return_dict torchscript chunk_size_feed_forward
    keys_to_ignore_at_inference problem_type id2label label2id num_labels finetuning_task
    task_specific_params loss_type summary_type summary_use_proj summary_activation
    summary_proj_to_labels summary_first_dropout unsloth_version unsloth_fixed is_llama_config
    transformers.js_config
    context_window_size tensor_parallel_shards attention_sink_size"""
)

# HF's settings that change the computation if they are on. Full dumps of a config name them too.
_HARMLESS_IF_OFF = _names(
    """is_decoder is_encoder_decoder add_cross_attention cross_attention_hidden_size
    tie_encoder_decoder pruned_heads tf_legacy_loss use_mrope quantization_config
    compression_config sparsity_config per_layer_config output_router_logits is_composition"""
)

_MAX_LISTED = 20  # unknown fields


class Fields:
    """The fields of a HF config.json, each to be taken by the family that understands it.

    `finish` raises an error for fields that were not taken and are not known to be harmless: they
    may change what the model computes. A field that is null counts as absent, as in HF.

    Args:
        fields: the JSON object.
        defaults: values of fields that are left out. A field that is null has no default.
        where: the object's name for messages.
        ignored: names of fields that may be left at the end, here or in a nested object, whatever
            they mean.

    Attributes:
        passed: those of `ignored` that were left, so far.
    """

    def __init__(
        self,
        fields: Mapping[str, Any],
        defaults: Mapping[str, Any] = {},
        where: str = "config.json",
        ignored: Iterable[str] = (),
    ) -> None:
        merged = {**defaults, **fields}
        self._fields = {key: value for key, value in merged.items() if value is not None}
        self._where = where
        self._ignored = frozenset(ignored)
        self.passed: set[str] = set()

    def inside(self, name: str, fields: Mapping[str, Any]) -> "Fields":
        """The fields of the nested object `name`."""
        nested = Fields(fields, where=f"{self._where}: {name}", ignored=self._ignored)
        nested.passed = self.passed
        return nested

    def error(self, message: str) -> ConfigError:
        return ConfigError(f"{self._where}: {message}")

    def take(self, name: str, default: Any = None) -> Any:
        """The field of any type, or `default`."""
        return self._fields.pop(name, default)

    def agreed(self, *places: "tuple[Fields, str]") -> Any:
        """Takes a field that has several places; None if it is in none of them."""
        values = [value for owner, name in places if (value := owner.take(name)) is not None]
        if any(value != values[0] for value in values):
            names = " and ".join(dict.fromkeys(name for _, name in places))
            raise self.error(f"{names} is given twice, with different values {values!r:.80}")
        return values[0] if values else None

    def size(
        self, name: str, default: int | None = None, *, least: int = 1, limit: int = MAX_SIZE
    ) -> int:
        """An integer within bounds."""
        value = self.take(name, default)
        if value is None:
            raise self.error(f"{name} is missing")
        if not is_integer(value) or not least <= value <= limit:
            message = f"{name} must be an integer from {least} to {limit}, got {value!r:.80}"
            raise self.error(message)
        return value

    def optional_size(self, name: str) -> int | None:
        """A positive integer, or None if there is none."""
        return self.size(name) if name in self._fields else None

    def layers(self, name: str) -> int:
        return self.size(name, limit=MAX_LAYERS)

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self.take(name, default)
        if value is None:
            raise self.error(f"{name} is missing")
        if not is_positive(value):
            raise self.error(f"{name} must be a number above 0, got {value!r:.80}")
        return value

    def optional_number(self, name: str) -> float | None:
        """A finite number above 0, or None if there is none."""
        return self.number(name) if name in self._fields else None

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of finite numbers above 0."""
        values = self.take(name, ())
        if not isinstance(values, (list, tuple)):
            raise self.error(f"{name} must be a list of numbers, got {values!r:.80}")
        return tuple(Fields({name: v}, where=self._where).number(name) for v in values)

    def flag(self, name: str, default: bool) -> bool:
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise self.error(f"{name} must be true or false, got {value!r:.80}")
        return value

    def require(self, name: str, value: Any) -> None:
        """Takes a field that must have the one value that is implemented, or be absent."""
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
        """Raises ConfigError if fields are left."""
        off = {name for name in _HARMLESS_IF_OFF & self._fields.keys() if not self._fields[name]}
        left = self._fields.keys() - set(harmless) - off
        self.passed |= left & self._ignored
        unknown = sorted(left - self._ignored)
        if unknown:
            listed = ", ".join(f"{n:.60} = {self._fields[n]!r:.60}" for n in unknown[:_MAX_LISTED])
            if len(unknown) > _MAX_LISTED:
                listed += f" and {len(unknown) - _MAX_LISTED} more"
            raise self.error(
                f"fields that are not understood and may change what the model computes: {listed}. "
                "If you know that they do not, give --ignore-field NAME for each"
            )
