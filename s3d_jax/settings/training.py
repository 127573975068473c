"""Settings of training and distillation: what `s3d train`, `pretrain` and `distill` take."""

import dataclasses
from typing import Literal

from s3d_jax.settings.drafting import (
    DraftConfig,
    FeatureConfig,
    default_name,
    parse_skip,
    symmetric_skip,
)
from s3d_jax.settings.model import ModelConfig
from s3d_jax.settings.options import option
from s3d_jax.settings.records import Checked, check


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Checked):
    """How the trained weights are updated.

    Optimizers: AdamW (Loshchilov and Hutter, arXiv 1711.05101), Adafactor (Shazeer and Stern,
    1804.04235; it needs the least memory), Lion (Chen et al., 2302.06675).
    """

    steps: int = option(2000, "updates in all", least=1)
    optimizer: Literal["adamw", "adafactor", "lion"] = option("adamw", "update rule")
    learning_rate: float = option(2e-3, "at its peak", metavar="R", above=0)
    schedule: Literal["cosine", "linear", "constant"] = option("cosine", "after the warm-up")
    warmup_steps: int = option(50, "steps in which the learning rate grows from 0", least=0)
    final_fraction: float = option(0.05, least=0, most=1)  # of the peak rate, at the end
    weight_decay: float = option(0.0, "decoupled, on matrices only", least=0)
    clip_norm: float = option(1.0, "largest global norm of the gradient", above=0)
    beta2: float = option(0.99, above=0, below=1)  # decay of the second average of AdamW and Lion

    @property
    def warmup(self) -> int:
        """Updates of the warm-up: `warmup_steps`, or all but the last one of a shorter run."""
        return min(self.warmup_steps, self.steps - 1)


@dataclasses.dataclass(frozen=True)
class LoopConfig(Checked):
    """How a run proceeds."""

    optimizer: OptimizerConfig = OptimizerConfig()
    batch_size: int = option(16, "rows per step", least=1)
    accumulate: int = option(1, "parts that a batch is processed in, to save memory", least=1)
    ema_decay: float = option(
        0.99, "of the running average of the weights that is kept; 0: none", least=0, below=1
    )
    seed: int = option(0, "of everything random", least=0, below=2**32)
    log_every: int = option(10, "steps between lines of metrics.jsonl", least=1)
    save_every: int = option(200, "steps between states; 0: one at the end", least=0)
    validate_every: int = option(200, "steps between validations; 0: at both ends", least=0)
    keep_states: int = option(2, "states that stay on disk", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.batch_size % self.accumulate == 0,
            f"batch_size ({self.batch_size}) must be a multiple of accumulate ({self.accumulate})",
        )


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig(Checked):
    """What draft predictions are trained for.

    "ce" is cross-entropy on the text's own tokens, best where the text is the target's output; "kl"
    the KL divergence of the draft from the target's distribution; "tv" total variation,
    1 - Σ min(p, q), which is one minus the acceptance rate of sampling.

    `decay` is below 1 because the i-th token only counts if all tokens before it were accepted.
    `hop` trains where decoding would continue after a block at a random place, not at the random
    places themselves. Blocks of decoding begin after a token that was hard to guess, so random
    places are too easy; finding the others costs one more draft pass without gradients.
    """

    objective: Literal["ce", "kl", "tv"] = option(
        "ce", "cross-entropy on the text, KL divergence from the target, or total variation"
    )
    decay: float = option(0.85, "the i-th draft token has the weight X^i", above=0, most=1)
    anchors: int = option(16, "draft blocks per row", least=1)
    hop: bool = option(
        True,
        "blocks at random places, not where decoding would begin them: one draft pass less",
        flag="--random-anchors",
    )


@dataclasses.dataclass(frozen=True)
class AdapterConfig(Checked):
    """The size of the draft's low-rank parts."""

    rank: int = option(16, "of the deltas on kept layers; 0: none", least=0)
    bridge_rank: int = option(64, "of the bridges over skipped layers; 0: none", least=0)
    chain_rank: int = option(
        0, "of the correction of each draft token by the one before it; 0: none", least=0
    )
    recall: int = option(
        0,
        "last layers of the model whose values for the token before the block the bridges read; 0: "
        "none",
        least=0,
    )


@dataclasses.dataclass(frozen=True)
class ValidationConfig(Checked):
    """What held-out decoding looks at."""

    prompts: int = option(32, "prompts decoded in a validation", flag="--valid-prompts", least=1)
    prompt_tokens: int = option(16, "length of a prompt that is the beginning of a text", least=1)
    new_tokens: int = option(128, "tokens decoded per prompt", flag="--valid-tokens", least=1)
    held_out: float = option(
        0.02, "share of the documents that is held out without --valid", above=0, below=1
    )


@dataclasses.dataclass(frozen=True)
class RunConfig(Checked):
    """What both kinds of training share."""

    loop: LoopConfig = LoopConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    validation: ValidationConfig = ValidationConfig()
    remat: bool = option(
        False, "compute activations again in the backward pass: less memory, more time"
    )
    row_length: int | None = option(
        None, "tokens per row", shown="chosen, so that nine in ten of the documents fit", least=2
    )


@dataclasses.dataclass(frozen=True)
class TrainDraftConfig(RunConfig):
    """How the draft of a checkpoint is trained.

    Attributes:
        draft: skip, γ, block attention, mode; None is the draft of `start`, else the middle half,
            γ = 4, causal, two-pass. Of other kinds than "s3d" a FeatureConfig.
        adapter: ranks of mode "adapter"; None is `AdapterConfig()`. With `start`, None or a rank of
            0 takes the ranks of that draft; higher ranks add to it.
    """

    kind: Literal["s3d", "eagle", "medusa"] = option("s3d", "the drafter that it is for, see above")
    mode: Literal["adapter", "mask", "full"] = option("adapter", "what is trained, see above")
    name: str | None = option(
        None,
        "of the draft in the checkpoint",
        metavar="NAME",
        shown='"default", or the --kind if that is not s3d',
    )
    start: str | None = option(
        None,
        "continue from this draft of the model, with its block attention, mode and vocabulary; a "
        "higher --rank, --bridge-rank, --chain-rank or --recall adds to it, --gamma may differ, "
        "and with another --skip it needs new bridges: fit them, with --fit-rows",
        metavar="NAME",
    )
    out: str | None = option(None, "mode full: folder of the new checkpoint", metavar="DIR")
    dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        None, "of the frozen target in training", shown="as stored"
    )
    vocabulary: int | None = option(
        None,
        "tokens that can be drafted, the most frequent ones of the data: a smaller head to read",
        flag="--draft-vocab",
        metavar="N",
        shown="all",
        least=2,
    )
    fit_rows: int = option(
        0,
        "rows of the data by which new bridges are fitted, by least squares, to the layers that "
        "they stand for, before training, in half as many directions as --bridge-rank, or what "
        "joins the inputs of kind eagle; 0: bridges start without effect",
        least=0,
    )
    next_token_weight: float = option(
        1.0, "mode full: of the target's own loss, added to the draft's", metavar="W", least=0
    )
    draft: DraftConfig | FeatureConfig | None = None
    adapter: AdapterConfig | None = None

    @property
    def draft_name(self) -> str:
        """`name`, or what stands for it."""
        return self.name or default_name(self.kind)


@dataclasses.dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """How a small model is trained from scratch.

    Attributes:
        draft: also teaches the model to draft, and stores that draft; None does not.
        adapter: ranks of that draft.
    """

    row_length: int = option(256, "tokens per row", least=2)
    compute_dtype: Literal["float32", "bfloat16"] = option(
        "float32",
        "of matrix products and activations; bfloat16 is mixed precision, faster where the device "
        "multiplies it faster",
    )
    tokenizer: str | None = option(
        None, "folder of a tokenizer", metavar="DIR", shown="one is trained on the data"
    )
    draft_weight: float = option(
        0.2, "of the draft's loss, added to the next-token loss", metavar="W", least=0
    )
    draft: DraftConfig | None = None
    adapter: AdapterConfig = AdapterConfig()


@dataclasses.dataclass(frozen=True)
class DraftOptions(Checked):
    """The shape of a draft as options of the command line."""

    gamma: int = option(DraftConfig.gamma, "draft tokens per iteration", metavar="G")
    skip: str | None = option(
        None, 'skipped layers: "2-5", "2,3,6"', metavar="LAYERS", shown="the middle half"
    )
    block_attention: Literal["causal", "bidirectional"] = option(
        DraftConfig.block_attention, "inside the draft block"
    )
    draft_mode: Literal["two-pass", "merged"] = option(
        DraftConfig.mode,
        "a draft pass of its own, or mask tokens within the verify pass, through all layers",
    )

    def config(self, num_layers: int) -> DraftConfig:
        """The draft of a model of so many layers; wrong ones raise InputError or ConfigError."""
        num_skipped = 0 if self.draft_mode == "merged" else num_layers // 2
        skip = symmetric_skip(num_layers, num_skipped)
        if self.skip is not None:
            skip = parse_skip(self.skip, num_layers)
        return DraftConfig(skip, self.gamma, self.block_attention, self.draft_mode)


@dataclasses.dataclass(frozen=True)
class SizesConfig(Checked):
    """The shape of a model that is trained from scratch."""

    vocab_size: int = option(4096, "tokens of the vocabulary", least=1)
    layers: int = option(8, "number of layers", least=1)
    width: int = option(256, "of the residual stream", least=1)
    heads: int = option(8, "attention heads", least=1)
    kv_heads: int = option(4, "heads of keys and values", least=1)
    mlp_width: int | None = option(None, "feed-forward", shown="3 times the width", least=1)
    dtype: Literal["float32", "bfloat16"] = option(
        "bfloat16", "of the checkpoint; the trained weights are float32"
    )

    def model_config(self, row_length: int) -> ModelConfig:
        """The model, for texts of twice the row length; wrong sizes raise ConfigError."""
        check(
            self.width % self.heads == 0,
            f"--width {self.width} must be a multiple of --heads {self.heads}",
        )
        return ModelConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.width,
            intermediate_size=self.mlp_width or 3 * self.width,
            num_layers=self.layers,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.width // self.heads,
            max_position_embeddings=2 * row_length,
            tie_embeddings=True,
            dtype=self.dtype,
        )


@dataclasses.dataclass(frozen=True)
class DistillConfig(Checked):
    """How a model continues prompts, to train its draft on the outcome."""

    max_new_tokens: int = option(256, "tokens per continuation", least=1)
    batch_size: int = option(32, "prompts at once", least=1)
    sampled_fraction: float = option(0.5, "share that is sampled, not greedy", least=0, most=1)
    temperature: float = option(1.0, "of the sampled ones")
    top_p: float = option(1.0, "of the sampled ones")
    seed: int = option(0, "of sampling, and of the choice of prompts", least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            not self.sampled_fraction or self.temperature > 0,
            f"temperature must be above 0, got {self.temperature}: for greedy continuations alone "
            "set sampled_fraction (--sampled-fraction) to 0",
        )


@dataclasses.dataclass(frozen=True)
class PromptsConfig(Checked):
    """Which parts of documents are prompts to be continued."""

    limit: int | None = option(None, "prompts at most", shown="all", least=1)
    prompt_tokens: int = option(16, "tokens of a text that are its prompt", least=1)
    whole_prompts: bool = option(False, "take texts as prompts as a whole")
    longest: int | None = option(
        None,
        "leave out prompts of more tokens, before --limit: each row of a batch reads a cache of "
        "the longest one's size",
        flag="--longest-prompt",
        metavar="N",
        shown="any length",
        least=1,
    )
