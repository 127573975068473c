"""What every way of running prompts shares: options, programs, and the outcome of each prompt."""

import dataclasses
import time
import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal, NoReturn, Unpack

import jax
import numpy as np

from s3d_jax.decoding.sizes import SlotPlan
from s3d_jax.decoding.state import DecodeState
from s3d_jax.decoding.step import Counts, decode_jit, statistics
from s3d_jax.drafters.base import Target
from s3d_jax.engine.costs import BY_BUDGETS, MOST_PER_CALL, Experiences, Pace
from s3d_jax.engine.ledger import BYTES_PER_SLOT, Ledger, what_fits
from s3d_jax.engine.options import GenerateOptions, check_options
from s3d_jax.engine.programs import Program, Programs, signature
from s3d_jax.engine.prompts import PromptEncoder
from s3d_jax.engine.results import Result, Stats
from s3d_jax.errors import InputError
from s3d_jax.machine import check_memory, memory_limit_bytes, out_of_memory_explained
from s3d_jax.mesh import mesh_of
from s3d_jax.nn.sharding import bytes_here, cache_share, place_state, taken_here
from s3d_jax.storage.tokenizer import special_tokens
from s3d_jax.text import TextRow

UNLIMITED = int(np.iinfo(np.int32).max)
# Stop strings are checked on the host every 8 iterations; the overshoot costs less than a sync per
# step.
STEPS_PER_LOOK = 8
_BYTES_PER_WORD = 5  # of `DecodeState.prompt_tokens` and `output_counts`


@dataclasses.dataclass(frozen=True)
class Engine:
    """What runs prompts: a model, its tokenizer if it has one, and what earlier runs left.

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


class Runner:
    """Calls the compiled programs of one request, and collects what becomes of its prompts.

    A subclass makes the plan and the state, and decides which prompt is in which row.

    Attributes:
        tokens: new ids per prompt so far.
    """

    _plan: SlotPlan
    _state: DecodeState
    _fewer: str  # how fewer rows run at once, in words

    def __init__(
        self, engine: Engine, prompts: list[np.ndarray], **options: Unpack[GenerateOptions]
    ) -> None:
        """Checks the options.

        Args:
            engine: what runs it.
            prompts: N arrays of token ids.
            **options: GenerateOptions.

        Raises:
            InputError, ConfigError: an option that is unknown or out of range.
        """
        target = engine.target
        request = check_options(target, len(prompts), **options)
        if request.stops and engine.tokenizer is None:
            raise InputError("stop strings need a tokenizer, and this model has none")
        self._target, self._programs = target, engine.programs
        self._mesh = mesh_of(target.params)
        self._spec, self._drafter = request.spec, request.drafter
        self._without_draft = False  # whether the loop is that of AR
        self._drafter_params, self._stop_ids = request.drafter_params, request.stop_ids
        self._request, self._sampling = request, request.sampling
        self._experiences = engine.experiences
        self._pace: Pace | None = None
        self._kind = BY_BUDGETS
        self._prompts = prompts
        self._tokenizer, self._stops = engine.tokenizer, request.stops
        self._special = special_tokens(engine.tokenizer) if request.stops else {}
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self._broken = [False] * len(prompts)  # DecodeState.broken
        self._stopped = [False] * len(prompts)  # by a stop string: unknown to the device
        ends = (len(p) + new for p, new in zip(prompts, request.max_new_tokens, strict=True))
        self._ends = [min(end, target.max_length) for end in ends]
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

    def _text_of(self, i: int) -> TextRow | None:
        """The text that prompt i gets, still empty; None without a tokenizer."""
        if self._tokenizer is None:
            return None
        return TextRow(self._tokenizer, self._prompts[i].tolist(), self._stops, self._special)

    def _sequence(self, i: int) -> np.ndarray:
        """Prompt i and its new tokens, int32."""
        return np.concatenate([self._prompts[i], self.tokens[i]]).astype(np.int32)

    def _is_unfinished(self, i: int) -> bool:
        """Whether prompt i, whose row is done, stopped at a limit of the plan before its end."""
        new = self.tokens[i]
        ended = self._stopped[i] or self._broken[i] or (new and new[-1] in self._stop_ids)
        return not ended and len(self._prompts[i]) + len(new) < self._ends[i]

    def _take(self, i: int, text: TextRow | None, row: np.ndarray, length: int) -> list[int]:
        """Appends what the device committed for prompt i since the last call; returns it."""
        if self._stopped[i]:
            return []
        first = len(self._prompts[i]) + len(self.tokens[i])
        new = []
        for token in row[first : length + 1].tolist():
            new.append(token)
            if text is not None and text.add(token):
                self._stopped[i] = True
                break
        self.tokens[i] += new
        return new

    def _result(
        self, i: int, text: TextRow | None, passes: np.ndarray, memory: int, known: int = 0
    ) -> Result:
        """The outcome of prompt i.

        Args:
            i: number of the prompt.
            text: its text, complete.
            passes: int32 [S], its row of `DecodeState.passes`.
            memory: peak memory in bytes.
            known: tokens of the prompt that were not prefilled.
        """
        tokens = self.tokens[i]
        stopped_by: int | str | None = None if text is None else text.stopped_by
        if stopped_by is None and tokens and tokens[-1] in self._stop_ids:
            stopped_by = tokens[-1]
        counts = self._counts(i, passes)
        stats = Stats(
            prompt_tokens=len(self._prompts[i]),
            new_tokens=len(tokens),
            iterations=counts.iterations,
            drafted=(counts.iterations - counts.plain) * self._spec.gamma,
            accepted=sum(counts.accepted) + counts.copied,
            accepted_per_position=counts.accepted,
            prefill_seconds=self._prefill_seconds,
            decode_seconds=self._decode_seconds,
            compile_seconds=self._compile_seconds,
            peak_memory_bytes=memory,
            cached_tokens=known,
            plain_iterations=counts.plain,
            copying_iterations=counts.copying,
            iteration_cost=None if self._pace is None else self._pace.cost,
        )
        reason: Literal["stop", "length", "error"] = "length" if stopped_by is None else "stop"
        error = None
        if self._broken[i] and stopped_by is None:
            reason, error = "error", self._no_numbers(i)
        return Result(tokens, None if text is None else text.text, reason, stopped_by, stats, error)

    def _counts(self, i: int, passes: np.ndarray) -> Counts:
        """What prompt i cost, by its row of `DecodeState.passes`."""
        if self._without_draft:
            passes = -passes  # the loop of AR knows of no draft that it left out
        return statistics(passes, len(self._prompts[i]), len(self.tokens[i]), self._spec.gamma)

    def _decode_plainly(self) -> None:
        """Runs the loop of AR in place of the drafter's.

        The plain iterations of a loop that can draft take up to a sixth longer in a small model.
        """
        self._without_draft = True
        self._state = self._state.replace(copying=None)
        self._drafter_params = None
        self._signatures["drafter_params"] = signature(None)

    def _begin_pace(self, iterations_per_call: int) -> None:
        """Decides how prompts begin, where rows decide by costs whether to draft."""
        costs, spec = self._request.costs, self._spec
        if costs is not None:
            settings = (
                spec.drafter,
                spec.features,
                spec.copies,
                len(self._plan.lengths),
                self._plan.visible_to_step(max(self._plan.lengths)),
                min(iterations_per_call, MOST_PER_CALL),  # short calls cost more on the host
                id(self._target.params),
                id(self._drafter_params),
            )
            known, gain = self._experiences.of(settings), self._request.gain
            if jax.process_count() > 1:  # hosts measure other times, and must decide alike
                gain = 1.0
            self._pace = Pace(costs, spec.gamma, spec.copies, gain, known)

    def _remember(self, counts: Counts) -> None:
        """Takes what drafting has gained for a prompt."""
        if self._pace is not None:
            self._pace.gained(sum(counts.accepted) + counts.drafting, counts.drafting)

    def _no_numbers(self, i: int) -> str:
        """What is wrong with prompt i, whose next token has no distribution, and what to do."""
        dtype = self._target.config.dtype
        what = (
            f"the logits of prompt {i} are no numbers (NaN or infinity) after "
            f"{len(self.tokens[i])} new tokens, computed in {dtype}"
        )
        if dtype == "float16":
            return (
                f"{what}, which ends at 65504: load the model with dtype='bfloat16' or 'float32' "
                "(--dtype)"
            )
        return f"{what}: the weights are damaged or hold NaN; convert or train the model again"

    def _check_memory(self, plan: SlotPlan) -> None:
        """Refuses a plan whose caches cannot fit; the weights are in memory already."""
        rows = len(plan.lengths)
        needed = self._cache_bytes(plan)
        if self._mesh is not None:
            needed = taken_here(self._mesh, needed)
        check_memory(
            needed,
            f"{rows} row{'s' * (rows > 1)} of {plan.slots:,} tokens need{'s' * (rows == 1)}",
            self._less,
        )

    def _cache_bytes(self, plan: SlotPlan) -> int:
        """Bytes that the rows of a plan take on a device."""
        rows = len(plan.lengths)
        needed = plan.cache_bytes(self._target.config)
        if self._drafter is not None:
            needed += self._drafter.state_bytes(plan)
        if self._mesh is not None:
            needed = cache_share(self._mesh, self._target.config, rows, needed)
        needed += rows * plan.slots * BYTES_PER_SLOT
        if self._spec.features.penalized:
            needed += rows * self._target.config.vocab_size * _BYTES_PER_WORD
        return needed

    @property
    def _less(self) -> str:
        """How a request takes less memory, in words."""
        rounded = ", or load the model with kv_cache='int8' (--kv-cache int8)"
        return (
            "lower max_new_tokens (--max-new-tokens) or max_length (--max-length), shorten the "
            f"prompts, or {self._fewer}{rounded if self._target.config.kv_cache is None else ''}"
        )

    def _explained(self, program: Program | None = None) -> AbstractContextManager[None]:
        """A context in which the device's lack of memory is told with what would fit.

        Args:
            program: the one that is run in it.
        """

        def words() -> str:
            target, plan = self._target, self._plan
            weights = {id(x): x for x in jax.tree.leaves(target.params)}
            own = {id(x): x for x in jax.tree.leaves(self._drafter_params)} | weights
            ledger = Ledger(
                target.config.precision,
                bytes_here(list(weights.values())),
                bytes_here([x for key, x in own.items() if key not in weights]),
                self._cache_bytes(plan),
                0 if program is None else program.scratch_bytes,
            )
            rows, limit = len(plan.lengths), memory_limit_bytes()
            return f"{what_fits(ledger, target.config, rows, plan.slots, limit)}: {self._less}"

        return out_of_memory_explained(words)

    def _prefill_call(
        self, function: Any, static: Mapping[str, Any], arrays: Mapping[str, Any]
    ) -> Any:
        known = {name: x for name, x in self._signatures.items() if name in arrays}
        new = {name: x for name, x in arrays.items() if isinstance(x, np.ndarray | np.generic)}
        arrays = {**arrays, **place_state(self._mesh, new)}
        program = self._program(function, static, arrays, known)
        start = time.perf_counter()
        with self._explained(program):
            result = jax.block_until_ready(program(**arrays))
        self._prefill_seconds += time.perf_counter() - start
        return result

    def _decode(self, used: int, iterations: int, enough: int) -> tuple[np.ndarray, ...]:
        """Continues in the program that reads `used` slots and what a step writes after them.

        Args:
            used: slots in use.
            iterations: at most.
            enough: rows that are done where it stops.

        Returns:
            (tokens, lengths, done, broken) of the rows.
        """
        visible = self._plan.visible_to_step(used)
        arrays = dict(
            params=self._target.params,
            drafter_params=self._drafter_params,
            state=self._state,
            max_iterations=np.int32(iterations),
            enough=np.int32(enough),
        )
        if (loop := self._loops.get(visible)) is None:
            without = dataclasses.replace(self._spec, drafter=None, copies=False)
            static = dict(spec=without if self._without_draft else self._spec, visible=visible)
            loop = self._program(decode_jit, static, arrays, self._signatures)
            self._loops[visible] = loop
        start = time.perf_counter()
        with self._explained(loop):
            state = self._state = loop(**arrays)
            rows = jax.device_get((state.tokens, state.cache.length, state.done, state.broken))
        self._decode_seconds += time.perf_counter() - start
        return rows

    def _paced_decode(self, used: int, iterations: int, enough: int) -> tuple[np.ndarray, ...]:
        """As `_decode`; drafts as the pace wants, and tells it the time."""
        pace, budget = self._pace, self._state.budget
        if pace is None or budget is None:
            return self._decode(used, iterations, enough)
        call = pace.next_call()
        if call.most is None and call.kind == self._kind:
            return self._decode(used, iterations, enough)
        before, self._kind = np.array(budget.iterations), call.kind
        self._state = self._state.replace(**self._paced(self._state))
        if call.most is not None:
            iterations = min(iterations, call.most)
        seconds = self._decode_seconds
        found = self._decode(used, iterations, enough)
        assert self._state.budget is not None
        done = int(np.max(np.asarray(self._state.budget.iterations) - before))
        pace.took(done, self._decode_seconds - seconds, self._plan.visible_to_step(used))
        return found

    def _paced(self, state: DecodeState) -> dict[str, Any]:
        """The budgets of a state, with the costs known now, for the kind of iteration now."""
        pace = self._pace
        found: dict[str, tuple[Any, int, float]] = {}
        if pace is not None and state.budget is not None:
            found["budget"] = (state.budget, self._kind.drafting, pace.cost)
            if state.copying is not None:
                found["copying"] = (state.copying, self._kind.copying, pace.copy_cost)
        paced = {}
        for name, (budget, mode, cost) in found.items():
            rows = budget.mode.size
            arrays = dict(mode=np.full(rows, mode, np.int32), cost=np.full(rows, cost, np.float32))
            paced[name] = place_state(self._mesh, budget.replace(**jax.device_put(arrays)))
        return paced

    def _program(
        self,
        function: Any,
        static: Mapping[str, Any],
        arrays: Mapping[str, Any],
        known: Mapping[str, Any],
    ) -> Program:
        with self._explained():  # XLA refuses some programs when they are compiled
            program, seconds = self._programs.get(function, static, arrays, known)
        self._compile_seconds += seconds
        return program
