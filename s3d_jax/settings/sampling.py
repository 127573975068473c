"""Settings of sampling: how one row chooses its next token."""

import dataclasses
import math

from s3d_jax.settings.options import option
from s3d_jax.settings.records import Record, check, is_finite, is_integer, is_positive

_LARGEST = 1e30  # of a temperature, bias or penalty: what they are multiplied to fits float32


@dataclasses.dataclass(frozen=True)
class SamplingConfig(Record):
    """How one row's next token is chosen from its logits. The defaults are greedy decoding.

    Applied in this order, in float32: logit bias, repetition penalty, frequency and presence
    penalty; then temperature, top-k, top-p, min-p.

    Attributes:
        temperature: 0 is greedy (argmax); otherwise logits are divided by it.
        top_k: keep the k most likely tokens (ties at the border are kept); 0 keeps all.
        top_p: keep the smallest set of most likely tokens whose probability reaches top_p; 1 keeps
            all.
        min_p: keep tokens at least min_p times as likely as the most likely one; 0 keeps all.
        repetition_penalty: logits of tokens in prompt or output are divided (if > 0) or
            multiplied (if < 0) by it (Keskar et al., arXiv 1909.05858); 1 is off.
        presence_penalty, frequency_penalty: subtracted from the logits of tokens in the output,
            once or per occurrence (as in the OpenAI API); 0 is off.
        logit_bias: (token id, bias) pairs, added to the logits; -inf forbids a token.

    Temperature, biases and penalties are bounded, so that no step of it leaves float32.
    """

    temperature: float = option(0.0, "0 is greedy", metavar="T")
    top_k: int = option(0, "0 is off", metavar="K")
    top_p: float = option(1.0, "1 is off", metavar="P")
    min_p: float = option(0.0, "0 is off", metavar="P")
    repetition_penalty: float = option(1.0, "1 is off", metavar="R")
    presence_penalty: float = option(0.0, "0 is off", metavar="P")
    frequency_penalty: float = option(0.0, "0 is off", metavar="P")
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            is_finite(self.temperature) and 0 <= self.temperature <= _LARGEST,
            f"temperature must be a number >= 0, up to 1e30, got {self.temperature!r}",
        )
        check(
            is_integer(self.top_k) and 0 <= self.top_k < 2**31,
            f"top_k must be an integer >= 0 (0 is off), got {self.top_k!r}",
        )
        check(
            is_positive(self.top_p) and self.top_p <= 1,
            f"top_p must be in (0, 1], got {self.top_p!r}",
        )
        check(
            is_finite(self.min_p) and 0 <= self.min_p <= 1,
            f"min_p must be in [0, 1], got {self.min_p!r}",
        )
        check(
            is_finite(self.repetition_penalty) and 1e-6 <= self.repetition_penalty <= 1e6,
            "repetition_penalty must be a number > 0, from 1e-6 to 1e6, "
            f"got {self.repetition_penalty!r}",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            check(
                is_finite(value) and abs(value) <= _LARGEST,
                f"{name} must be a number within ±1e30, got {value!r}",
            )
        self._check_bias()

    def _check_bias(self) -> None:
        pairs = self.logit_bias
        check(
            isinstance(pairs, tuple) and all(isinstance(p, tuple) and len(p) == 2 for p in pairs),
            f"logit_bias must be (token id, bias) pairs, got {pairs!r:.80}",
        )
        for token, bias in pairs:
            known = bias == -math.inf or (is_finite(bias) and abs(bias) <= _LARGEST)
            check(
                is_integer(token) and token >= 0 and known,
                "logit_bias needs (token id >= 0, bias within ±1e30 or -inf) pairs, "
                f"got ({token!r}, {bias!r})",
            )
        check(
            len({token for token, _ in pairs}) == len(pairs),
            f"logit_bias names a token twice, got {pairs!r:.80}",
        )
