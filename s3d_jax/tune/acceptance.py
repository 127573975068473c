"""Acceptance of drafts on known texts, without decoding them once per setting.

Greedy decoding gives the same text with every drafter. So the text is written once, and one draft
pass at each of its places counts the tokens that an iteration starting there would accept. The next
iteration starts after these tokens and the bonus token. Walking through the text in this way gives
the τ of decoding, for every γ.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from s3d_jax.errors import InputError
from s3d_jax.lm import LM
from s3d_jax.nn.cache import KVCache
from s3d_jax.nn.draft import DraftParams
from s3d_jax.nn.streams import draft_stream, target_cache
from s3d_jax.settings.drafting import DraftConfig
from s3d_jax.settings.model import ModelConfig
from s3d_jax.texts.suites import Prompt
from s3d_jax.train.objective import block_targets
from s3d_jax.weights.trees import Params, float_dtype

Skip = tuple[bool, ...]

_MEASURED_DEPTHS = 12
_ROWS = 16  # decoded in one batch, at most
MOST_BYTES = 4 * 2**30  # of keys and values held at a time
_BLOCK_TOKENS = 256  # of one draft pass, all its blocks together


_target_cache = jax.jit(target_cache, static_argnames=("config", "slots"))


@dataclasses.dataclass(frozen=True)
class Texts:
    """The model's own greedy continuations of some prompts.

    Attributes:
        tokens: int32 [R, T], prompts and outputs, padded at the end.
        prompt_lengths, lengths: tokens of each prompt, and with its output.
    """

    tokens: np.ndarray
    prompt_lengths: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def new_tokens(self) -> int:
        """Tokens of all outputs."""
        return sum(self.lengths) - sum(self.prompt_lengths)


def write_texts(lm: LM, prompts: Sequence[Prompt], max_new_tokens: int) -> Texts:
    """Continues prompts by plain decoding.

    Args:
        lm: the model.
        prompts: what is continued.
        max_new_tokens: per prompt.

    Returns:
        The texts, in an order of their own.

    Raises:
        NumericalError: the model's logits are no numbers.
    """
    rows: list[np.ndarray] = []
    lengths: list[int] = []
    by_end: dict[Any, list[np.ndarray]] = {}  # the rows of a batch end by the same tokens
    for prompt in prompts:
        by_end.setdefault(prompt.eos_token_ids, []).append(prompt.tokens)
    longest = max(len(prompt.tokens) for prompt in prompts)
    count = max(1, min(_ROWS, num_fitting(lm, longest + max_new_tokens)))
    for ends, all_of_them in by_end.items():
        for start in range(0, len(all_of_them), count):
            part = all_of_them[start : start + count]
            results = lm.generate(
                part, method="ar", max_new_tokens=max_new_tokens, eos_token_ids=ends
            )
            for result in results:
                result.check()
            rows += [np.concatenate([p, r.tokens]) for p, r in zip(part, results, strict=True)]
            lengths += map(len, part)
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, text in zip(tokens, rows, strict=True):
        row[: len(text)] = text
    return Texts(tokens, tuple(lengths), tuple(map(len, rows)))


def num_fitting(lm: LM, slots: int, copies: int = 1) -> int:
    """Number of texts whose keys and values fit in MOST_BYTES together; 0 if not even one does.

    Args:
        lm: whose.
        slots: of each text.
        copies: of each.
    """
    return MOST_BYTES // (copies * context_bytes(lm, slots))


def context_bytes(lm: LM, slots: int) -> int:
    """Bytes of one text's keys and values."""
    config, each = lm.config, float_dtype(lm.params).itemsize
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * slots * each


@dataclasses.dataclass(frozen=True)
class Acceptance:
    """What greedy decoding of some texts takes.

    Attributes:
        tokens: new tokens.
        iterations: passes of the full model after the prefill.
        accepted: for each of the γ positions, how often its draft token was accepted.
    """

    tokens: int
    iterations: int
    accepted: tuple[int, ...]

    @property
    def tokens_per_iteration(self) -> float:
        """τ."""
        return self.tokens / self.iterations

    @property
    def per_position(self) -> tuple[float, ...]:
        """Share of the iterations in which the i-th draft token was accepted."""
        return tuple(count / self.iterations for count in self.accepted)


def replay(accepted: Sequence[np.ndarray], gamma: int) -> Acceptance:
    """Walks through texts as decoding with γ draft tokens does.

    Args:
        accepted: for each text, int [N]: correct draft tokens of an iteration that starts when j of
            the N new tokens are committed. Tokens after the end of the text are never correct.
        gamma: γ, which limits the counts.
    """
    counts, iterations = np.zeros(gamma, int), 0
    for row in accepted:
        j = 0
        while j < len(row):
            right = min(int(row[j]), gamma)
            counts[:right] += 1
            iterations += 1
            j += right + 1
    return Acceptance(sum(map(len, accepted)), iterations, tuple(counts.tolist()))


@dataclasses.dataclass(frozen=True)
class Expected:
    """Acceptance of a draft that skips some layers, measured or interpolated.

    Attributes:
        skip: one entry per layer, True where the draft skips it.
        tokens_per_iteration: τ by γ.
        acceptance: share of iterations in which the i-th token of the longest draft is accepted.
        measured: False where it is interpolated between neighbouring depths.
    """

    skip: Skip
    tokens_per_iteration: Mapping[int, float]
    acceptance: tuple[float, ...]
    measured: bool

    @property
    def kept(self) -> int:
        """Layers that the draft pass runs."""
        return len(self.skip) - sum(self.skip)


def fit_acceptance(
    found: Sequence[Skip],
    own: Skip,
    gammas: Sequence[int],
    acceptance: Callable[[Skip, int], Acceptance],
    progress: Callable[[], None] = lambda: None,
) -> list[Expected]:
    """Acceptance by depth and position, from measurements of some depths.

    From the smallest set to the largest `num_measured` are measured, evenly spread. At the depths
    between two of these, τ and the share of each position are taken to change evenly.

    Args:
        found: sets of layers, one for each size, the smallest first.
        own: the draft's own set, always measured.
        gammas: in their order.
        acceptance: measures, given a set and a γ.
        progress: called after each set that was measured.

    Returns:
        One for each set, the fewest layers kept first.
    """
    some = _some(found)
    rows: dict[Skip, list[float]] = {}  # τ for each γ, then the shares of the positions
    for skip in dict.fromkeys([*some, own]):
        each = [acceptance(skip, gamma) for gamma in gammas]
        rows[skip] = [*(a.tokens_per_iteration for a in each), *each[-1].per_position]
        progress()
    depths, columns = [sum(s) for s in some], list(zip(*(rows[s] for s in some), strict=True))
    expected = []
    for skip in dict.fromkeys([*found, own]):
        row = rows.get(skip) or [float(np.interp(sum(skip), depths, c)) for c in columns]
        taus, shares = row[: len(gammas)], row[len(gammas) :]
        by_gamma = dict(zip(gammas, taus, strict=True))
        expected.append(Expected(skip, by_gamma, tuple(shares), skip in rows))
    return sorted(expected, key=lambda e: e.kept)


def num_measured(found: Sequence[Skip], own: Skip) -> int:
    """How many sets `fit_acceptance` measures."""
    return len({*_some(found), own})


def _some(found: Sequence[Skip]) -> list[Skip]:
    evenly = np.linspace(0, len(found) - 1, _MEASURED_DEPTHS).round().astype(int)
    return [found[i] for i in np.unique(evenly)]


class Judge:
    """Counts the right tokens of drafts that skip any layers, by one compiled program for all.

    The target's keys and values are kept of as many texts as MOST_BYTES allow; of the others they
    are computed whenever they are needed, which makes a judgement about twice as long.

    Args:
        lm: the model with its draft, trained or not.
        texts: what the model writes.
        gamma: the largest γ that will be asked for.
    """

    def __init__(self, lm: LM, texts: Texts, gamma: int) -> None:
        if not texts.new_tokens:
            raise InputError("the model continues none of the prompts: nothing can be measured")
        self.lm, self.texts, self.gamma = lm, texts, gamma
        self._all_right: dict[tuple[Skip, int], list[np.ndarray]] = {}
        self._slots = texts.tokens.shape[1] + self._blocks(gamma) * gamma
        kept = min(len(texts.tokens), num_fitting(lm, self._slots))
        self._kept: list[KVCache] = []
        self._kept += map(self._stream, range(kept))

    def right(self, skip: Skip, gamma: int) -> list[np.ndarray]:
        """For each text, int [N]: draft tokens that are right at each place, as `replay` wants it.

        Args:
            skip: one entry per layer, True where the draft skips it.
            gamma: γ, up to that of the constructor.
        """
        # A token of a causal block does not know how many follow it, so one γ measures all below.
        causal = self.lm.draft_config.block_attention == "causal"
        wide = self.gamma if causal else gamma
        if (skip, wide) not in self._all_right:
            texts = range(len(self.texts.lengths))
            self._all_right[skip, wide] = [self._right(skip, wide, r, 1) for r in texts]
        return [np.minimum(row, gamma) for row in self._all_right[skip, wide]]

    def acceptance(self, skip: Skip, gamma: int) -> Acceptance:
        """What decoding with these settings takes."""
        return replay(self.right(skip, gamma), gamma)

    def score(self, skip: Skip, stride: int) -> float:
        """Mean of the right tokens of γ, at every `stride`-th place: cheap, to compare sets by."""
        texts = range(len(self.texts.lengths))
        rows = [self._right(skip, self.gamma, r, stride) for r in texts]
        return float(np.mean(np.concatenate(rows)))

    def _stream(self, r: int) -> KVCache:
        """The target's keys and values of text r."""
        if r < len(self._kept):
            return self._kept[r]
        lm = self.lm
        return _target_cache(lm.config, lm.params, self.texts.tokens[r : r + 1], self._slots)

    def _blocks(self, gamma: int) -> int:
        """Blocks of one draft pass."""
        return max(1, _BLOCK_TOKENS // gamma)

    def _right(self, skip: Skip, gamma: int, r: int, stride: int) -> np.ndarray:
        """Of text r, every stride-th place: int [ceil(N / stride)]."""
        lm, tokens, length = self.lm, self.texts.tokens[r : r + 1], self.texts.lengths[r]
        places = np.arange(self.texts.prompt_lengths[r] - 1, length - 1, stride)
        count = self._blocks(gamma)
        found, stream = [np.zeros(0, int)], self._stream(r)
        for start in range(0, len(places), count):
            part = places[start : start + count]
            anchors = np.pad(part, (0, count - len(part)), mode="edge")[None].astype(np.int32)
            right = _right_tokens(
                lm.config,
                keeping_all(lm.draft_config, gamma),
                lm.params,
                lm.draft_params,
                ~np.array(skip),
                tokens,
                np.int32(length),
                anchors,
                stream,
            )
            found.append(np.asarray(right)[0, : len(part)])
        return np.concatenate(found)


def keeping_all(draft: DraftConfig, gamma: int) -> DraftConfig:
    return draft.replace(skip=(False,) * len(draft.skip), gamma=gamma)


@functools.partial(jax.jit, static_argnames=("config", "draft_config"))
def _right_tokens(
    config: ModelConfig,
    draft_config: DraftConfig,
    params: Params,
    draft: DraftParams,
    keep: jax.Array,
    tokens: jax.Array,
    length: jax.Array,
    anchors: jax.Array,
    cache: KVCache,
) -> jax.Array:
    """Right draft tokens of each block, int [B, A]; keep: bool [L].

    In decoding the skipped layers are static, and each set has a program of its own. Here hundreds
    of sets are compared, and computing a layer whose output is dropped costs less than a
    compilation.
    """
    logits = draft_stream(config, params, draft_config, draft, tokens, anchors, cache, keep=keep)
    known = jnp.broadcast_to(jnp.arange(tokens.shape[1]) < length, tokens.shape)
    gamma = draft_config.gamma
    _, targets, weights = block_targets(tokens, known, anchors, gamma, 1.0)
    right = (draft.ids(jnp.argmax(logits, axis=-1)) == targets) & (weights > 0)
    return jnp.sum(jnp.cumprod(right.reshape(*anchors.shape, gamma), axis=2), axis=2)
