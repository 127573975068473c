"""Validation: acceptance in actual decoding of held-out prompts, and perplexity."""

import functools
import math
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from s3d_jax.errors import InputError
from s3d_jax.jax_settings import under_usual_jax_settings
from s3d_jax.lm import LM
from s3d_jax.mesh import mesh_of, on_mesh
from s3d_jax.nn.features import in_memory
from s3d_jax.nn.streams import target_stream
from s3d_jax.settings.drafting import DraftConfig, FeatureConfig
from s3d_jax.settings.model import ModelConfig
from s3d_jax.texts.documents import Document
from s3d_jax.train.data import Rows
from s3d_jax.train.objective import Mean, next_token_loss
from s3d_jax.weights.trees import Params


def held_out_prompts(
    documents: Sequence[Document], count: int, length: int, max_length: int
) -> list[np.ndarray]:
    """The prompts of held-out documents: their own, or the beginnings of texts.

    Args:
        documents: held-out ones.
        count: prompts at most, evenly from all documents.
        length: tokens of a prompt, where the document does not have a prompt of its own.
        max_length: tokens that the model is made for; prompts without room for a new one are left
            out, with a warning that counts them.

    Raises:
        InputError: none is left.
    """
    sizes = [d.prompt_tokens or min(length, len(d.tokens) - 1) for d in documents]
    prompts = [d.tokens[:n] for d, n in zip(documents, sizes, strict=True) if n >= 1]
    fitting = [prompt for prompt in prompts if len(prompt) < max_length]
    if not fitting:
        raise InputError(
            f"none of the {len(documents)} held-out documents can be decoded: a prompt needs a "
            f"token and must be shorter than the model's {max_length}: give others (--valid)"
        )
    if missing := len(prompts) - len(fitting):
        warnings.warn(
            f"{missing} of {len(prompts)} held-out prompts are left out: they have no room for a "
            f"new token within the model's {max_length}",
            stacklevel=2,
        )
    prompts = fitting
    chosen = np.linspace(0, len(prompts), min(count, len(prompts)), endpoint=False)
    return [prompts[int(i)] for i in chosen]


class HeldOutDecoding:
    """Decodes prompts with the weights and the draft of each call, compiled once.

    Args:
        prompts: ids.
        new_tokens: to decode per prompt.
        make_lm: makes the model from its weights.
        draft_config: of the draft.
        kind: of the draft, which names the method.
    """

    def __init__(
        self,
        prompts: Sequence[np.ndarray],
        new_tokens: int,
        make_lm: Callable[[Params], LM],
        draft_config: DraftConfig | FeatureConfig,
        kind: str = "s3d",
    ) -> None:
        self._prompts, self._new_tokens, self._make_lm = prompts, new_tokens, make_lm
        self._draft_config, self._kind = draft_config, kind
        self._lm: LM | None = None  # one for all calls: it keeps the compiled programs

    def measure(self, params: Params, draft: Any) -> dict[str, Any]:
        """The report of `measure_acceptance`, of a draft of the kind with float arrays."""
        self._lm = lm = self._lm or self._make_lm(params)
        lm.params = params
        if isinstance(self._draft_config, DraftConfig):
            lm.draft_config, lm.draft_params = self._draft_config, draft
        else:
            draft = in_memory(lm.config, params, draft)
            lm.feature_drafts = {self._kind: (self._draft_config, draft)}
        report = measure_acceptance(lm, self._prompts, self._new_tokens, self._kind)
        self._lm.params = {}  # else trained weights stay in memory until the next validation
        return report


def measure_acceptance(
    lm: LM,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    method: str = "s3d",
    **options: Any,
) -> dict[str, Any]:
    """Decodes the prompts in one batch.

    Args:
        lm: the model with the draft to measure.
        prompts: ids.
        max_new_tokens: per prompt.
        method: that drafts in every iteration.
        **options: of `LM.generate`.

    Returns:
        tokens_per_iteration: τ over all prompts together, new tokens over iterations;
        acceptance_per_position: how often the draft token at each position was accepted;
        prompts, new_tokens: what it was measured on.

    Raises:
        NumericalError: the model's logits are no numbers.
    """
    if method == "s3d":
        options["adaptive"] = False
    results = lm.generate(list(prompts), max_new_tokens=max_new_tokens, method=method, **options)
    for result in results:
        result.check()
    iterations = sum(r.stats.iterations for r in results)
    tokens = sum(r.stats.new_tokens for r in results)
    accepted = np.sum([r.stats.accepted_per_position for r in results], axis=0)
    return {
        "tokens_per_iteration": tokens / max(iterations, 1),
        "acceptance_per_position": (accepted / max(iterations, 1)).tolist(),
        "prompts": len(results),
        "new_tokens": tokens,
    }


def made_worse(before: float, after: float, what: str, run: str | os.PathLike[str]) -> str | None:
    """Says that training has made a draft worse, which is not stored then; None if it has not.

    Args:
        before, after: τ before training, and of the trained draft.
        what: which draft `before` belongs to.
        run: the run's folder.
    """
    if after >= before:
        return None
    return (
        f"the trained draft makes {after:.2f} tokens per iteration, {what} {before:.2f}: it is not "
        f"stored. The run is kept in {run}: train longer (--resume with more --steps), or begin "
        "another run with a lower --learning-rate, or with data that is more like the prompts "
        "(s3d distill)"
    )


def warn_if_useless(before: float, after: float, draft: DraftConfig | FeatureConfig) -> None:
    """Warns when the trained draft barely beats the untrained one.

    Args:
        before, after: τ of the untrained and of the trained draft.
        draft: its settings.
    """
    ways = "Train longer, "
    if isinstance(draft, DraftConfig):
        ways += "skip fewer layers, " if any(draft.skip) else ""
        ways += "use --mode adapter with a higher rank, "
    # One token of τ is the bonus, to which the draft contributes nothing. A draft that gets nine in
    # ten tokens accepted is always good.
    if after - 1 < min(max(1.2 * (before - 1), 0.1), 0.9 * draft.gamma):
        warnings.warn(
            f"the trained draft makes {after:.2f} tokens per iteration, the untrained one "
            f"{before:.2f}: it has learnt next to nothing, and drafting will be slower than plain "
            f"decoding. {ways}or use data that is more like the prompts (s3d distill)",
            stacklevel=2,
        )


@functools.partial(jax.jit, static_argnames="config")
def _next_token_loss(
    config: ModelConfig, params: Params, tokens: jax.Array, learn: jax.Array
) -> Mean:
    logits, _ = target_stream(config, params, tokens, tokens.shape[1])
    return next_token_loss(logits, tokens, learn)


@under_usual_jax_settings
def perplexity(config: ModelConfig, params: Params, rows: Rows, batch_size: int = 8) -> float:
    """exp of the mean cross-entropy of the tokens that are learnt.

    Args:
        config, params: the target.
        rows: held-out text.
        batch_size: rows per pass.
    """
    total, count = 0.0, 0.0
    for start in range(0, len(rows), batch_size):
        part = slice(start, start + batch_size)
        tokens, learn = rows.tokens[part], rows.learn[part]
        missing = batch_size - len(tokens)  # padded, so that one program serves all passes
        tokens = np.pad(tokens, ((0, missing), (0, 0)))
        learn = np.pad(learn, ((0, missing), (0, 0)))
        with on_mesh(mesh_of(params)):
            mean = _next_token_loss(config, params, tokens, learn)
        total, count = total + float(mean.total), count + float(mean.weight)
    return math.exp(total / max(count, 1))
