"""Costs of the passes on this device: whole iterations of the compiled loop, timed in turns.

The time of an iteration does not depend on how much is accepted. So each program runs as in
decoding, with a donated state that passes from one program to the next, always from the same
position. Decoding real texts is a little slower than this loop, and plain decoding loses more than
S3D: texts are short, caches have several sizes, and weights have left the processor's caches when
the next text begins. That difference is measured too, on two settings (`Costs.scaled`).
"""

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from s3d_jax.decoding.sampling import SamplingFeatures, SamplingParams, batch_sampling
from s3d_jax.decoding.sizes import SlotPlan
from s3d_jax.decoding.state import DecodeSpec, DecodeState, Inputs, Proposal, init_state, last_token
from s3d_jax.decoding.step import decode_jit
from s3d_jax.drafters.base import Drafter
from s3d_jax.drafters.s3d import S3D
from s3d_jax.engine.programs import Program
from s3d_jax.keys import make_key
from s3d_jax.lm import LM
from s3d_jax.settings.drafting import DraftConfig, PassCosts
from s3d_jax.settings.sampling import SamplingConfig
from s3d_jax.tune.acceptance import Skip, Texts

_SECONDS = 0.05  # of one turn of one program, where the cache has room for so many iterations
_STEP = 32  # slots; odd numbers of them are slower than what decoding uses


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds per iteration of one row.

    Attributes:
        verify: without a draft pass, with w = 0, 1, … draft tokens, the largest γ of `draft` or
            more. The first is an AR step.
        draft: what the draft pass adds, by γ and the number of layers kept. Between two measured
            numbers of layers it is interpolated.
        visible: slots of the cache that were read.
    """

    verify: tuple[float, ...]
    draft: Mapping[int, Mapping[int, float]]
    visible: int

    def scaled(self, step: float, kept: int, gamma: int, iteration: float) -> "Costs":
        """The costs scaled to the times of real decoding.

        Args:
            step: seconds of one of plain decoding.
            kept, gamma: an S3D setting.
            iteration: seconds of one of its iterations. All others change in proportion.
        """
        factor = iteration / (self.step * self.relative(kept, gamma).iteration(gamma))
        return dataclasses.replace(
            self,
            verify=(step, *(factor * seconds for seconds in self.verify[1:])),
            draft={
                g: {depth: factor * seconds for depth, seconds in by_depth.items()}
                for g, by_depth in self.draft.items()
            },
        )

    @property
    def step(self) -> float:
        """Seconds of a step of plain decoding."""
        return self.verify[0]

    def relative(self, kept: int, gamma: int) -> PassCosts:
        """In steps of plain decoding.

        Args:
            kept: layers that the draft pass runs.
            gamma: γ, one of `draft`.
        """
        depths = sorted(self.draft[gamma])
        draft = float(np.interp(kept, depths, [self.draft[gamma][depth] for depth in depths]))
        verify = tuple(seconds / self.step for seconds in self.verify[: gamma + 1])
        return PassCosts(draft / self.step, verify)


class Clock:
    """Times iterations of plain decoding, of verification alone, and of S3D.

    Args:
        lm: the model with its draft.
        skips: sets of skipped layers, of different size.
        gammas: γs.
        texts: what is decoded. The programs read as much of the cache as these texts' tokens see on
            average.
        max_new_tokens: limit that the texts were written with.
        extra: verify passes of so many more tokens than the largest γ are timed, too.
        progress: called after each program is compiled, `num_programs` times.
    """

    def __init__(
        self,
        lm: LM,
        skips: Sequence[Skip],
        gammas: Sequence[int],
        texts: Texts,
        max_new_tokens: int,
        extra: int = 0,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        self._lm, self._skips, self._gammas = lm, skips, gammas
        self._most = most = max(gammas) + extra
        whole = (False,) * lm.config.num_layers
        sampling, features = _greedy(lm)
        specs: dict[Any, DecodeSpec] = {0: DecodeSpec(lm.config, None, features)}
        for w in range(1, most + 1):
            specs[w] = DecodeSpec(lm.config, _RepeatLast(DraftConfig(whole, w)), features)
        for skip, gamma in itertools.product(skips, gammas):
            draft = lm.draft_config.replace(skip=skip, gamma=gamma)
            specs[sum(skip), gamma] = DecodeSpec(lm.config, S3D(draft), features)

        self.visible = _mean_visible(lm, texts, max_new_tokens, most)
        # One row with only its first token: the cache's content does not change the time.
        limit = self.visible - most - 1
        first = [np.zeros(1, np.int32)]
        plan = SlotPlan((1,), (limit,), most, self.visible)
        self._state = init_state(specs[most], first, plan, sampling)
        self._programs, self._iterations = {}, dict.fromkeys(specs, 1)
        self._room = {name: max(1, (limit - 1) // (s.gamma + 1)) for name, s in specs.items()}
        self._seconds: dict[Any, list[float]] = {name: [] for name in specs}
        for name, spec in specs.items():
            static = dict(spec=spec, visible=self.visible)
            self._programs[name] = Program(decode_jit, static, self._arguments(self._state, 1))
            progress()
        for name in [*specs] * 2:  # warm up, and find out how many iterations fill a turn
            each = self._time(name)
            self._iterations[name] = int(np.clip(_SECONDS / each, 1, self._room[name]))

    def _arguments(self, state: DecodeState, iterations: int) -> dict[str, Any]:
        return dict(
            params=self._lm.params,
            drafter_params=self._lm.draft_params,
            state=state,
            max_iterations=np.int32(iterations),
        )

    def take_turns(self, turns: int = 9) -> None:
        """Times every program `turns` more times, in turns."""
        names = list(self._programs)
        for turn in range(turns):
            for name in names if turn % 2 else reversed(names):
                self._seconds[name].append(self._time(name))

    def costs(self) -> Costs:
        """Medians of all turns so far."""
        median = {name: statistics.median(values) for name, values in self._seconds.items()}
        layers = self._lm.config.num_layers
        draft = {
            # Above 0, also where the clock is too coarse to measure it.
            g: {layers - sum(s): max(median[sum(s), g] - median[g], 1e-9) for s in self._skips}
            for g in self._gammas
        }
        verify = tuple(median[w] for w in range(self._most + 1))
        return Costs(verify, draft, self.visible)

    def _time(self, name: Any) -> float:
        """Seconds per iteration of one call, which starts at the first token again."""
        fresh = jnp.zeros((1,), jnp.int32), jnp.zeros((1,), bool)
        length, done = jax.block_until_ready(fresh)
        cache = self._state.cache.replace(length=length)
        state = self._state.replace(cache=cache, done=done)
        count = self._iterations[name]
        start = time.perf_counter()
        self._state = self._programs[name](**self._arguments(state, count))
        jax.block_until_ready(self._state)
        return (time.perf_counter() - start) / count


def num_programs(skips: Sequence[Skip], gammas: Sequence[int], extra: int = 0) -> int:
    """How many programs a `Clock` compiles."""
    return 1 + max(gammas) + extra + len(skips) * len(gammas)


class _RepeatLast(Drafter):
    """Costs nothing: what remains of an iteration is the verify pass."""

    def propose(self, inputs: Inputs) -> Proposal:
        last = last_token(inputs.state)
        tokens = jnp.broadcast_to(last, (last.shape[0], self.gamma))
        return Proposal(tokens, inputs.state.cache)


def _mean_visible(lm: LM, texts: Texts, max_new_tokens: int, gamma: int) -> int:
    """Mean number of slots that are read per new token; the time of a pass is linear in it."""
    weights, slots = [], []
    for prompt, length in zip(texts.prompt_lengths, texts.lengths, strict=True):
        end = min(prompt + max_new_tokens, lm.max_length)
        plan = SlotPlan.for_batch([prompt], [end], gamma, max_length=lm.max_length)
        slots.append(plan.visible_to_step(plan.padded[0] + (length - prompt) // 2))
        weights.append(length - prompt)
    mean = float(np.average(slots, weights=weights))
    return _STEP * math.ceil(max(mean, 2 * gamma + 3) / _STEP)


def _greedy(lm: LM) -> tuple[SamplingParams, SamplingFeatures]:
    keys = jax.random.split(make_key(0), 1)
    return batch_sampling([SamplingConfig()], keys, lm.config.vocab_size)
