"""The options of a batch: what users may say, checked and turned into a decoding program."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import jax
import numpy as np

from s3d_jax.decoding.sampling import SamplingParams, batch_sampling
from s3d_jax.decoding.state import DecodeSpec
from s3d_jax.drafters import registry
from s3d_jax.drafters.base import Drafter, Target
from s3d_jax.errors import ConfigError, InputError
from s3d_jax.jax_settings import under_usual_jax_settings
from s3d_jax.keys import seeded_keys
from s3d_jax.machine import check_memory
from s3d_jax.settings.drafting import PassCosts
from s3d_jax.settings.records import is_integer, is_list, plain
from s3d_jax.settings.sampling import SamplingConfig
from s3d_jax.text import is_text


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of `generate`, `stream` and `chat`; a list holds one entry per prompt.

    A method that was registered from outside may take further options.

    Attributes:
        max_new_tokens: new tokens at most (default 128).
        method: what drafts: "s3d" (default), the model itself in one pass; "ar", nothing (plain
            decoding, one token per pass); "prompt-lookup", the text so far; "self-spec" and
            "early-exit", the model without some or without its last layers, token by token;
            "eagle" and "medusa", a trained draft that reads hidden states; "two-model",
            `lm.draft_model`.
        gamma: draft tokens per iteration; None takes the tuned number, else the draft's own, for
            untrained methods 4.
        skip: one entry per layer, True = the draft skips it; the default as with gamma. For
            "self-spec" the middle half, for "early-exit" the last half by default.
        leaves: of "s3d": how many other candidates for the first, second, … draft token are
            verified with them; None takes the tuned ones with the tuned gamma and skip, else none.
            They pay where more rows cost a pass little, as on GPUs.
        adaptive: of "s3d": each row decodes plainly for a while where drafting does not pay
            (default); False always drafts, as merged drafts do in any case.
        copies: of "s3d": where a text repeats itself, a row proposes what followed the last time,
            without a draft pass (default: as `adaptive`).
        ngram: of "prompt-lookup": how many of the last tokens are searched for in the text, at most
            (3).
        stop: strings that end a text; they are not part of it, and may hold special tokens.
        eos_token_ids: tokens that end a text; None takes the model's own, () never stops.
        seed: equal seeds, prompts and settings give equal outputs. From one number each row gets a
            key of its own; entries of a list are the rows' own seeds, whatever else is in the
            batch.
        temperature ... logit_bias: as in SamplingConfig; logit_bias is a dict from token id to
            bias. The default is greedy.
    """

    max_new_tokens: int | Sequence[int]
    method: str
    gamma: int | None
    skip: Sequence[bool] | None
    leaves: Sequence[int] | None
    adaptive: bool | None
    copies: bool | None
    ngram: int | None
    stop: str | Sequence[str]
    eos_token_ids: Sequence[int] | None
    seed: int | Sequence[int]
    temperature: float | Sequence[float]
    top_k: int | Sequence[int]
    top_p: float | Sequence[float]
    min_p: float | Sequence[float]
    repetition_penalty: float | Sequence[float]
    presence_penalty: float | Sequence[float]
    frequency_penalty: float | Sequence[float]
    logit_bias: Mapping[int, float] | Sequence[Mapping[int, float]]


_SAMPLING = tuple(field.name for field in dataclasses.fields(SamplingConfig))


@dataclasses.dataclass(frozen=True)
class Request:
    """Checked options of one batch.

    Attributes:
        max_new_tokens: of each row.
        spec: the program.
        stop_ids: tokens that end a text.
        drafter: proposes the draft tokens; None is AR.
        costs: of the passes, by which rows decide whether to draft; None always drafts.
        gain: speed over that of plain decoding, where tuning has measured it.
        drafter_params: its parameters.
        sampling: the rows' sampling settings.
        stops: strings that end a text.
    """

    max_new_tokens: tuple[int, ...]
    spec: DecodeSpec
    stop_ids: frozenset[int]
    drafter: Drafter | None
    costs: PassCosts | None
    gain: float | None
    drafter_params: Any
    sampling: SamplingParams
    stops: tuple[str, ...]


@under_usual_jax_settings
def check_options(
    target: Target,
    rows: int,
    *,
    max_new_tokens: int | Sequence[int] = 128,
    method: str = registry.DEFAULT,
    gamma: int | None = None,
    skip: Sequence[bool] | None = None,
    leaves: Sequence[int] | None = None,
    adaptive: bool | None = None,
    copies: bool | None = None,
    ngram: int | None = None,
    stop: str | Sequence[str] = (),
    eos_token_ids: Sequence[int] | None = None,
    seed: int | Sequence[int] = 0,
    **others: Any,
) -> Request:
    """GenerateOptions with their defaults, for `rows` prompts.

    Args:
        target: the model.
        rows: B.
        max_new_tokens, method, gamma, skip, leaves, adaptive, copies, ngram, stop, eos_token_ids,
            seed: see GenerateOptions.
        **others: sampling settings, and options that only a drafter from outside takes.

    Raises:
        InputError, ConfigError: an option that is unknown or out of range.
    """
    sampling = {name: others.pop(name) for name in _SAMPLING if name in others}
    own = registry.option_names(method)
    if unknown := sorted(set(others) - set(own)):
        known = sorted({*GenerateOptions.__annotations__, *own})
        raise ConfigError(f"unknown generation options {unknown}; known are {known}")
    choice = registry.choose(
        target,
        method,
        gamma=gamma,
        skip=skip,
        leaves=leaves,
        adaptive=adaptive,
        copies=copies,
        ngram=ngram,
        **others,
    )
    new_tokens = _per_row("max_new_tokens", max_new_tokens, rows)
    if not all(is_integer(n) and n >= 1 for n in new_tokens):
        raise InputError(f"max_new_tokens must be an integer >= 1, got {max_new_tokens!r}")
    vocab_size = target.config.vocab_size
    settings = _sampling_rows(sampling, rows)
    if any(row.logit_bias for row in settings):
        check_memory(
            2 * 4 * rows * vocab_size,  # float32, on the host and on the device
            f"the logit_bias of {rows} rows needs",
            "generate fewer at once",
        )
    params, features = batch_sampling(settings, _row_keys(seed, rows), vocab_size)
    ids = target.eos_token_ids if eos_token_ids is None else eos_token_ids
    spec = DecodeSpec(
        config=target.config,
        drafter=choice.drafter,
        features=features,
        copies=choice.copies,
    )
    drafter_params = None if choice.drafter is None else choice.drafter.params(target)
    limits = tuple(min(n, target.max_length) for n in new_tokens)
    return Request(
        max_new_tokens=limits,
        spec=spec,
        stop_ids=frozenset(checked_ids(ids, vocab_size)),
        drafter=choice.drafter,
        costs=choice.costs,
        gain=choice.gain,
        drafter_params=drafter_params,
        sampling=params,
        stops=_stop_strings(stop),
    )


def checked_ids(eos_token_ids: Any, vocab_size: int) -> tuple[int, ...]:
    """End-of-text ids as plain numbers.

    Raises:
        InputError: they are no list of ids of the vocabulary.
    """
    ids = plain(eos_token_ids)
    if not is_list(ids) or not all(is_integer(i) and 0 <= i < vocab_size for i in ids):
        raise InputError(
            f"eos_token_ids must be a list of ids from 0 to {vocab_size - 1}, got {ids!r:.80}"
        )
    return tuple(ids)


def _stop_strings(stop: Any) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else stop
    if not is_list(stops) or not all(isinstance(s, str) and s for s in stops):
        raise InputError(f"stop must be a non-empty text or a list of such, got {stop!r}")
    if half := [s for s in stops if not is_text(s)]:
        raise InputError(
            f"stop is no valid text: {half[0]!r:.80} holds half a character (a lone surrogate)"
        )
    return tuple(stops)


def _per_row(name: str, value: Any, rows: int) -> list[Any]:
    value = plain(value)
    if is_list(value):
        if len(value) != rows:
            raise InputError(f"{name} has {len(value)} entries for {rows} prompts")
        return value
    return [value] * rows


def _sampling_rows(options: dict[str, Any], rows: int) -> list[SamplingConfig]:
    columns = {name: _per_row(name, value, rows) for name, value in options.items()}
    if "logit_bias" in columns:
        columns["logit_bias"] = [_bias_pairs(bias) for bias in columns["logit_bias"]]
    return [SamplingConfig(**{k: v[b] for k, v in columns.items()}) for b in range(rows)]


def _bias_pairs(bias: Any) -> tuple[tuple[int, float], ...]:
    if not isinstance(bias, Mapping):
        raise InputError(f"logit_bias must be a dict from token id to bias, got {bias!r:.80}")
    return tuple((plain(token), plain(value)) for token, value in bias.items())


def _row_keys(seed: int | Sequence[int], rows: int) -> jax.Array:
    seeds = _per_row("seed", seed, rows)
    if not all(is_integer(s) and 0 <= s < 2**32 for s in seeds):
        raise InputError(f"seed must be an integer from 0 to {2**32 - 1}, got {seed!r:.80}")
    numbers = np.zeros(rows) if is_list(plain(seed)) else np.arange(rows)
    return seeded_keys(np.array(seeds, np.uint32), numbers)
