"""What drafting costs and gains on this device: measured while texts are generated.

An estimate by layers is wrong by a factor of two on some devices. The host loop knows the time of
each call into the compiled loop. So some of the first calls decode plainly, some draft in every
iteration, and some copy in every iteration; their times give the costs. What earlier texts gained
decides how much the next one may lose.
"""

import collections
import dataclasses
import math
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

from s3d_jax.decoding import adaptive
from s3d_jax.decoding.adaptive import Budget, new_budget
from s3d_jax.settings.drafting import PassCosts

_SECONDS_PER_CALL = 0.02  # of a call that measures; less is noise
_FEWEST, MOST_PER_CALL = 2, 8  # iterations of such a call
_WARM_UP = 2  # iterations that are not counted
_CALLS = 2  # of each kind; the faster one counts
_KEPT = 5  # costs; the highest counts
# The first text may be the only one. After it the cost is measured three times, and then when there
# were twice as many texts as at the last time, or so many more:
_AT_FIRST, _LONGEST_BETWEEN = 3, 128
_COPYING_AT_FIRST = 2  # measurements
_KNOWN = 64  # iterations with a draft after which τ is known
_REMEMBERED = 1024  # iterations with a draft
_STAKE = 0.02  # of its limit: the steps that a row may lose where drafting has not paid so far
# Where τ is below this share of the cost, one text in so many drafts, and only at its beginning. A
# row that joins a running batch drafts after so many iterations.
_HOPELESS, _TRIED = 0.7, 16
_HOPELESS_PAUSE = 512


class Call(NamedTuple):
    """How the next call decodes.

    Attributes:
        kind: of the iterations.
        most: iterations, or None.
    """

    kind: "Kind"
    most: int | None = None


class Kind(NamedTuple):
    """How iterations decode: each `adaptive.BY_BUDGET`, NEVER or ALWAYS.

    Attributes:
        drafting: whether rows draft.
        copying: whether rows copy.
    """

    drafting: int
    copying: int


BY_BUDGETS = Kind(adaptive.BY_BUDGET, adaptive.BY_BUDGET)
PLAIN = Kind(adaptive.NEVER, adaptive.NEVER)
DRAFTING = Kind(adaptive.ALWAYS, adaptive.NEVER)
COPYING = Kind(adaptive.NEVER, adaptive.ALWAYS)


@dataclasses.dataclass
class _Phase:
    """Iterations that decode alike and are timed together, in one call or several."""

    kind: Kind
    wanted: int
    done: int = 0
    seconds: float = 0.0
    visible: int = 0  # slots that the last call read

    @property
    def each(self) -> float:
        """Seconds of an iteration."""
        return self.seconds / self.done


class _Measurement:
    """Takes the times of iterations of each kind in turns, also over several texts."""

    def __init__(self, kinds: Sequence[Kind]) -> None:
        self._kinds = kinds
        self._todo = [_Phase(PLAIN, _WARM_UP)]
        self._done: list[_Phase] = []

    @property
    def next_call(self) -> Call:
        return Call(self._todo[0].kind, self._todo[0].wanted - self._todo[0].done)

    def took(self, iterations: int, seconds: float, visible: int) -> bool:
        """Takes the time of the call; True if it was the last one."""
        phase = self._todo[0]
        phase.done += iterations
        phase.seconds += seconds
        phase.visible = visible
        if phase.done < phase.wanted:
            return False
        self._done.append(self._todo.pop(0))
        if len(self._done) == 1:  # the warm-up, which tells how long a call must be
            size = math.ceil(_SECONDS_PER_CALL / max(phase.each, 1e-9))
            size = min(max(size, _FEWEST), MOST_PER_CALL)
            self._todo = [_Phase(kind, size) for kind in (PLAIN, *self._kinds) * _CALLS]
        return not self._todo

    def costs(self) -> dict[Kind, float]:
        """Of an iteration of each kind, in plain ones; without those that read other slots."""
        each: dict[tuple[int, Kind], float] = {}
        for phase in self._done[1:]:
            # The fastest: whatever else the machine did made the others slower.
            key = phase.visible, phase.kind
            each[key] = min(each.get(key, phase.each), phase.each)
        found: dict[Kind, float] = {}
        for (visible, kind), seconds in each.items():
            if kind != PLAIN and (plain := each.get((visible, PLAIN))) is not None:
                found[kind] = min(found.get(kind, math.inf), seconds / plain)
        return found


@dataclasses.dataclass
class Experience:
    """What drafting costs and gains with certain settings.

    Attributes:
        costs: of an iteration of each measured kind, in steps of plain decoding, the last few
            measurements.
        tokens, drafting: committed in iterations with a draft, and the number of these; old ones
            count less.
        texts: how many there were.
        next_measurement: the number of texts at which the cost is measured again.
        hopeless: texts that were not to draft.
        measurement: the one under way.
    """

    costs: dict[Kind, collections.deque[float]] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(lambda: collections.deque(maxlen=_KEPT))
    )
    tokens: float = 0.0
    drafting: float = 0.0
    texts: int = 0
    next_measurement: int = 2
    hopeless: int = 0
    measurement: _Measurement | None = None

    def cost(self, kind: Kind) -> float | None:
        """The measured cost, the highest of the last; None as long as there is none.

        A short plain call is slowed by waking threads, so most errors make drafting look cheap.
        """
        return max(self.costs[kind], default=None)

    @property
    def tokens_per_iteration(self) -> float | None:
        """τ of the iterations with a draft; None as long as they are few."""
        return self.tokens / self.drafting if self.drafting >= _KNOWN else None

    def begin_text(self, kinds: Sequence[Kind]) -> None:
        """Counts a text, and measures these kinds of iterations again if it is time.

        Iterations that copy are measured only at first: without a match they gain nothing, and
        their cost decides little.
        """
        self.texts += 1
        if self.measurement is None and self.texts >= self.next_measurement:
            known = len(self.costs[COPYING]) >= _COPYING_AT_FIRST
            self.measurement = _Measurement([k for k in kinds if k != COPYING or not known])

    def took(self, iterations: int, seconds: float, visible: int) -> None:
        """Takes the time of a call of the measurement under way."""
        if self.measurement is None or not self.measurement.took(iterations, seconds, visible):
            return
        costs, self.measurement = self.measurement.costs(), None
        for kind, cost in costs.items():
            self.costs[kind].append(cost)
        again = self.texts + 1
        if len(self.costs[DRAFTING]) >= _AT_FIRST or DRAFTING not in costs:
            again = min(2 * self.texts, self.texts + _LONGEST_BETWEEN)
        self.next_measurement = again

    def gained(self, tokens: int, drafting: int) -> None:
        """Takes what a text committed in its iterations with a draft, and how many they were."""
        self.tokens += tokens
        self.drafting += drafting
        if self.drafting > _REMEMBERED:
            self.tokens, self.drafting = self.tokens / 2, self.drafting / 2


class Experiences:
    """The experience of a model with each of its settings.

    A copy is empty, since it may come to another device.
    """

    def __init__(self) -> None:
        self._found: dict[Hashable, Experience] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Experiences, ()

    def __iter__(self) -> Iterator[Experience]:
        return iter(self._found.values())

    def of(self, settings: Hashable) -> Experience:
        """The experience with these settings, which may be new."""
        return self._found.setdefault(settings, Experience())


class Pace:
    """Decides for the texts of one batch when they draft, and measures.

    Attributes:
        drafts: whether the text of the last `budget` is to draft at all.
    """

    def __init__(
        self,
        costs: PassCosts,
        gamma: int,
        copies: bool,
        gain: float | None,
        experience: Experience,
    ) -> None:
        """Begins.

        Args:
            costs: of the passes, where nothing was measured.
            gamma: γ.
            copies: whether rows copy.
            gain: speed over that of plain decoding, where `s3d tune` has measured it; then nothing
                is measured, and the batch does not depend on earlier ones.
            experience: of these settings; it learns from this batch.
        """
        self._estimates = {DRAFTING: costs.iteration(gamma)}
        if copies:
            self._estimates[COPYING] = costs.verify[gamma]
        self._gain, self._experience = gain, experience
        self.drafts = True

    @property
    def cost(self) -> float:
        """Of an iteration with a draft, in steps of plain decoding, as far as it is known."""
        return self._cost(DRAFTING)

    @property
    def copy_cost(self) -> float:
        """Tokens that are decoded without copies in the time of an iteration that copies."""
        if COPYING not in self._estimates:
            return 0.0
        return self._cost(COPYING) * max(1.0, self._known_gain or 1.0)

    def _cost(self, kind: Kind) -> float:
        measured = self._experience.cost(kind) if self._gain is None else None
        return self._estimates[kind] if measured is None else measured

    @property
    def _known_gain(self) -> float | None:
        """Speed of drafting over that of plain decoding; None as long as it is not known."""
        if self._gain is not None:
            return self._gain
        tau = self._experience.tokens_per_iteration
        return None if tau is None else tau / self.cost

    def budget(self, new_tokens: Sequence[int]) -> Budget:
        """The budget with which rows begin a text of so many new tokens at most, [B]."""
        batch, tries, self.drafts = len(new_tokens), False, True
        if self._gain is None:
            self._experience.begin_text(tuple(self._estimates))
            tries = self._experience.texts % _TRIED == 0
        gain = self._known_gain
        if gain is None or gain >= 1:
            return new_budget(batch, self.cost)
        if gain < _HOPELESS and not tries:
            self.drafts = self._waits_for_a_reason_to_compile()
            return new_budget(batch, self.cost, steps=[0.0] * batch, pause=_HOPELESS_PAUSE)
        return new_budget(batch, self.cost, steps=[_STAKE * n for n in new_tokens])

    def _waits_for_a_reason_to_compile(self) -> bool:
        """Whether the loop that can draft still decodes texts that are not to draft.

        The loop of plain decoding is another program, and compiling it takes as long as it saves in
        some texts.
        """
        if self._gain is not None:
            return False
        if self._experience.measurement is not None:
            return True
        self._experience.hopeless += 1
        return self._experience.hopeless <= _TRIED

    def next_call(self) -> Call:
        """How the next call is to decode."""
        measurement = self._experience.measurement
        if self._gain is not None or measurement is None:
            return Call(BY_BUDGETS)
        return measurement.next_call

    def took(self, iterations: int, seconds: float, visible: int) -> None:
        """Takes the time of the call that `next_call` described, which read `visible` slots."""
        if self._gain is None:
            self._experience.took(iterations, seconds, visible)

    def gained(self, tokens: int, drafting: int) -> None:
        """Takes what a text committed in its iterations with a draft."""
        self._experience.gained(tokens, drafting)
