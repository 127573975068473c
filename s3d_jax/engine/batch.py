"""One running batch: prefills its prompts, decodes to the end, collects texts and statistics."""

from collections.abc import Iterator
from typing import Unpack

import jax
import numpy as np

from s3d_jax.decoding.prefill import prefill
from s3d_jax.decoding.sizes import SlotPlan
from s3d_jax.decoding.state import init_state, restart
from s3d_jax.engine.options import GenerateOptions
from s3d_jax.engine.results import Result
from s3d_jax.engine.runner import STEPS_PER_LOOK, UNLIMITED, Engine, Runner
from s3d_jax.jax_settings import under_usual_jax_settings
from s3d_jax.machine import peak_memory_bytes
from s3d_jax.mesh import on_mesh
from s3d_jax.nn.cache import Kept
from s3d_jax.nn.sharding import place_state
from s3d_jax.text import TextRow
from s3d_jax.weights.base import num_bytes


class Batch(Runner):
    """Runs B prompts through prefill and decoding, each in a row of its own.

    Attributes:
        tokens: new ids per row so far.
        has_ended: whether `run` has come to its end, and was not left or interrupted before.
    """

    _fewer = "generate fewer at once"

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
        super().__init__(engine, prompts, **options)
        target = engine.target
        self._texts = [self._text_of(i) for i in range(len(prompts))]
        self.has_ended = False

        if self._drafter is not None and self._drafter.reads_prompts:
            kept = None  # nothing is kept of the drafter's own state, so both are prefilled
        if kept is not None and kept.cache.is_deleted:
            kept = None  # another batch has taken it
        if kept is not None and kept.cache.kind != target.config.kv_cache:
            kept = None  # the model's config was changed since
        known = 0 if kept is None else kept.common(target.config, prompts[0])
        self._plan = SlotPlan.for_batch(
            [len(prompt) for prompt in prompts],
            self._ends,
            self._spec.gamma,
            max_length=target.max_length,
            block=self._spec.block,
            turning_point=target.config.rope.turning_point,
            known=known,
            least=0 if kept is None else kept.cache.slots,
            grows=to_keep,
        )
        if kept is None or kept.cache.slots < self._plan.slots:
            self._check_memory(self._plan)
        cache, self._written = None, 0
        if kept is not None:
            cache = kept.cache.replace(length=jax.device_put(np.full(1, known, np.int32)))
            self._written = kept.written if known else 0
        self._known = known
        stop_ids = sorted(self._stop_ids)
        with self._explained(), on_mesh(self._mesh):
            state = init_state(self._spec, prompts, self._plan, self._sampling, cache, stop_ids)
            self._state = place_state(self._mesh, state)

    @property
    def texts(self) -> list[TextRow] | None:
        """The rows' texts, or None without a tokenizer."""
        return [text for text in self._texts if text is not None] or None

    @under_usual_jax_settings
    def run(self, iterations_per_call: int = UNLIMITED) -> Iterator[list[list[int]]]:
        """Decodes to the end; yields the rows' new ids after every call into the compiled loop."""
        if self._stops:
            iterations_per_call = min(iterations_per_call, STEPS_PER_LOOK)
        self._begin_pace(iterations_per_call)
        if self._pace is not None:
            budget = self._pace.budget(self._request.max_new_tokens)
            if self._pace.drafts or self._drafter is None or self._drafter.keeps_state:
                self._state = self._state.replace(budget=budget)
                self._state = self._state.replace(**self._paced(self._state))
            else:
                self._decode_plainly()
        rows = range(len(self._prompts))
        running = [True for _ in rows]
        while any(running):
            yield from self._run(running, iterations_per_call)
            running = [self._is_unfinished(b) for b in rows]
            if any(running):  # forget the caches' content, and prefill again
                lengths = [len(self._sequence(b)) for b in rows]
                self._plan = self._plan.again(lengths, self._ends)
                with self._explained(), on_mesh(self._mesh):
                    state = restart(self._spec, self._state, self._plan, running)
                    self._state = place_state(self._mesh, state)
        for text in self._texts:
            if text is not None:
                text.finish()
        if self._pace is not None:
            for b, passes in enumerate(jax.device_get(self._state.passes)):
                self._remember(self._counts(b, passes))
        self.has_ended = True

    def _run(self, running: list[bool], iterations_per_call: int) -> Iterator[list[list[int]]]:
        """Prefills the rows, and decodes the running ones to their limits."""
        plan, padding = self._plan, np.array(self._plan.padded) - np.array(self._plan.lengths)
        rows = range(len(self._prompts))
        texts = self._texts
        self._state = prefill(
            self._spec,
            self._target.params,
            self._drafter_params,
            self._state,
            [self._sequence(b) for b in rows],
            plan,
            running=running,
            call=self._prefill_call,
        )
        self._written = max(self._written, plan.known + sum(plan.chunks(running)))
        self._loops.clear()  # the state's arrays are new
        used = max(n for n, runs in zip(plan.padded, running, strict=True) if runs) - 1
        finished = False
        while not finished:
            tokens, lengths, done, broken = self._paced_decode(used, iterations_per_call, len(rows))
            self._broken = broken.tolist()
            yield [self._take(b, texts[b], tokens[b], int(lengths[b])) for b in rows]
            done = done | np.array(self._stopped)
            finished = bool(done.all())
            # Never less than before: another program would cost more than it saves.
            used = max(used, int((lengths + padding)[~done].max(initial=0)))
            if any(self._stopped) and not finished:
                done = place_state(self._mesh, jax.device_put(done))
                self._state = self._state.replace(done=done)

    @under_usual_jax_settings
    def results(self) -> list[Result]:
        """One Result per row; only when `has_ended`."""
        passes, memory = jax.device_get(self._state.passes), peak_memory_bytes()
        return [
            self._result(b, text, passes[b], memory, self._known)
            for b, text in enumerate(self._texts)
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of weights, caches and what the drafter needs; computed, without activations."""
        target, drafter = self._target, self._drafter
        weights = {id(x): num_bytes(x) for x in jax.tree.leaves(target.params)}
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
        written = max(self._written, length + self._spec.block)
        return Kept(np.asarray(tokens)[0, :length], cache, written)
