"""What drafting costs and gains on this device: measured while texts are generated.

An estimate by layers is wrong by a factor of two on some devices. The host loop knows the time of
each call into the compiled loop. So some of the first calls decode plainly and some draft in every
iteration, and their times give the cost. What earlier texts gained decides how much the next one
may lose.
"""

import collections
import dataclasses
import math
import statistics
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

from s3d_jax.decoding import adaptive
from s3d_jax.decoding.adaptive import Budget, new_budget

_SECONDS_PER_CALL = 0.02  # of a call that measures; less is noise
_FEWEST, MOST_PER_CALL = 2, 8  # iterations of such a call
_WARM_UP = 2  # iterations that are not counted
_CALLS = 2  # of each kind; the faster one counts
_MEASURED = 5  # costs that are kept; their median counts
# After the first run, which may be the only one, three are measured; then the fourfold number of
# runs, but at most so many between two:
_FIRST_MEASURED, _LONGEST_BETWEEN = 3, 64
_KNOWN = 64  # iterations with a draft after which τ is known
_REMEMBERED = 1024  # iterations with a draft
# Of plain decoding's time: what a row may lose where drafting has not paid so far.
_STAKE = 0.02
# Where τ is below this share of the cost, drafting is tried in every eighth run alone.
_HOPELESS, _TRIED = 0.7, 8
_HOPELESS_PAUSE = 512


@dataclasses.dataclass
class Experience:
    """What drafting costs and gains with certain settings.

    Attributes:
        costs: of an iteration with a draft, in steps of plain decoding, the last few measurements.
        tokens, drafting: committed in iterations with a draft, and the number of these; old ones
            count less.
        runs: how many there were.
        next_measurement: the run that measures the cost again.
    """

    costs: collections.deque[float] = dataclasses.field(
        default_factory=lambda: collections.deque(maxlen=_MEASURED)
    )
    tokens: float = 0.0
    drafting: float = 0.0
    runs: int = 0
    next_measurement: int = 1

    @property
    def cost(self) -> float | None:
        """The measured cost; None as long as there is none."""
        return statistics.median(self.costs) if self.costs else None

    @property
    def tokens_per_iteration(self) -> float | None:
        """τ of the iterations with a draft; None as long as they are few."""
        return self.tokens / self.drafting if self.drafting >= _KNOWN else None

    def add(self, tokens: int, drafting: int) -> None:
        """Adds what a row committed in its iterations with a draft, and how many they were."""
        self.tokens += tokens
        self.drafting += drafting
        if self.drafting > _REMEMBERED:
            self.tokens, self.drafting = self.tokens / 2, self.drafting / 2


class Experiences:
    """The experience of a model with each of its settings. A copy of it is empty: the copy may come
    to another device."""

    def __init__(self) -> None:
        self._found: dict[Hashable, Experience] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Experiences, ()

    def __iter__(self) -> Iterator[Experience]:
        return iter(self._found.values())

    def of(self, settings: Hashable) -> Experience:
        """The experience with these settings, which may be new."""
        return self._found.setdefault(settings, Experience())


class Call(NamedTuple):
    """How the next call decodes.

    Attributes:
        mode: `adaptive.BY_BUDGET`, NEVER or ALWAYS.
        most: iterations, or None.
    """

    mode: int
    most: int | None


@dataclasses.dataclass
class _Phase:
    """Iterations that decode alike and are timed together, in one call or several."""

    mode: int
    wanted: int
    done: int = 0
    seconds: float = 0.0

    @property
    def each(self) -> float:
        """Seconds of an iteration."""
        return self.seconds / self.done


class Pace:
    """Decides for one run when it drafts, and measures.

    Attributes:
        cost: of an iteration with a draft, in steps of plain decoding, as far as it is known.
    """

    def __init__(self, estimate: float, gain: float | None, experience: Experience) -> None:
        """Begins a run.

        Args:
            estimate: the cost where nothing was measured.
            gain: speed over that of plain decoding, where `s3d tune` has measured it; then nothing
                is measured, and the run does not depend on earlier ones.
            experience: of these settings; it learns from this run.
        """
        self._experience, self._gain = experience, gain
        self._phases: list[_Phase] = []  # to come
        self._measured: list[_Phase] = []
        self.cost = estimate
        if gain is None:
            self.cost = experience.cost or estimate
            if experience.runs >= experience.next_measurement:
                self._phases = [_Phase(adaptive.NEVER, _WARM_UP)]

    def budget(self, new_tokens: Sequence[int]) -> Budget:
        """The budget with which rows begin that may have so many new tokens, [B]."""
        batch, gain = len(new_tokens), self._gain
        if gain is None:
            self._experience.runs += 1
            tau = self._experience.tokens_per_iteration
            gain = None if tau is None else tau / self.cost
        if gain is None or gain >= 1:
            return new_budget(batch, self.cost)
        if gain < _HOPELESS and (self._gain is not None or self._experience.runs % _TRIED):
            return new_budget(batch, self.cost, steps=[0.0] * batch, pause=_HOPELESS_PAUSE)
        return new_budget(batch, self.cost, steps=[_STAKE * n for n in new_tokens])

    def next_call(self) -> Call:
        """How the next call is to decode."""
        if not self._phases:
            return Call(adaptive.BY_BUDGET, None)
        phase = self._phases[0]
        return Call(phase.mode, phase.wanted - phase.done)

    def took(self, iterations: int, seconds: float) -> None:
        """Takes the time of the call that `next_call` described."""
        if not self._phases:
            return
        phase = self._phases[0]
        phase.done += iterations
        phase.seconds += seconds
        if phase.done < phase.wanted:
            return
        self._measured.append(self._phases.pop(0))
        if len(self._measured) == 1:  # the warm-up, which tells how long a measurement must be
            size = math.ceil(_SECONDS_PER_CALL / max(phase.each, 1e-9))
            size = min(max(size, _FEWEST), MOST_PER_CALL)
            modes = [adaptive.NEVER, adaptive.ALWAYS] * _CALLS
            self._phases = [_Phase(mode, size) for mode in modes]
        elif not self._phases:
            self._learn()

    def _learn(self) -> None:
        # The fastest: whatever else the machine did made the others slower.
        plain, drafting = (
            min(phase.each for phase in self._measured[1:] if phase.mode == mode)
            for mode in (adaptive.NEVER, adaptive.ALWAYS)
        )
        known = self._experience
        known.costs.append(drafting / plain)
        if len(known.costs) >= _FIRST_MEASURED:
            known.next_measurement = min(4 * known.runs, known.runs + _LONGEST_BETWEEN) - 1
        self.cost = known.cost or self.cost

    def gained(self, tokens: int, drafting: int) -> None:
        """Takes what a row committed in its iterations with a draft."""
        self._experience.add(tokens, drafting)
