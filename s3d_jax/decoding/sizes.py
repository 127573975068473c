"""Sizes of a batch: prefill chunks, cache slots, and how many slots a program reads.

Sizes are rounded to few values, so that prompts and outputs of nearby lengths share compiled
programs.
"""

import dataclasses
from collections.abc import Sequence
from typing import Self

from s3d_jax.nn.cache import cache_bytes
from s3d_jax.settings.model import ModelConfig

PREFILL_BUCKETS = (16, 32, 64, 128, 256, 512)
_FIRST_VISIBLE = 256  # slots; reading them all costs less than another program
_FIRST_GROWING = 1024  # slots of a cache that a conversation begins with
_USUAL_SLACK = 16  # slots after the last token, enough for γ up to 15; merged up to 3


@dataclasses.dataclass(frozen=True)
class SlotPlan:
    """Answers every question of size for one batch of B rows.

    Attributes:
        lengths: tokens of each row before decoding; the last one is not prefilled, since it is the
            input of the first step.
        limits: tokens (prompt included) at which each row stops.
        gamma: γ of the drafter; 0 for AR.
        slots: S, slots of the cache per row.
        known: tokens at the beginning of each row that the cache already holds.
        block: slots that an iteration writes after the committed tokens, where these are more than
            γ+1 (`Proposer.block`).

    Raises:
        ValueError: S is too small; a write near the end would be clamped onto committed slots.
    """

    lengths: tuple[int, ...]
    limits: tuple[int, ...]
    gamma: int
    slots: int
    known: int = 0
    block: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", max(self.block, self.gamma + 1))
        if self.slots < max(self.limits) + self.block:
            raise ValueError(
                f"{self.slots} slots cannot hold {max(self.limits)} tokens and {self.block} of "
                "slack"
            )

    @classmethod
    def for_batch(
        cls,
        lengths: Sequence[int],
        ends: Sequence[int],
        gamma: int,
        *,
        max_length: int,
        block: int = 0,
        turning_point: int | None = None,
        known: int = 0,
        least: int = 0,
        grows: bool = False,
    ) -> Self:
        """The plan of a batch that the engine runs.

        The slots follow from the padded prompts, so that prompts within one bucket get equal
        caches, and leave slack for any usual γ, so that AR and S3D get equal caches as well.

        Args:
            lengths: tokens of each prompt.
            ends: tokens at which each row ends, of at most `max_length`.
            gamma: γ.
            max_length: tokens that a row may have.
            block: see the class.
            turning_point: where LongRoPE changes all keys (`RopeConfig.turning_point`): a row that
                passes it stops one token later, to be prefilled again (`again`).
            known: see the class.
            least: slots that a cache which is taken over already has.
            grows: whether later batches take over the cache, with longer and longer texts. Such a
                cache has fewer and larger sizes, since each size needs all programs again.
        """
        limits = [_next_limit(n, end, turning_point) for n, end in zip(lengths, ends, strict=True)]
        begun = [(n, end - n, known) for n, end in zip(lengths, ends, strict=True)]
        begun += [(at, end - at, 0) for at, end in zip(limits, ends, strict=True) if at < end]
        needed = [padded_length(n, before) + new for n, new, before in begun]
        slack = max(_USUAL_SLACK, gamma + 1, block)
        if grows:  # 1024, 2048, 4096, ...; the last size has room for a prefill from any place
            longest = max_length + PREFILL_BUCKETS[-1]
            size = _FIRST_GROWING
            while size < min(max(needed), longest) + slack:
                size *= 2
        else:
            longest = max(max_length, *(padded_length(n, before) for n, _, before in begun))
            size, power_of_two = 64, True  # 64, 96, 128, 192, 256, ...
            while size < min(max(needed), longest) + slack:
                size = size * 3 // 2 if power_of_two else size // 3 * 4
                power_of_two = not power_of_two
        # Multiples of 64 leave no rest that products would compute in another way
        # (`attention_scores`).
        slots = -(-min(size, longest + slack) // 64) * 64
        return cls(tuple(lengths), tuple(limits), gamma, max(slots, least), known, block)

    def again(self, lengths: Sequence[int], ends: Sequence[int]) -> Self:
        """The plan for prefilling the rows again at new lengths, in the same slots."""
        return dataclasses.replace(self, lengths=tuple(lengths), limits=tuple(ends), known=0)

    @property
    def padded(self) -> tuple[int, ...]:
        """For each row, tokens of the longest prompt that runs the same prefill programs."""
        return tuple(padded_length(n, self.known) for n in self.lengths)

    @property
    def largest_block(self) -> int:
        """Tokens of the largest pass; rings of layers with a window have room for it."""
        return max(PREFILL_BUCKETS[-1], self.block)

    def chunks(self, running: Sequence[bool] | None = None) -> list[int]:
        """Chunk sizes that prefill the longest of the running rows; None is all rows."""
        running = running or [True] * len(self.lengths)
        longest = max(n for n, runs in zip(self.lengths, running, strict=True) if runs)
        return prefill_chunks(longest - 1 - self.known)

    def visible(self, needed: int) -> int:
        """Slots that a program reads where `needed` slots are in use; at most S.

        Powers of two, so that a long generation runs few programs: at most twice what is needed, or
        256 slots.
        """
        visible = _FIRST_VISIBLE
        while visible < needed:
            visible *= 2
        return min(visible, self.slots)

    def visible_to_step(self, used: int) -> int:
        """Slots that an iteration reads where `used` slots are in use before it."""
        return self.visible(used + self.block)

    def cache_bytes(self, config: ModelConfig) -> int:
        """Bytes of the cache of all rows."""
        return len(self.lengths) * cache_bytes(config, self.slots, self.largest_block)


def prefill_chunks(length: int) -> list[int]:
    """Chunk sizes, each one of PREFILL_BUCKETS, that together cover `length` tokens.

    Only the last chunk is padded, so any two lengths within one bucket run the same programs.
    """
    largest = PREFILL_BUCKETS[-1]
    full, rest = divmod(length, largest)
    tail = [next(b for b in PREFILL_BUCKETS if b >= rest)] if rest else []
    return [largest] * full + tail


def padded_length(length: int, known: int = 0) -> int:
    """Tokens of the longest prompt that runs the same prefill programs as one of `length`.

    Caches are sized, and `visible` is chosen, by this and not by the prompt itself, so that prompts
    which share a prefill program share all programs.

    Args:
        length: tokens of the prompt; the last one is not prefilled.
        known: tokens that the cache already holds.
    """
    return known + sum(prefill_chunks(length - 1 - known)) + 1


def _next_limit(length: int, end: int, turning_point: int | None) -> int:
    """Tokens at which a row stops: at its end, or at the token after the turning point."""
    if turning_point is None or length > turning_point:
        return end
    return min(turning_point + 1, end)
