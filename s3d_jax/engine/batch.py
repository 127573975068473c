"""One running batch: prefills its prompts, decodes to the end, collects texts and statistics."""

import dataclasses
import time
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NoReturn, Unpack

import jax
import numpy as np

from s3d_jax.decoding.adaptive import BY_BUDGET
from s3d_jax.decoding.prefill import prefill
from s3d_jax.decoding.sizes import SlotPlan
from s3d_jax.decoding.state import init_state, restart
from s3d_jax.decoding.step import Counts, decode_jit, statistics
from s3d_jax.drafters.base import Target
from s3d_jax.engine.costs import MOST_PER_CALL, Experiences, Pace
from s3d_jax.engine.options import GenerateOptions, check_options
from s3d_jax.engine.programs import Program, Programs, signature
from s3d_jax.engine.prompts import PromptEncoder
from s3d_jax.engine.results import Result, Stats
from s3d_jax.errors import InputError
from s3d_jax.jax_settings import under_usual_jax_settings
from s3d_jax.machine import check_memory, peak_memory_bytes
from s3d_jax.nn.cache import Kept
from s3d_jax.storage.tokenizer import special_tokens
from s3d_jax.text import TextRow

UNLIMITED = int(np.iinfo(np.int32).max)
# Stop strings are checked on the host every 8 iterations; the overshoot costs less than a sync per
# step.
_STEPS_PER_LOOK = 8
_BYTES_PER_SLOT = 8  # of `DecodeState.tokens` and `passes`
_BYTES_PER_WORD = 5  # of `DecodeState.prompt_tokens` and `output_counts`


@dataclasses.dataclass(frozen=True)
class Engine:
    """What runs batches: a model, its tokenizer if it has one, and what earlier batches left.

    Attributes:
        target, tokenizer: the model, and its tokenizer or None.
        programs: compiled ones.
        experiences: what drafting costs and gains.
    """

    target: Target
    tokenizer: Any
    programs: Programs
    experiences: Experiences

    @property
    def encoder(self) -> PromptEncoder:
        """Turns prompts and chats into token ids."""
        return PromptEncoder(self.target, self.tokenizer)


class Batch:
    """Runs B prompts through prefill and decoding.

    Attributes:
        tokens: new ids per row so far.
        texts: the rows' texts, or None without a tokenizer.
        has_ended: whether `run` has come to its end, and was not left or interrupted before.
    """

    @under_usual_jax_settings
    def __init__(
        self,
        engine: Engine,
        prompts: list[np.ndarray],
        kept: Kept | None = None,
        *,
        to_keep: bool = False,
        **options: Unpack[GenerateOptions],
    ) -> None:
        """Checks the options and allocates the caches.

        Args:
            engine: what runs it.
            prompts: B arrays of token ids.
            kept: the cache of an earlier batch of one row, for a single prompt.
            to_keep: whether this batch's cache will be kept, for a longer prompt.
            **options: GenerateOptions.

        Raises:
            InputError, ConfigError: an option that is unknown or out of range.
            DeviceError: the caches need more memory than is free.
        """
        target, tokenizer = engine.target, engine.tokenizer
        request = check_options(target, len(prompts), **options)
        if request.stops and tokenizer is None:
            raise InputError("stop strings need a tokenizer, and this model has none")
        self._target, self._programs = target, engine.programs
        self._spec, self._drafter = request.spec, request.drafter
        self._drafter_params, self._stop_ids = request.drafter_params, request.stop_ids
        self._prompts = prompts
        self._has_stop_strings = bool(request.stops)
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.texts = None
        if tokenizer is not None:
            special = special_tokens(tokenizer) if request.stops else {}
            self.texts = [TextRow(tokenizer, p.tolist(), request.stops, special) for p in prompts]
        self.has_ended = False
        self._broken = [False] * len(prompts)  # DecodeState.broken
        self._stopped = [False] * len(prompts)  # by a stop string: unknown to the device

        if self._drafter is not None and self._drafter.keeps_state:
            kept = None  # nothing is kept of the drafter's own state, so both are prefilled
        if kept is not None and kept.cache.is_deleted:
            kept = None  # another batch has taken it
        known = 0 if kept is None else kept.common(target.config, prompts[0])
        lengths = [len(prompt) for prompt in prompts]
        ends = (n + new for n, new in zip(lengths, request.max_new_tokens, strict=True))
        self._ends = [min(end, target.max_length) for end in ends]
        self._plan = SlotPlan.for_batch(
            lengths,
            self._ends,
            self._spec.gamma,
            max_length=target.max_length,
            turning_point=target.config.rope.turning_point,
            known=known,
            least=0 if kept is None else kept.cache.slots,
            grows=to_keep,
        )
        self._check_memory(kept)
        cache, self._written = None, 0
        if kept is not None:
            cache = kept.cache.replace(length=jax.device_put(np.full(1, known, np.int32)))
            self._written = kept.written if known else 0
        self._known = known
        self._request, self._experiences = request, engine.experiences
        self._pace: Pace | None = None
        self._mode = BY_BUDGET
        self._state = init_state(
            self._spec,
            prompts,
            self._plan,
            request.sampling,
            cache,
            sorted(self._stop_ids),
        )
        # A lookup takes as long as an AR step of a small model. So the parameters' signatures are
        # computed once, and the compiled loops are found by the number of slots that they read.
        self._signatures = {
            "params": signature(target.params),
            "drafter_params": signature(self._drafter_params),
        }
        self._loops: weakref.WeakValueDictionary[int, Program] = weakref.WeakValueDictionary()
        self._prefill_seconds = self._decode_seconds = self._compile_seconds = 0.0

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a batch cannot be copied or pickled, since each step takes the arrays of the last: "
            "take its results when it has ended"
        )

    @under_usual_jax_settings
    def run(self, iterations_per_call: int = UNLIMITED) -> Iterator[list[list[int]]]:
        """Decodes to the end; yields the rows' new ids after every call into the compiled loop."""
        if self._has_stop_strings:
            iterations_per_call = min(iterations_per_call, _STEPS_PER_LOOK)
        self._begin_pace(iterations_per_call)
        running = [True] * len(self._prompts)
        while any(running):
            yield from self._run(running, iterations_per_call)
            running = self._unfinished()
            if any(running):  # forget the caches' content, and prefill again
                lengths = [len(sequence) for sequence in self._sequences()]
                self._plan = self._plan.again(lengths, self._ends)
                self._state = restart(self._spec, self._state, self._plan, running)
        for text in self.texts or ():
            text.finish()
        self._end_pace()
        self.has_ended = True

    def _run(self, running: list[bool], iterations_per_call: int) -> Iterator[list[list[int]]]:
        """Prefills the rows, and decodes the running ones to their limits."""
        plan, padding = self._plan, np.array(self._plan.padded) - np.array(self._plan.lengths)
        self._state = prefill(
            self._spec,
            self._target.params,
            self._drafter_params,
            self._state,
            self._sequences(),
            plan,
            running=running,
            call=self._prefill_call,
        )
        self._written = max(self._written, plan.known + sum(plan.chunks(running)))
        self._loops.clear()  # the state's arrays are new
        used = max(n for n, runs in zip(plan.padded, running, strict=True) if runs) - 1
        finished = False
        while not finished:
            tokens, lengths, done, broken = self._paced_decode(used, iterations_per_call)
            self._broken = broken.tolist()
            yield [self._take(b, tokens[b], int(lengths[b])) for b in range(len(tokens))]
            done = done | np.array(self._stopped)
            finished = bool(done.all())
            # Never less than before: another program would cost more than it saves.
            used = max(used, int((lengths + padding)[~done].max(initial=0)))
            if any(self._stopped) and not finished:
                self._state = self._state.replace(done=jax.device_put(done))

    def _begin_pace(self, iterations_per_call: int) -> None:
        """Decides how the rows begin, where they decide by costs whether to draft."""
        costs, spec = self._request.costs, self._spec
        if costs is None:
            return
        # Short calls cost more on the host, so they are other settings.
        size = min(iterations_per_call, MOST_PER_CALL)
        settings = spec.drafter, spec.features, len(self._prompts), size
        known = self._experiences.of(settings)
        self._pace = Pace(costs.iteration(spec.gamma), self._request.gain, known)
        self._state = self._state.replace(budget=self._pace.budget(self._request.max_new_tokens))

    def _paced_decode(self, used: int, iterations_per_call: int) -> tuple[np.ndarray, ...]:
        """As `_decode`; drafts as the pace wants, and tells it the time."""
        pace, budget = self._pace, self._state.budget
        if pace is None or budget is None:
            return self._decode(used, iterations_per_call)
        call = pace.next_call()
        if call.most is None and call.mode == self._mode:
            return self._decode(used, iterations_per_call)
        rows = len(self._prompts)
        before, self._mode = int(np.max(budget.iterations)), call.mode
        mode, cost = np.full(rows, call.mode, np.int32), np.full(rows, pace.cost, np.float32)
        mode, cost = jax.device_put((mode, cost))
        self._state = self._state.replace(budget=budget.replace(mode=mode, cost=cost))
        if call.most is not None:
            iterations_per_call = min(iterations_per_call, call.most)
        seconds = self._decode_seconds
        found = self._decode(used, iterations_per_call)
        assert self._state.budget is not None
        iterations = int(np.max(self._state.budget.iterations)) - before
        pace.took(iterations, self._decode_seconds - seconds)
        return found

    def _end_pace(self) -> None:
        """Remembers what drafting has gained."""
        if self._pace is not None:
            passes = jax.device_get(self._state.passes)
            rows = [self._counts(b, passes[b]) for b in range(len(passes))]
            drafting = sum(row.iterations - row.plain for row in rows)
            self._pace.ended(sum(sum(row.accepted) for row in rows) + drafting, drafting)

    def _counts(self, b: int, passes: np.ndarray) -> Counts:
        """What row b cost."""
        return statistics(passes, len(self._prompts[b]), len(self.tokens[b]), self._spec.gamma)

    def _unfinished(self) -> list[bool]:
        """Rows that stopped at a limit of the plan before their end."""
        ended = (a or b for a, b in zip(self._stopped, self._broken, strict=True))
        rows = zip(self._sequences(), self._ends, self.tokens, ended, strict=True)
        return [
            len(sequence) < end and not over and not (new and new[-1] in self._stop_ids)
            for sequence, end, new, over in rows
        ]

    def _sequences(self) -> list[np.ndarray]:
        """The rows' prompts and new tokens, int32."""
        rows = zip(self._prompts, self.tokens, strict=True)
        return [np.concatenate([prompt, new]).astype(np.int32) for prompt, new in rows]

    @under_usual_jax_settings
    def results(self) -> list[Result]:
        """One Result per row; only when `has_ended`."""
        passes = jax.device_get(self._state.passes)
        memory = peak_memory_bytes()
        results = []
        for b, tokens in enumerate(self.tokens):
            stopped_by: int | str | None = self.texts[b].stopped_by if self.texts else None
            if stopped_by is None and tokens and tokens[-1] in self._stop_ids:
                stopped_by = tokens[-1]
            counts = self._counts(b, passes[b])
            stats = Stats(
                prompt_tokens=len(self._prompts[b]),
                new_tokens=len(tokens),
                iterations=counts.iterations,
                drafted=(counts.iterations - counts.plain) * self._spec.gamma,
                accepted=sum(counts.accepted),
                accepted_per_position=counts.accepted,
                prefill_seconds=self._prefill_seconds,
                decode_seconds=self._decode_seconds,
                compile_seconds=self._compile_seconds,
                peak_memory_bytes=memory,
                cached_tokens=self._known,
                plain_iterations=counts.plain,
                iteration_cost=None if self._pace is None else self._pace.cost,
            )
            text = self.texts[b].text if self.texts else None
            reason: Literal["stop", "length", "error"] = "length" if stopped_by is None else "stop"
            error = None
            if self._broken[b] and stopped_by is None:
                reason, error = "error", self._no_numbers(b)
            results.append(Result(tokens, text, reason, stopped_by, stats, error))
        return results

    def _no_numbers(self, b: int) -> str:
        """What is wrong with row b, whose next token has no distribution, and what to do."""
        dtype = self._target.config.dtype
        what = (
            f"the logits of prompt {b} are no numbers (NaN or infinity) after "
            f"{len(self.tokens[b])} new tokens, computed in {dtype}"
        )
        if dtype == "float16":
            return (
                f"{what}, which ends at 65504: load the model with dtype='bfloat16' or 'float32' "
                "(--dtype)"
            )
        return f"{what}: the weights are damaged or hold NaN; convert or train the model again"

    def _check_memory(self, kept: Kept | None) -> None:
        """Refuses a batch whose caches cannot fit; the weights are in memory already."""
        plan, rows = self._plan, len(self._prompts)
        if kept is not None and kept.cache.slots >= plan.slots:
            return
        needed = plan.cache_bytes(self._target.config) + rows * plan.slots * _BYTES_PER_SLOT
        if self._drafter is not None:
            needed += self._drafter.state_bytes(plan)
        if self._spec.features.penalized:
            needed += rows * self._target.config.vocab_size * _BYTES_PER_WORD
        check_memory(
            needed,
            f"{rows} row{'s' * (rows > 1)} of {plan.slots:,} tokens need{'s' * (rows == 1)}",
            "lower max_new_tokens (--max-new-tokens) or max_length (--max-length), shorten the "
            "prompts, or generate fewer at once",
        )

    @property
    def nbytes(self) -> int:
        """Bytes of weights, caches and what the drafter needs; computed, without activations."""
        target, drafter = self._target, self._drafter
        weights = {id(x): x.nbytes for x in jax.tree.leaves(target.params)}
        more = 0 if drafter is None else drafter.nbytes(target, self._plan)
        return sum(weights.values()) + self._plan.cache_bytes(target.config) + more

    @under_usual_jax_settings
    def kept(self) -> Kept | None:
        """The cache of the only row, which may have been left in the middle of its text.

        None after an interruption in the middle of a program, which has taken the cache with it,
        and after an error, since the cache may hold NaN.
        """
        if any(self._broken):
            return None
        cache, tokens = self._state.cache, self._state.tokens
        if cache.is_deleted or tokens.is_deleted():
            return None
        length = int(cache.length[0])
        written = max(self._written, length + self._spec.gamma + 1)
        return Kept(np.asarray(tokens)[0, :length], cache, written)

    def _prefill_call(
        self, function: Any, static: Mapping[str, Any], arrays: Mapping[str, Any]
    ) -> Any:
        params = arrays["params"]
        of_target = params is self._target.params
        known = {"params": self._signatures["params" if of_target else "drafter_params"]}
        program = self._program(function, static, arrays, known)
        start = time.perf_counter()
        result = jax.block_until_ready(program(**arrays))
        self._prefill_seconds += time.perf_counter() - start
        return result

    def _decode(self, used: int, iterations: int) -> tuple[np.ndarray, ...]:
        """Continues in the program that reads `used` slots and what a step writes after them.

        Returns:
            (tokens, lengths, done, broken) of the rows.
        """
        visible = self._plan.visible_to_step(used)
        arrays = dict(
            params=self._target.params,
            drafter_params=self._drafter_params,
            state=self._state,
            max_iterations=np.int32(iterations),
        )
        if (loop := self._loops.get(visible)) is None:
            static = dict(spec=self._spec, visible=visible)
            loop = self._program(decode_jit, static, arrays, self._signatures)
            self._loops[visible] = loop
        start = time.perf_counter()
        state = self._state = loop(**arrays)
        rows = jax.device_get((state.tokens, state.cache.length, state.done, state.broken))
        self._decode_seconds += time.perf_counter() - start
        return rows

    def _program(
        self,
        function: Any,
        static: Mapping[str, Any],
        arrays: Mapping[str, Any],
        known: Mapping[str, Any],
    ) -> Program:
        program, seconds = self._programs.get(function, static, arrays, known)
        self._compile_seconds += seconds
        return program

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
