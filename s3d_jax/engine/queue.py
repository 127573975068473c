"""Many prompts in few rows: a row that has finished takes the next prompt."""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Unpack

import jax
import numpy as np

from s3d_jax.decoding.adaptive import Budget, new_budget
from s3d_jax.decoding.prefill import prefill
from s3d_jax.decoding.rows import put_row_jit, take_row_jit
from s3d_jax.decoding.sampling import SamplingParams
from s3d_jax.decoding.sizes import SlotPlan
from s3d_jax.decoding.state import DecodeState, init_state, restart
from s3d_jax.engine.options import GenerateOptions
from s3d_jax.engine.results import Result
from s3d_jax.engine.runner import STEPS_PER_LOOK, UNLIMITED, Engine, Runner
from s3d_jax.errors import InputError
from s3d_jax.jax_settings import under_usual_jax_settings
from s3d_jax.machine import peak_memory_bytes
from s3d_jax.mesh import on_mesh
from s3d_jax.nn.sharding import place_state
from s3d_jax.settings.records import is_integer, plain
from s3d_jax.text import TextRow


class Queue(Runner):
    """Runs N prompts in B rows.

    The loop stops where a row is done. The next prompt is prefilled alone, in a state of one row
    with as many slots, which is then written over the row that is done. So a prompt is padded to no
    other one, and one program per length bucket prefills them all.
    """

    _fewer = "run fewer rows at once (rows, --batch-size)"

    @under_usual_jax_settings
    def __init__(
        self,
        engine: Engine,
        prompts: list[np.ndarray],
        rows: int,
        **options: Unpack[GenerateOptions],
    ) -> None:
        """Checks the options and allocates the caches.

        Args:
            engine: what runs it.
            prompts: N arrays of token ids.
            rows: B; fewer where there are fewer prompts.
            **options: GenerateOptions.

        Raises:
            InputError, ConfigError: an option that is unknown or out of range.
            DeviceError: the caches need more memory than is free.
        """
        rows = plain(rows)
        if not is_integer(rows) or rows < 1:
            raise InputError(f"rows must be an integer >= 1, got {rows!r:.80}")
        super().__init__(engine, prompts, **options)
        target, gamma = engine.target, self._spec.gamma
        whole = SlotPlan.for_batch(
            [len(prompt) for prompt in prompts],
            self._ends,
            gamma,
            max_length=target.max_length,
            block=self._spec.block,
            turning_point=target.config.rope.turning_point,
        )
        self._limits = whole.limits
        rows = min(rows, len(prompts))
        # Rows of one token that may have no more are done before they begin.
        sizes = dict(gamma=gamma, slots=whole.slots, block=whole.block)
        self._plan = SlotPlan((1,) * rows, (1,) * rows, **sizes)
        with_next = SlotPlan((1,) * (rows + 1), (1,) * (rows + 1), **sizes)
        self._check_memory(with_next)
        keys = self._sampling.keys
        self._key_type = jax.random.key_impl(keys)
        settings = self._sampling.replace(keys=jax.random.key_data(keys))
        self._settings: SamplingParams = jax.device_get(settings)
        self._begin_pace(STEPS_PER_LOOK if self._stops else UNLIMITED)
        budget = None if self._pace is None else new_budget(rows, self._pace.cost)
        empty = [np.zeros(1, np.int32)] * rows
        self._state = self._begun(empty, self._plan, range(rows), budget)
        # Slots in use of each row, and `DecodeState.padding`.
        self._used, self._padding = [0] * rows, [0] * rows

    @under_usual_jax_settings
    def run(self) -> Iterator[tuple[int, Result]]:
        """Decodes to the end; yields each prompt's number and its result when it has finished."""
        iterations = STEPS_PER_LOOK if self._stops else UNLIMITED
        waiting = deque(range(len(self._prompts)))
        free = deque(range(len(self._plan.lengths)))
        prompt_of: dict[int, int] = {}
        texts: dict[int, TextRow | None] = {}
        while waiting or prompt_of:
            while free and waiting:
                row, i = free.popleft(), waiting.popleft()
                prompt_of[row], texts[row] = i, self._text_of(i)
                plan = self._single(self._prompts[i], self._limits[i])
                new = self._begun([self._prompts[i]], plan, [i], self._budget(i))
                self._put(row, new, self._prompts[i], plan)
            used = max(self._used[row] for row in prompt_of)
            tokens, lengths, done, broken = self._paced_decode(used, iterations, len(free) + 1)
            finished = []
            for row, i in prompt_of.items():
                self._used[row] = int(lengths[row]) + self._padding[row]
                self._broken[i] = bool(broken[row])
                self._take(i, texts[row], tokens[row], int(lengths[row]))
                if done[row] or self._stopped[i]:
                    finished.append(row)
            if not finished:
                continue
            if any(not done[row] for row in finished):  # by stop strings
                at_end = done.copy()
                at_end[finished] = True
                at_end = place_state(self._mesh, jax.device_put(at_end))
                self._state = self._state.replace(done=at_end)
            # A copy, since the state is donated while rows are put into it.
            passes, memory = np.array(self._state.passes), peak_memory_bytes()
            for row in finished:
                i = prompt_of[row]
                if self._is_unfinished(i):  # at LongRoPE's turning point
                    sequence = self._sequence(i)
                    plan = self._single(sequence, self._ends[i])
                    self._put(row, self._row(row, plan), sequence, plan)
                    continue
                del prompt_of[row]
                free.append(row)
                if (text := texts.pop(row)) is not None:
                    text.finish()
                self._remember(self._counts(i, passes[row]))
                yield i, self._result(i, text, passes[row], memory)

    def _single(self, sequence: np.ndarray, limit: int) -> SlotPlan:
        """The plan of one row in the slots of all."""
        whole = self._plan
        return SlotPlan((len(sequence),), (limit,), whole.gamma, whole.slots, block=whole.block)

    def _budget(self, i: int) -> Budget | None:
        """The budget with which prompt i begins, in step with the rows that run."""
        if self._pace is None or self._state.budget is None:
            return None
        budget = self._pace.budget([self._request.max_new_tokens[i]])
        # The rows' attempts fall into the same iterations, so their clocks must be the same.
        first = np.max(np.asarray(self._state.budget.iterations)) + np.asarray(budget.iterations)
        return budget.replace(iterations=jax.device_put(first.astype(np.int32)))

    def _begun(
        self,
        sequences: list[np.ndarray],
        plan: SlotPlan,
        prompts: Sequence[int],
        budget: Budget | None,
    ) -> DecodeState:
        """The state of new rows before prefill, with the settings of the given prompts."""
        settings = jax.device_put(jax.tree.map(lambda x: x[list(prompts)], self._settings))
        keys = jax.random.wrap_key_data(settings.keys, impl=self._key_type)
        sampling = settings.replace(keys=keys)
        stop_ids = sorted(self._stop_ids)
        with self._explained(), on_mesh(self._mesh):
            state = init_state(
                self._spec, sequences, plan, sampling, stop_ids=stop_ids, budget=budget
            )
            return place_state(self._mesh, state.replace(**self._paced(state)))

    def _row(self, row: int, plan: SlotPlan) -> DecodeState:
        """A row as it is, to be prefilled again."""
        arrays = dict(state=self._state.replace(drafter_state=None), row=np.int32(row))
        program = self._program(take_row_jit, {}, arrays, {})
        with self._explained(program), on_mesh(self._mesh):
            return place_state(self._mesh, restart(self._spec, program(**arrays), plan, [True]))

    def _put(self, row: int, new: DecodeState, sequence: np.ndarray, plan: SlotPlan) -> None:
        """Prefills the only row of `new`, and puts it into a row of the state."""
        new = prefill(
            self._spec,
            self._target.params,
            self._drafter_params,
            new,
            [sequence],
            plan,
            call=self._prefill_call,
        )
        if len(self._padding) == 1:
            self._state = new
        else:
            arrays = dict(state=self._state, row=np.int32(row), new=new)
            program = self._program(put_row_jit, {}, arrays, {})
            with self._explained(program):
                self._state = program(**arrays)
        self._padding[row] = plan.padded[0] - len(sequence)
        self._used[row] = plan.padded[0] - 1
