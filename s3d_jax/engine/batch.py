"""One running batch: its options, its compiled programs, and what its rows have produced so far."""

import dataclasses
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from s3d_jax.decoding import step as decode
from s3d_jax.decoding.sampling import SamplingParams, batch_sampling
from s3d_jax.decoding.state import DrafterParams
from s3d_jax.drafters.registry import drafting
from s3d_jax.errors import ConfigError, InputError
from s3d_jax.nn.cache import Kept
from s3d_jax.settings.drafting import Method, TwoModelConfig
from s3d_jax.settings.records import is_integer, is_list, plain
from s3d_jax.settings.sampling import SamplingConfig
from s3d_jax.text import TextRow

if TYPE_CHECKING:
    from s3d_jax.lm import LM

UNLIMITED = int(np.iinfo(np.int32).max)
_USUAL_SLACK = 16  # slots behind the last token, for γ up to 15
_STEPS_PER_LOOK = 8  # iterations between two looks for stop strings


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of `generate`, `stream` and `chat`; a list holds one entry per prompt.

    Attributes:
        max_new_tokens: new tokens at most (default 128).
        method: who drafts: "s3d" (default); "ar", nobody (plain decoding, one token per pass);
            "prompt-lookup", the text so far; "self-spec" and "early-exit", the model without some
            or without its last layers, token by token; "two-model", `lm.draft_model`.
        gamma: draft tokens per iteration; None takes the tuned one, else the draft's own, for other
            methods 4.
        skip: one entry per layer, True = the draft jumps over it; None is as with gamma. For
            "self-spec" the middle half, for "early-exit" the last half by default.
        adaptive: of "s3d": each row decodes plainly for a while where drafting does not pay
            (default); False always drafts.
        ngram: of "prompt-lookup": the last tokens that are looked for in the text, at most (3).
        stop: strings that end a text; they are not part of it.
        eos_token_ids: tokens that end a text; None takes the model's own, () never stops.
        seed: equal seeds, prompts and settings give equal outputs. From one number each row gets a
            key of its own; entries of a list are the rows' own seeds, whatever else is in the
            batch.
        temperature ... logit_bias: as in SamplingConfig; logit_bias is a dict from token id to
            bias. The default is greedy.
    """

    max_new_tokens: int | Sequence[int]
    method: Method
    gamma: int | None
    skip: Sequence[bool] | None
    adaptive: bool | None
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


@dataclasses.dataclass(frozen=True)
class Stats:
    """What one row cost. Times and memory are the whole batch's: its rows run together.

    Attributes:
        prompt_tokens, new_tokens: tokens in and out.
        iterations: passes of the full model behind the prefill, those that the row's tokens came
            from.
        drafted: draft tokens proposed, γ per iteration with a draft.
        accepted: draft tokens accepted and kept: not those behind an end-of-text token, a stop
            string or the row's end.
        accepted_per_position: the same for each of the γ positions; each was proposed `iterations -
            plain_iterations` times.
        prefill_seconds, decode_seconds: without compilation.
        compile_seconds: spent on programs that did not exist yet.
        cached_tokens: prompt tokens that were in the cache already, from a conversation's turn
            before; they are not prefilled.
        plain_iterations: iterations without a draft; where a method drafts, how often it fell back.
        peak_memory_bytes: the device allocator's peak where it reports one (GPU, TPU), otherwise
            the peak resident set of this process.
    """

    prompt_tokens: int
    new_tokens: int
    iterations: int
    drafted: int
    accepted: int
    accepted_per_position: tuple[int, ...]
    prefill_seconds: float
    decode_seconds: float
    compile_seconds: float
    peak_memory_bytes: int
    cached_tokens: int = 0
    plain_iterations: int = 0

    @property
    def tokens_per_iteration(self) -> float:
        """τ, mean tokens committed per iteration, the bonus token counted."""
        return self.new_tokens / self.iterations if self.iterations else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Of this row, while decoding."""
        return self.new_tokens / self.decode_seconds if self.decode_seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        derived = {
            "tokens_per_iteration": self.tokens_per_iteration,
            "tokens_per_second": self.tokens_per_second,
        }
        return dataclasses.asdict(self) | derived


@dataclasses.dataclass(frozen=True)
class Result:
    """One row's output.

    Attributes:
        tokens: the new ids, with the end-of-text token where one ended the row.
        text: their text, without special tokens and without the stop string; None without a
            tokenizer.
        finish_reason: "stop" (end-of-text token or stop string) or "length" (max_new_tokens, or the
            end of the cache).
        stopped_by: the token id or the stop string behind "stop".
        stats: what it cost.
    """

    tokens: list[int]
    text: str | None
    finish_reason: Literal["stop", "length"]
    stopped_by: int | str | None
    stats: Stats


class Batch:
    """Runs B prompts through prefill and decoding.

    Attributes:
        tokens: new ids per row so far.
        texts: the rows' texts, or None without a tokenizer.
        has_ended: whether `run` has come to its end, and was not left or interrupted before.
    """

    def __init__(
        self, lm: "LM", prompts: list[np.ndarray], kept: Kept | None = None, **options: Any
    ) -> None:
        """With what was `kept` of an earlier batch of one row, a single prompt."""
        request = checked_options(lm, len(prompts), **options)
        if isinstance(request.spec.draft, TwoModelConfig):
            kept = None  # of the draft model's cache nothing is kept
        self._lm = lm
        self._prompts = prompts
        self._spec = request.spec
        self._has_stop_strings = bool(request.stops)
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.texts = (
            None
            if lm.tokenizer is None
            else [TextRow(lm.tokenizer, prompt.tolist(), request.stops) for prompt in prompts]
        )
        self.has_ended = False
        self._stopped = [False] * len(prompts)  # by a stop string: unknown to the device

        lengths = np.array([len(prompt) for prompt in prompts])
        self._known = 0 if kept is None else kept.common(lm.config, prompts[0])
        self._ends = np.minimum(lengths + np.array(request.max_new_tokens), lm.max_length)
        pauses = _pauses(lengths, self._ends, lm.config.rope.turning_point)
        pausing = pauses < self._ends
        self._slots = cache_slots(
            [*_padded(lengths, self._known), *_padded(pauses[pausing])],
            [*request.max_new_tokens, *(self._ends - pauses)[pausing].tolist()],
            lm.max_length,
            self._spec.gamma,
        )
        cache, self._written = None, 0
        if kept is not None:
            cache = kept.cache.replace(length=jnp.full((1,), self._known, jnp.int32))
            self._slots = max(self._slots, cache.slots)
            self._written = kept.written if self._known else 0
        self._state = decode.init_state(
            self._spec, prompts, self._slots, pauses, request.sampling, cache
        )
        # Whatever drafts, the caches that a prompt goes into, and whose they are.
        self._models = {"cache": (lm.config, lm.params)}
        self._draft_params: DrafterParams = lm.draft_params
        if self._state.draft_cache is not None:
            assert lm.draft_model is not None
            self._draft_params = lm.draft_model.params
            self._models["draft_cache"] = (lm.draft_model.config, lm.draft_model.params)
        caches = (self._state.cache, self._state.draft_cache)
        self._signature = _signature((lm.params, self._draft_params, caches))
        self._prefill_seconds = self._decode_seconds = self._compile_seconds = 0.0

    def run(self, iterations_per_call: int = UNLIMITED) -> Iterator[list[list[int]]]:
        """Decodes to the end; yields the rows' new ids after every call into the compiled loop."""
        if self._has_stop_strings:
            # The device knows no texts. Iterations behind a stop string are in vain, but a few of
            # those at a row's end cost less than to look at the text after each iteration.
            iterations_per_call = min(iterations_per_call, _STEPS_PER_LOOK)
        everyone = np.ones(len(self._prompts), bool)
        yield from self._run(self._prompts, everyone, iterations_per_call, self._known)
        if (paused := self._paused()).any():  # they waited for the others: one prefill for all
            rows = zip(self._prompts, self.tokens, strict=True)
            sequences = [np.concatenate([p, new]).astype(np.int32) for p, new in rows]
            lengths = np.array([len(sequence) for sequence in sequences], np.int32)
            caches = {  # an array for each: they are donated
                name: getattr(self._state, name).replace(prompt_length=jnp.array(lengths))
                for name in self._models
            }
            self._state = self._state.replace(
                done=jnp.asarray(~paused),
                limit=jnp.asarray(self._ends, jnp.int32),
                padding=jnp.asarray(_padded(lengths) - lengths, jnp.int32),
                **caches,
            )
            yield from self._run(sequences, paused, iterations_per_call)
        for text in self.texts or ():
            text.finish()
        self.has_ended = True

    def _run(
        self,
        sequences: list[np.ndarray],
        running: np.ndarray,
        iterations_per_call: int,
        known: int = 0,
    ) -> Iterator[list[list[int]]]:
        """Prefills the running rows (bool [B]) with their sequences, and decodes to the limits.

        The first `known` tokens are in the cache already.
        """
        lengths = np.array([len(sequence) for sequence in sequences])
        padding = _padded(lengths, known) - lengths
        longest = int(lengths[running].max())
        used = decode.padded_length(longest, known) - 1
        self._prefill(sequences, decode.prefill_chunks(longest - 1 - known), known)
        finished = False
        while not finished:
            tokens, lengths, done = self._decode(used, iterations_per_call)
            yield [self._take(b, tokens[b], int(lengths[b])) for b in range(len(tokens))]
            done = done | np.array(self._stopped)
            finished = bool(done.all())
            # Never less than before: another program would cost more than it saves.
            used = max(used, int((lengths + padding)[~done].max(initial=0)))
            if any(self._stopped) and not finished:
                self._state = self._state.replace(done=jnp.asarray(done))

    def _paused(self) -> np.ndarray:
        """Rows that have come to their pause, and go on from there: bool [B]."""
        lengths = [len(p) + len(new) for p, new in zip(self._prompts, self.tokens, strict=True)]
        ended = [bool(new) and new[-1] in self._spec.stop_ids for new in self.tokens]
        return (np.array(lengths) < self._ends) & ~np.array(ended) & ~np.array(self._stopped)

    def results(self) -> list[Result]:
        """One Result per row; only when `has_ended`."""
        passes = jax.device_get(self._state.passes)
        memory = peak_memory_bytes()
        results = []
        for b, tokens in enumerate(self.tokens):
            stopped_by: int | str | None = self.texts[b].stopped_by if self.texts else None
            if stopped_by is None and tokens and tokens[-1] in self._spec.stop_ids:
                stopped_by = tokens[-1]
            gamma, prompt_tokens = self._spec.gamma, len(self._prompts[b])
            counts = decode.statistics(passes[b], prompt_tokens, len(tokens), gamma)
            stats = Stats(
                prompt_tokens=prompt_tokens,
                new_tokens=len(tokens),
                iterations=counts.iterations,
                drafted=(counts.iterations - counts.plain) * gamma,
                accepted=sum(counts.accepted),
                accepted_per_position=counts.accepted,
                prefill_seconds=self._prefill_seconds,
                decode_seconds=self._decode_seconds,
                compile_seconds=self._compile_seconds,
                peak_memory_bytes=memory,
                cached_tokens=self._known,
                plain_iterations=counts.plain,
            )
            text = self.texts[b].text if self.texts else None
            reason: Literal["stop", "length"] = "length" if stopped_by is None else "stop"
            results.append(Result(tokens, text, reason, stopped_by, stats))
        return results

    @property
    def cache_bytes(self) -> int:
        """Of the key/value caches of all rows, a second model's included."""
        caches = (self._state.cache, self._state.draft_cache)
        arrays = [x for cache in caches if cache for x in (*cache.keys, *cache.values)]
        return sum(x.nbytes for x in arrays)

    def kept(self) -> Kept | None:
        """The cache of the only row, which may have been left in the middle of its text.

        None after an interruption in the middle of a program, which has taken the cache with it.
        """
        cache, tokens = self._state.cache, self._state.tokens
        if any(x.is_deleted() for x in (*cache.keys, *cache.values, tokens)):
            return None
        length = int(cache.length[0])
        return Kept(
            np.asarray(tokens)[0, :length],
            cache,
            max(self._written, length + self._spec.gamma + 1),
        )

    def _prefill(self, sequences: list[np.ndarray], chunks: list[int], offset: int) -> None:
        for chunk in chunks:
            block = np.zeros((len(sequences), chunk), np.int32)
            for b, sequence in enumerate(sequences):
                part = sequence[offset : offset + chunk]
                block[b, : len(part)] = part
            self._written = max(self._written, offset + chunk)
            # The first chunk sees itself alone.
            visible = decode.visible_slots(offset + chunk, self._slots) if offset else chunk
            for name, (config, params) in self._models.items():
                arguments = (params, block, getattr(self._state, name), np.int32(offset))
                program = self._program(
                    decode.prefill_jit, (config, chunk, visible), config, *arguments, visible
                )
                start = time.perf_counter()
                cache = jax.block_until_ready(program(*arguments))
                self._state = self._state.replace(**{name: cache})
                self._prefill_seconds += time.perf_counter() - start
            offset += chunk

    def _decode(self, used: int, iterations: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Goes on in the program that reads `used` slots and what a step writes behind them.

        Returns:
            (tokens, lengths, done) of the rows.
        """
        visible = decode.visible_slots(used + self._spec.gamma + 1, self._slots)
        arguments = (self._lm.params, self._draft_params, self._state, np.int32(iterations))
        program = self._program(
            decode.decode_jit, (self._spec, visible), self._spec, *arguments, visible
        )
        start = time.perf_counter()
        self._state = program(*arguments)
        state = self._state
        rows = jax.device_get((state.tokens, state.cache.length, state.done))
        self._decode_seconds += time.perf_counter() - start
        return rows

    def _program(self, function: Any, key: tuple[Any, ...], *args: Any) -> Callable[..., Any]:
        """The compiled program, from the model's store or made now; its time is kept apart."""
        programs = self._lm.programs
        key = (function, *key, self._signature)
        if key not in programs:
            start = time.perf_counter()
            programs[key] = function.lower(*args).compile()
            self._compile_seconds += time.perf_counter() - start
        return programs[key]

    def _take(self, b: int, row: np.ndarray, length: int) -> list[int]:
        """Appends what the device committed to row b since the last call; returns it."""
        if self._stopped[b]:
            return []
        first = len(self._prompts[b]) + len(self.tokens[b])
        new = []
        for token in row[first : length + 1].tolist():
            new.append(token)
            if self.texts and self.texts[b].add(token):
                self._stopped[b] = True
                break
        self.tokens[b] += new
        return new


@dataclasses.dataclass(frozen=True)
class Request:
    """Checked options of one batch.

    Attributes:
        max_new_tokens: of each row.
        spec: what is static.
        sampling: what is not.
        stops: strings that end a text.
    """

    max_new_tokens: list[int]
    spec: decode.DecodeSpec
    sampling: SamplingParams
    stops: tuple[str, ...]


def checked_options(
    lm: "LM",
    rows: int,
    *,
    max_new_tokens: int | Sequence[int] = 128,
    method: Method = "s3d",
    gamma: int | None = None,
    skip: Sequence[bool] | None = None,
    adaptive: bool | None = None,
    ngram: int | None = None,
    stop: str | Sequence[str] = (),
    eos_token_ids: Sequence[int] | None = None,
    seed: int | Sequence[int] = 0,
    **sampling: Any,
) -> Request:
    """GenerateOptions with their defaults, for `rows` prompts.

    Raises:
        InputError, ConfigError: an option that is unknown or out of range.
    """
    how = drafting(lm, method, gamma=gamma, skip=skip, adaptive=adaptive, ngram=ngram)
    stops = _stop_strings(stop)
    if stops and lm.tokenizer is None:
        raise InputError("stop strings need a tokenizer, and this model has none")
    new_tokens = _per_row("max_new_tokens", max_new_tokens, rows)
    if not all(is_integer(n) and n >= 1 for n in new_tokens):
        raise InputError(f"max_new_tokens must be an integer >= 1, got {max_new_tokens!r}")
    vocab_size = lm.config.vocab_size
    params, features = batch_sampling(
        _sampling_rows(sampling, rows), _row_keys(seed, rows), vocab_size
    )
    ids = checked_ids(lm.eos_token_ids if eos_token_ids is None else eos_token_ids, vocab_size)
    spec = decode.DecodeSpec(
        config=lm.config,
        features=features,
        stop_ids=tuple(sorted(set(ids))),  # equal sets of them share a program
        **how._asdict(),
    )
    return Request([min(n, lm.max_length) for n in new_tokens], spec, params, stops)


def _stop_strings(stop: Any) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else stop
    if not is_list(stops) or not all(isinstance(s, str) and s for s in stops):
        raise InputError(f"stop must be a non-empty text or a list of such, got {stop!r}")
    return tuple(stops)


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


def _pauses(lengths: np.ndarray, ends: np.ndarray, turning_point: int | None) -> np.ndarray:
    """Tokens at which rows are prefilled anew, because all of their keys change; or their ends."""
    if turning_point is None:
        return ends
    return np.where(lengths <= turning_point, np.minimum(turning_point + 1, ends), ends)


def _padded(lengths: np.ndarray, known: int = 0) -> np.ndarray:
    """Tokens of the longest prompts that run the same prefill programs as these."""
    return np.array([decode.padded_length(n, known) for n in lengths.tolist()], int)


def cache_slots(padded: list[int], new_tokens: list[int], max_length: int, gamma: int) -> int:
    """Cache slots for these rows: of few different sizes, so that nearby lengths share programs.

    From the padded prompts, so that prompts within one bucket get equal caches; with slack for any
    usual γ, so that plain decoding and S3D do as well. Multiples of 64, of which products make no
    rest that they compute in another way (`attention_scores`).
    """
    slack = max(_USUAL_SLACK, gamma + 1)
    longest = max(*padded, max_length)
    most = max(n + new for n, new in zip(padded, new_tokens, strict=True))
    size, power_of_two = 64, True  # 64, 96, 128, 192, 256, ...
    while size < min(most, longest) + slack:
        size, power_of_two = size * 3 // 2 if power_of_two else size // 3 * 4, not power_of_two
    return -(-min(size, longest + slack) // 64) * 64


def _signature(tree: Any) -> Hashable:
    """What a compiled program depends on in its arguments."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def _per_row(name: str, value: Any, rows: int) -> list[Any]:
    value = plain(value)
    if is_list(value):
        if len(value) != rows:
            raise InputError(f"{name} has {len(value)} entries for {rows} prompts")
        return value
    return [value] * rows


def _sampling_rows(options: dict[str, Any], rows: int) -> list[SamplingConfig]:
    known = [field.name for field in dataclasses.fields(SamplingConfig)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        options_known = sorted({*GenerateOptions.__annotations__})
        raise ConfigError(f"unknown generation options {unknown}; known are {options_known}")
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
    if not is_list(plain(seed)):
        return jax.random.split(jax.random.key(seeds[0]), rows)
    return jnp.stack([jax.random.split(jax.random.key(s), 1)[0] for s in seeds])


def peak_memory_bytes() -> int:
    """Peak memory: of the device's allocator, else the process's peak resident set."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    # Linux's getrusage would include what the parent had when it started this process.
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text().splitlines()
        return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("VmHWM")), 0)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
