"""What a generation will need of a device's memory, computed before anything is loaded."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from s3d_jax.decoding.prefill import prefill_jit
from s3d_jax.decoding.sampling import SamplingFeatures, batch_sampling
from s3d_jax.decoding.sizes import SlotPlan
from s3d_jax.decoding.state import DecodeSpec, init_state
from s3d_jax.decoding.step import decode_jit
from s3d_jax.drafters.s3d import S3D
from s3d_jax.drafters.stored import is_merged, merged_bytes
from s3d_jax.jax_settings import under_usual_jax_settings
from s3d_jax.keys import seeded_keys
from s3d_jax.nn.draft import DraftParams, untrained_draft, with_head
from s3d_jax.nn.transformer import abstract_params, weight_bytes
from s3d_jax.settings.drafting import DraftConfig
from s3d_jax.settings.model import ModelConfig
from s3d_jax.settings.sampling import SamplingConfig

# GiB that nvidia-smi shows of cards that Colab lends, without what CUDA takes for itself.
CARDS = {"T4": 15.0 - 0.5, "L4": 22.5 - 0.5, "A100": 40.0 - 0.5}


@dataclasses.dataclass(frozen=True)
class Ledger:
    """Bytes of device memory.

    Attributes:
        precision: of the model: "bfloat16", "int8", …
        weights: of the model.
        draft: what the draft adds to them.
        cache: keys and values of all rows, and their tokens.
        scratch: of the program that needs most of it, prefill or decoding.
    """

    precision: str
    weights: int
    draft: int
    cache: int
    scratch: int

    @property
    def total(self) -> int:
        return self.weights + self.draft + self.cache + self.scratch

    def fits(self, card: str) -> bool:
        """Whether one of CARDS has room for it."""
        return self.total <= CARDS[card] * 2**30


def plan_of(context: int, batch: int, gamma: int, max_length: int) -> SlotPlan:
    """The sizes of rows whose prompts fill half of the context.

    Args:
        context: tokens of a row, prompt and output together.
        batch: rows.
        gamma: γ; 0 for plain decoding.
        max_length: tokens that a row may have.
    """
    prompt = max(1, context // 2)
    return SlotPlan.for_batch([prompt] * batch, [context] * batch, gamma, max_length=max_length)


def estimated(
    config: ModelConfig, plan: SlotPlan, drafting: tuple[DraftConfig, DraftParams | None] | None
) -> Ledger:
    """The ledger of one model, from shapes alone.

    Args:
        config: the model.
        plan: the sizes of the batch.
        drafting: S3D's settings and arrays, None for an untrained draft's; None for plain decoding.
    """
    params, draft = abstract_params(config), None
    more = 0
    if drafting is not None:
        draft = jax.eval_shape(lambda p: _loaded(config, p, drafting[1]), params)
        more = _nbytes(draft)
        if is_merged(params, draft):
            more += merged_bytes(params, draft) - _nbytes(draft.deltas)
    rows = len(plan.lengths)
    return Ledger(
        precision=config.precision,
        weights=weight_bytes(config),
        draft=more,
        cache=plan.cache_bytes(config) + 8 * rows * plan.slots,
        scratch=scratch_bytes(config, plan, None if drafting is None else drafting[0], draft),
    )


@under_usual_jax_settings
def scratch_bytes(
    config: ModelConfig, plan: SlotPlan, drafting: DraftConfig | None, draft: DraftParams | None
) -> int:
    """Temporary memory of the programs of a batch, compiled for this machine's device."""
    prompts = [np.ones(n, np.int32) for n in plan.lengths]
    rows = len(prompts)
    keys = seeded_keys(np.zeros(rows, np.uint32), np.zeros(rows, np.uint32))
    sampling, _ = batch_sampling([SamplingConfig()] * rows, keys, config.vocab_size)
    spec = DecodeSpec(
        config,
        None if drafting is None else S3D(drafting.replace(gamma=plan.gamma)),
        SamplingFeatures(),
    )
    params = abstract_params(config)
    state = jax.eval_shape(lambda: init_state(spec, prompts, plan, sampling))
    one = jax.ShapeDtypeStruct((), jnp.int32)
    programs = [
        decode_jit.lower(spec, params, draft, state, one, visible=None, enough=one),
        *(
            prefill_jit.lower(
                config,
                params,
                jax.ShapeDtypeStruct((rows, chunk), jnp.int32),
                state.cache,
                one,
                visible=plan.visible(plan.lengths[0]),
            )
            for chunk in sorted(plan.chunks())[-1:]
        ),
    ]
    memory = [program.compile().memory_analysis() for program in programs]
    for function in (decode_jit, prefill_jit):
        function.clear_cache()  # jax would keep what was traced
    return max(m.temp_size_in_bytes for m in memory)


def _loaded(config: ModelConfig, params: Any, draft: DraftParams | None) -> DraftParams:
    return with_head(config, params, draft or untrained_draft(config, params))


def _nbytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
