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
from s3d_jax.drafters.s3d import drafter_of
from s3d_jax.drafters.stored import is_merged, merged_bytes
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
_SHARE = 0.75  # of a card, which jax takes unless XLA_CLIENT_MEM_FRACTION says otherwise


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

    def fits_share(self, card: str) -> bool:
        """Whether the part of one of CARDS that jax takes by default has room for it."""
        return self.total <= _SHARE * CARDS[card] * 2**30


def plan_of(context: int, batch: int, gamma: int, max_length: int, block: int = 0) -> SlotPlan:
    """The sizes of rows whose prompts fill half of the context.

    Args:
        context: tokens of a row, prompt and output together.
        batch: rows.
        gamma: γ; 0 for plain decoding.
        max_length: tokens that a row may have.
        block: slots that an iteration writes, where these are more than γ+1.
    """
    prompts, ends = [max(1, context // 2)] * batch, [context] * batch
    return SlotPlan.for_batch(prompts, ends, gamma, max_length=max_length, block=block)


BYTES_PER_SLOT = 8  # of `DecodeState.tokens` and `passes`

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
        if is_merged(config, params, drafting[0], draft):
            more += merged_bytes(params, draft) - num_bytes(draft.deltas)
    rows = len(plan.lengths)
    return Ledger(
        precision=config.precision,
        weights=weight_bytes(config),
        draft=more,
        cache=plan.cache_bytes(config) + rows * plan.slots * BYTES_PER_SLOT,
        scratch=scratch,
    )


def what_fits(ledger: Ledger, config: ModelConfig, rows: int, slots: int, limit: int | None) -> str:
    """What a batch that got no memory needs, and what would fit instead, in words.

    Args:
        ledger: of the batch.
        config: the model.
        rows, slots: of the batch's caches.
        limit: bytes that jax may use; None if unknown.
    """
    parts = {name: getattr(ledger, name) for name in ("weights", "draft", "cache", "scratch")}
    needs = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items() if size)
    words = f"{_rows(rows)} of {slots:,} tokens in {ledger.precision} need, in GB: {needs}"
    if limit is None:
        return words
    words += f"; jax may use {limit / 1e9:.2f}"
    per_token = ledger.cache / (rows * slots)
    # Scratch grows with the rows, but not with the tokens of a row: this is on the safe side.
    tokens = int((limit - ledger.total + ledger.cache) / per_token)
    if tokens // rows >= slots:
        return f"{words}, some of which others hold, or which is in pieces (start Python again)"
    fitting = [_rows(tokens // slots) + " of that length"] if tokens >= slots else []
    if tokens // rows >= 1:
        fitting.append(f"{_rows(rows)} of {tokens // rows:,} tokens")
    if fitting:
        return f"{words}. It has room for {' or '.join(fitting)}"
    words += ", which has no room for caches next to the rest"
    if config.quantization is None:
        int8 = weight_bytes(config.replace(quantization="int8"))
        words += (
            f"; converted to int8 (s3d-convert --quantize int8), the weights are {int8 / 1e9:.2f}"
        )
    return words


def _rows(count: int) -> str:
    return f"{count} row{'s' * (count != 1)}"


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
        None if drafting is None else drafter_of(drafting[0].replace(gamma=plan.gamma), config),
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
