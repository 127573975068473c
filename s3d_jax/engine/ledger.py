"""What a generation will need of a device's memory, computed before anything is loaded."""

import dataclasses
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
from s3d_jax.engine.runner import BYTES_PER_SLOT
from s3d_jax.jax_settings import under_usual_jax_settings
from s3d_jax.keys import seeded_keys
from s3d_jax.nn.draft import DraftParams, untrained_draft, with_head
from s3d_jax.nn.transformer import abstract_params, weight_bytes
from s3d_jax.settings.drafting import DraftConfig
from s3d_jax.settings.model import ModelConfig
from s3d_jax.settings.sampling import SamplingConfig
from s3d_jax.weights.base import num_bytes

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
        scratch: of the program that needs most of it, prefill or decoding, as compiled for this
            machine's device in float32.
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


Drafting = tuple[DraftConfig, DraftParams | None]  # S3D's settings; None: an untrained draft


def ledger(config: ModelConfig, plan: SlotPlan, drafting: Drafting | None, scratch: int) -> Ledger:
    """The ledger of one model, from shapes alone.

    Args:
        config: the model.
        plan: the sizes of the batch.
        drafting: the draft; None for plain decoding.
        scratch: from `scratch_bytes`.
    """
    params, more = abstract_params(config), 0
    if drafting is not None:
        draft = _abstract_draft(config, params, drafting)
        more = num_bytes(draft)
        if is_merged(config, params, draft):
            more += merged_bytes(params, draft) - num_bytes(draft.deltas)
    rows = len(plan.lengths)
    return Ledger(
        precision=config.precision,
        weights=weight_bytes(config),
        draft=more,
        cache=plan.cache_bytes(config) + rows * plan.slots * BYTES_PER_SLOT,
        scratch=scratch,
    )


@under_usual_jax_settings
def scratch_bytes(config: ModelConfig, plan: SlotPlan, drafting: Drafting | None) -> int:
    """Temporary memory of the programs of a batch, which are compiled for this.

    In float32, whatever the model's precision: CPUs widen 16-bit weights in temporary memory, and
    GPUs do not.
    """
    config = config.unquantized().replace(dtype="float32")
    prompts = [np.ones(n, np.int32) for n in plan.lengths]
    rows = len(prompts)
    keys = seeded_keys(np.zeros(rows, np.uint32), np.zeros(rows, np.uint32))
    sampling, _ = batch_sampling([SamplingConfig()] * rows, keys, config.vocab_size)
    spec = DecodeSpec(
        config,
        None if drafting is None else S3D(drafting[0].replace(gamma=plan.gamma)),
        SamplingFeatures(),
    )
    params = abstract_params(config)
    draft = None if drafting is None else _abstract_draft(config, params, drafting)
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
    return max(m.temp_size_in_bytes for m in memory)


def _abstract_draft(config: ModelConfig, params: Any, drafting: Drafting) -> DraftParams:
    """The shapes of a draft's arrays as they are loaded, before deltas are merged."""

    def loaded(params: Any) -> DraftParams:
        draft = drafting[1] or untrained_draft(config, params)
        draft = jax.tree.map(
            lambda x: x.astype(config.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, draft
        )
        return with_head(config, params, draft)

    return jax.eval_shape(loaded, params)
