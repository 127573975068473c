"""Settings of sampling: how one row chooses its next token."""

import dataclasses
import math
from typing import Any

from s3d_jax.settings.options import option
from s3d_jax.settings.records import Record, check, is_finite, is_integer

_LARGEST = 1e30  # of a temperature, bias or penalty: what they are multiplied to fits float32
_PENALTY: Any = dict(least=-_LARGEST, most=_LARGEST)


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

    temperature: float = option(0.0, "0 is greedy", metavar="T", least=0, most=_LARGEST)
    top_k: int = option(0, "0 is off", metavar="K", least=0, below=2**31)
    top_p: float = option(1.0, "1 is off", metavar="P", above=0, most=1)
    min_p: float = option(0.0, "0 is off", metavar="P", least=0, most=1)
    repetition_penalty: float = option(1.0, "1 is off", metavar="R", least=1e-6, most=1e6)
    presence_penalty: float = option(0.0, "0 is off", metavar="P", **_PENALTY)
    frequency_penalty: float = option(0.0, "0 is off", metavar="P", **_PENALTY)
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
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
