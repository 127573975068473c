"""Small random models and exact references that several tests share."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import s3d_jax
from s3d_jax.decoding.adaptive import Budget, new_budget
from s3d_jax.decoding.prefill import prefill
from s3d_jax.decoding.sampling import SamplingParams, batch_sampling
from s3d_jax.decoding.sizes import SlotPlan, prefill_chunks
from s3d_jax.decoding.state import DecodeSpec, DecodeState, Proposal, init_state
from s3d_jax.decoding.step import decode_jit, statistics
from s3d_jax.drafters.base import Drafter
from s3d_jax.drafters.s3d import S3D
from s3d_jax.drafters.stored import read_draft
from s3d_jax.lm import EMBEDDED, LM
from s3d_jax.nn.draft import untrained_draft
from s3d_jax.nn.transformer import forward_logits, init_params
from s3d_jax.settings.drafting import DrafterSettings, PassCosts
from s3d_jax.settings.model import ModelConfig
from s3d_jax.settings.sampling import SamplingConfig
from s3d_jax.weights.trees import Params, widen_tree

# Options of `generate` for three prompts, which need different parts of the sampling code.
OF_THREE_ROWS = {
    "greedy": dict(),
    "mixed": dict(temperature=[0.0, 0.8, 1.2], top_k=9, repetition_penalty=1.3, seed=7),
    "biased": dict(logit_bias={4: 1.0, 6: -100.0}, presence_penalty=0.5),
}


def tiny_config(**changes) -> ModelConfig:
    sizes = dict(vocab_size=31, hidden_size=24, intermediate_size=40, num_layers=4)
    heads = dict(num_heads=6, num_kv_heads=2, head_dim=10, max_position_embeddings=128)
    return ModelConfig(**(sizes | heads | changes))


def tiny_params(config: ModelConfig, seed: int = 0, scale: float = 8.0) -> Params:
    """Random weights, large enough that the distributions are far from uniform."""
    params = init_params(config, jax.random.key(seed))
    return jax.tree.map(lambda x: x * scale if x.ndim == 2 else x, params)


def tiny_lm(seed: int = 0, **changes) -> LM:
    config = tiny_config(**changes)
    return LM(config, tiny_params(config, seed))


def embedded_in_float() -> LM:
    """The embedded model, widened to float32.

    For comparisons of passes that differ in more than the length of a block: two int8 steps that
    are rounded apart would else count.
    """
    lm = s3d_jax.load()
    config = lm.config.replace(quantization=None)
    return LM(
        config,
        widen_tree(lm.config, lm.params, config.dtype),
        draft_config=lm.draft_config,
        draft_params=read_draft(EMBEDDED, "default", config).params,
        tokenizer=lm.tokenizer,
        eos_token_ids=lm.eos_token_ids,
    )


def run(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    draft: DrafterSettings | None = None,
    draft_params: Any = None,
    drafter: Callable[[Any], Drafter] = S3D,
    rows: Sequence[SamplingConfig] | None = None,
    seed: int = 0,
    slots: int | None = None,
    stop_ids: tuple[int, ...] = (),
    costs: PassCosts | None = None,
    copies: bool = False,
) -> DecodeState:
    """The pure functions alone, as somebody would use them who jits his own."""
    rows = rows or [SamplingConfig()] * len(prompts)
    keys = jax.random.split(jax.random.key(seed), len(prompts))
    sampling, features = batch_sampling(rows, keys, config.vocab_size)
    chosen = None if draft is None else drafter(draft)
    spec = DecodeSpec(config, chosen, features, copies)
    arrays = [np.asarray(p, np.int32) for p in prompts]
    lengths = tuple(map(len, arrays))
    chunks = prefill_chunks(max(lengths) - 1)
    slots = slots or max(sum(chunks), max(lengths) + new_tokens) + spec.block
    limits = tuple(n + new_tokens for n in lengths)
    plan = SlotPlan(lengths, limits, spec.gamma, slots, block=spec.block)
    if draft is not None and draft_params is None:
        draft_params = untrained_draft(config, params)
    budget = None if costs is None else new_budget(len(prompts), costs.iteration(spec.gamma))
    state = init_state(spec, arrays, plan, sampling, stop_ids=stop_ids, budget=budget)
    state = prefill(spec, params, draft_params, state, arrays, plan)
    return decode_jit(spec, params, draft_params, state, jnp.int32(10**6))


def begin(
    spec: DecodeSpec,
    prompts: Sequence[Sequence[int] | np.ndarray],
    limits: Sequence[int],
    slots: int,
    sampling: SamplingParams,
    stop_ids: Sequence[int] = (),
    budget: Budget | None = None,
) -> DecodeState:
    """The state before prefill."""
    arrays = [np.asarray(p, np.int32) for p in prompts]
    lengths, limits = tuple(map(len, arrays)), tuple(map(int, limits))
    plan = SlotPlan(lengths, limits, spec.gamma, slots, block=spec.block)
    return init_state(spec, arrays, plan, sampling, stop_ids=stop_ids, budget=budget)


def outputs(state: DecodeState, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    tokens, lengths = np.asarray(state.tokens), np.asarray(state.cache.length)
    return [tokens[b, len(p) : lengths[b] + 1].tolist() for b, p in enumerate(prompts)]


def counted(
    state: DecodeState, prompts: Sequence[Sequence[int]], gamma: int
) -> tuple[np.ndarray, np.ndarray]:
    """Iterations [B], and accepted draft tokens [B, γ]."""
    rows = zip(np.asarray(state.passes), prompts, outputs(state, prompts), strict=True)
    counts = [statistics(row, len(p), len(out), gamma) for row, p, out in rows]
    return np.array([c.iterations for c in counts]), np.array([c.accepted for c in counts])


def greedy_reference(
    config: ModelConfig, params: Params, prompt: Sequence[int], new_tokens: int
) -> list[int]:
    """Greedy decoding without cache, loop or batch: the whole sequence again for each token."""
    tokens = list(prompt)
    for _ in range(new_tokens):
        row = np.zeros((1, 64), np.int32)  # one length for all, causality makes the rest harmless
        row[0, : len(tokens)] = tokens
        logits = forward_logits(config, params, jnp.asarray(row))
        tokens.append(int(np.argmax(np.asarray(logits)[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


def drafter_of(tokens_at: Callable[[jax.Array, int], jax.Array]) -> type[Drafter]:
    """A drafter from (position of the first draft token [B], γ) -> tokens [B, γ]."""

    class FromFunction(Drafter):
        def propose(self, inputs) -> Proposal:
            cache = inputs.state.cache
            return Proposal(tokens_at(cache.length + 1, self.gamma), cache)

    return FromFunction
