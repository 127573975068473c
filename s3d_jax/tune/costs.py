"""What the passes cost on this device: whole iterations of the compiled loop, in turns.

How long an iteration takes does not depend on what is accepted in it. So each program runs as it
does in decoding, the state donated and handed on from one to the next, from the same place again
and again.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from s3d_jax import decode
from s3d_jax.batch import cache_slots
from s3d_jax.config import DraftConfig, PassCosts, SamplingConfig
from s3d_jax.generate import LM
from s3d_jax.model import Params
from s3d_jax.sampling import batch_sampling
from s3d_jax.state import DecodeSpec, DecodeState, DrafterParams, Proposal, last_token
from s3d_jax.tune.acceptance import Skip, Texts

_TURNS = 9  # that count
_SECONDS = 0.05  # of one turn of one program, where the cache has room for so many iterations


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds per iteration of one row.

    Attributes:
        verify: without a draft pass, with w = 0 … γ draft tokens. The first is an AR step.
        draft: what the draft pass adds, by γ and the number of layers kept. Between two numbers of
            layers it is taken to grow evenly.
        visible: slots of the cache that were read.
        compile_seconds: spent on the programs.
    """

    verify: tuple[float, ...]
    draft: Mapping[int, Mapping[int, float]]
    visible: int
    compile_seconds: float = 0.0

    @property
    def step(self) -> float:
        """Of plain decoding."""
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


def measure_costs(
    lm: LM,
    skips: Sequence[Skip],
    gammas: Sequence[int],
    texts: Texts,
    max_new_tokens: int,
    progress: Callable[[], None] = lambda: None,
) -> Costs:
    """Times iterations of plain decoding, of verification alone, and of S3D.

    Args:
        lm: the model with its draft.
        skips: sets of skipped layers, of different size.
        gammas: γs.
        texts: what is decoded. The cache is as large, and as much of it is read, as in the middle
            of the text of median length.
        max_new_tokens: that they were written with.
        progress: called after each program is compiled, `num_programs` times.
    """
    most = max(gammas)
    whole = (False,) * lm.config.num_layers
    features = _greedy(lm)[1]
    specs: dict[Any, DecodeSpec] = {0: DecodeSpec(lm.config, None, features)}
    for w in range(1, most + 1):
        specs[w] = DecodeSpec(lm.config, DraftConfig(whole, w), features, (), _repeat_last)
    for skip in skips:
        for gamma in gammas:
            draft = lm.draft_config.replace(skip=skip, gamma=gamma)
            specs[sum(skip), gamma] = DecodeSpec(lm.config, draft, features)

    slots, visible = _context(lm, texts, max_new_tokens, most)
    state = _state(lm, specs[most], slots)
    arguments = (lm.params, lm.draft_params)
    begin = time.perf_counter()
    programs = {}
    for name, spec in specs.items():
        lowered = decode.decode_jit.lower(spec, *arguments, state, np.int32(1), visible)
        programs[name] = lowered.compile()
        progress()
    compile_seconds = time.perf_counter() - begin

    room = {name: _room(state, visible, spec.gamma) for name, spec in specs.items()}
    iterations = dict.fromkeys(specs, 1)
    seconds: dict[Any, list[float]] = {name: [] for name in specs}
    order = list(specs)
    for turn in range(-2, _TURNS):
        for name in order if turn % 2 else reversed(order):
            state = _rewound(state)
            start = time.perf_counter()
            state = programs[name](*arguments, state, np.int32(iterations[name]))
            jax.block_until_ready(state)
            each = (time.perf_counter() - start) / iterations[name]
            if turn < 0:  # the first warms up, and both say how many iterations fill a turn
                iterations[name] = int(np.clip(_SECONDS / each, 1, room[name]))
            else:
                seconds[name].append(each)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    num_layers = lm.config.num_layers
    return Costs(
        verify=tuple(median[w] for w in range(most + 1)),
        draft={
            gamma: {
                # More than nothing, also where the clock was too coarse to see it.
                num_layers - sum(skip): max(median[sum(skip), gamma] - median[gamma], 1e-9)
                for skip in skips
            }
            for gamma in gammas
        },
        visible=visible,
        compile_seconds=compile_seconds,
    )


def num_programs(skips: Sequence[Skip], gammas: Sequence[int]) -> int:
    """How many programs `measure_costs` compiles."""
    return 1 + max(gammas) + len(skips) * len(gammas)


def _repeat_last(
    spec: DecodeSpec,
    params: Params,
    draft_params: DrafterParams,
    state: DecodeState,
    visible: int | None = None,
) -> Proposal:
    """A proposer that costs nothing: what remains of the iteration is the verify pass."""
    last = last_token(state)
    return Proposal(jnp.broadcast_to(last, (last.shape[0], spec.gamma)), None, state.cache)


def _context(lm: LM, texts: Texts, max_new_tokens: int, gamma: int) -> tuple[int, int]:
    """Slots of the cache, and those of them that are read, as a batch of one such text has them."""
    median = int(np.argsort(texts.lengths)[len(texts.lengths) // 2])
    prompt, length = texts.prompt_lengths[median], texts.lengths[median]
    padded = decode.padded_length(prompt)
    slots = cache_slots([padded], [max_new_tokens], lm.max_length, gamma)
    middle = padded + (length - prompt) // 2
    return slots, decode.visible_slots(middle + gamma + 1, slots)


def _greedy(lm: LM) -> Any:
    keys = jax.random.split(jax.random.key(0), 1)
    return batch_sampling([SamplingConfig()], keys, lm.config.vocab_size)


def _state(lm: LM, spec: DecodeSpec, slots: int) -> DecodeState:
    """One row with nothing but its first token: what is in the cache has no say in the time."""
    limit = np.array([slots - spec.gamma - 1])
    return decode.init_state(spec, [np.zeros(1, np.int32)], slots, limit, _greedy(lm)[0])


def _rewound(state: DecodeState) -> DecodeState:
    """Back at the first token; the state's other arrays are handed on as they are."""
    fresh = jnp.zeros((1,), jnp.int32), jnp.zeros((1,), bool)
    length, done = jax.block_until_ready(fresh)
    return state.replace(cache=state.cache.replace(length=length), done=done)


def _room(state: DecodeState, visible: int, gamma: int) -> int:
    """Iterations that fit, should all tokens be accepted."""
    room = min(visible - int(state.padding[0]), int(state.limit[0])) - 1
    return max(1, (room - gamma - 1) // (gamma + 1))
