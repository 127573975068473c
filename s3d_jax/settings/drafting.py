"""Settings of the drafters, what passes cost, and what tuning chose."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from s3d_jax.errors import ConfigError, InputError
from s3d_jax.settings.model import ModelConfig
from s3d_jax.settings.options import option
from s3d_jax.settings.records import Record, check, is_integer, is_list, is_positive, plain

MAX_NGRAM = 64
MAX_LEAVES = 16


def default_name(kind: str) -> str:
    """The name of the draft of a kind that is used unless another is requested."""
    return "default" if kind == "s3d" else kind


def symmetric_skip(num_layers: int, num_skipped: int) -> tuple[bool, ...]:
    """The middle `num_skipped` of `num_layers` layers, as a static skip mask.

    Where the halves cannot be equal, the first half keeps the extra layer. S3D skips symmetrically
    around the middle (arXiv 2405.20314, abstract).
    """
    check(
        0 <= num_skipped < num_layers,
        f"can skip 0 to {num_layers - 1} of {num_layers} layers, not {num_skipped}",
    )
    first = (num_layers - num_skipped + 1) // 2
    return tuple(first <= i < first + num_skipped for i in range(num_layers))


def parse_leaves(text: str) -> tuple[int, ...]:
    """ "2+1" -> (2, 1); "0" is none.

    Raises:
        InputError: it is something else.
    """
    parts = text.replace(" ", "").split("+")
    if not all(part.isdecimal() for part in parts):
        raise InputError(f'--leaves takes numbers like "2+1", got {text!r}')
    return tuple(map(int, parts))


def shown_leaves(leaves: Sequence[int]) -> str:
    """As `parse_leaves` takes them."""
    return "+".join(map(str, leaves)) or "0"


def checked_leaves(leaves: Any, gamma: int) -> tuple[int, ...]:
    """Numbers of leaves beside the first, second, … draft token, without zeros at the end.

    Raises:
        ConfigError: they are no such numbers, too many, or for more than γ draft tokens.
    """
    found = plain(leaves)
    check(
        is_list(found)
        and all(is_integer(n) and n >= 0 for n in found)
        and sum(found) <= MAX_LEAVES,
        "leaves (--leaves) must say how many candidates the first, second, … draft token has "
        f"beside it, {MAX_LEAVES} in all at most, got {leaves!r:.80}",
    )
    while found and not found[-1]:
        found = found[:-1]
    check(
        len(found) <= gamma,
        f"leaves (--leaves) has {len(found)} entries, and there are only {gamma} draft tokens "
        "(gamma, --gamma)",
    )
    return tuple(found)


def parse_skip(text: str, num_layers: int) -> tuple[bool, ...]:
    """A skip mask from "2-5", "2,3,6" or "" (no layer is skipped).

    Raises:
        InputError: it is none of these, or names a layer that the model does not have.
    """
    skipped: set[int] = set()
    try:
        for part in filter(None, text.replace(" ", "").split(",")):
            first, dash, last = part.partition("-")
            layers = range(int(first), int(last if dash else first) + 1)
            if not layers:
                raise ValueError(f"{part} is no range")
            skipped.update(layers)
    except ValueError as error:
        raise InputError(f'--skip takes layers like "2-5" or "2,3,6", got {text!r}') from error
    if skipped and not 0 <= min(skipped) <= max(skipped) < num_layers:
        raise InputError(f"--skip {text}: the model has the layers 0 to {num_layers - 1}")
    return tuple(i in skipped for i in range(num_layers))


@dataclasses.dataclass(frozen=True)
class DraftConfig(Record):
    """How the model drafts for itself.

    Attributes:
        skip: one entry per layer; True means that the draft pass jumps over the layer.
        gamma: draft tokens proposed per iteration (γ), at least 1.
        block_attention: inside the draft block, "causal" or "bidirectional".
        mode: "two-pass" drafts in a pass of its own, before verification. "merged" drafts within
            the verify pass, for the next iteration, and runs all layers.
    """

    skip: tuple[bool, ...]
    gamma: int = 4
    block_attention: Literal["causal", "bidirectional"] = "causal"
    mode: Literal["two-pass", "merged"] = "two-pass"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_gamma(self.gamma)
        check(
            isinstance(self.skip, tuple),
            "skip must be a list with one entry per layer, True where it is skipped (as "
            f"symmetric_skip makes it), got {self.skip!r:.80}",
        )
        check(
            all(isinstance(s, bool) for s in self.skip),
            f"skip must hold only True and False, one for each layer, got {self.skip!s:.80}",
        )
        check(
            not all(self.skip),
            f"skip (--skip) skips all {len(self.skip)} layers; the draft needs at least one",
        )
        check(
            self.mode != "merged" or not any(self.skip),
            "a merged draft runs within the verify pass, through all layers: it skips none (leave "
            "out skip, --skip), or it is two-pass",
        )

    def validate_for(self, config: ModelConfig) -> None:
        """Raises ConfigError unless `skip` has one entry per layer of the model."""
        check(
            len(self.skip) == config.num_layers,
            f"skip has {len(self.skip)} entries, the model has {config.num_layers} layers",
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON. Leaves out the mode "two-pass", the only one that older versions know."""
        fields = super().to_dict()
        if self.mode == "two-pass":
            del fields["mode"]
        return fields

    @property
    def num_masks(self) -> int:
        """Mask tokens of a block; in two passes x_n is an input, and its row predicts as well."""
        return self.gamma - (self.mode == "two-pass")

    @property
    def draft_depth(self) -> float:
        """Fraction of the layers that the draft pass runs (β)."""
        return 1.0 - sum(self.skip) / len(self.skip)


@dataclasses.dataclass(frozen=True)
class PassCosts(Record):
    """What the passes of an S3D iteration cost on a device, in steps of plain decoding.

    Attributes:
        draft: the draft pass of the settings that they belong to.
        verify: the verify pass with w draft tokens, w = 0 … γ. With none it is a step: 1.
    """

    draft: float = option(above=0)
    verify: tuple[float, ...] = option()

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            isinstance(self.verify, tuple)
            and len(self.verify) >= 2
            and all(map(is_positive, self.verify))
            and self.verify[0] == 1,
            "verify must hold the costs of 0, 1, … draft tokens, the first of them 1, got "
            f"{self.verify!r:.80}",
        )

    @classmethod
    def estimated(cls, draft: DraftConfig, bound_by_memory: bool) -> Self:
        """What the passes of S3D cost by the layers that they run, where nothing was measured.

        Args:
            draft: skip and γ.
            bound_by_memory: the device multiplies a few tokens by a weight while it reads it. Then
                a draft pass costs its share of the layers, and a verify pass a step, at the least.
                Otherwise (CPUs in float32 and int8) more, about as much as docs/log
                measured for four and five tokens.
        """
        draft_extra, verify = (0.0, 1.0) if bound_by_memory else (0.15, 1.3)
        return cls(draft.draft_depth + draft_extra, (1.0, *(verify,) * draft.gamma))

    def iteration(self, gamma: int) -> float:
        """The draft pass, and the verify pass with `gamma` draft tokens."""
        return self.draft + self.verify[gamma]


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What S3D does by default on this device, and what it gains.

    Attributes:
        gamma, skip: as in DraftConfig.
        costs: of the passes with these settings.
        improvement_factor: speed over that of plain decoding; below 1, S3D does not pay.
        leaves: of `drafters.s3d.S3D`; `costs.verify[gamma]` includes them.
    """

    gamma: int
    skip: tuple[bool, ...]
    costs: PassCosts
    improvement_factor: float
    leaves: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "skip", DraftConfig(self.skip, self.gamma).skip)  # checks them
        object.__setattr__(self, "leaves", checked_leaves(self.leaves, self.gamma))
        if len(self.costs.verify) != self.gamma + 1:
            raise ConfigError(f"there are no costs for each of 0 … {self.gamma} draft tokens")
        object.__setattr__(self, "improvement_factor", float(self.improvement_factor))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """From JSON.

        Raises:
            ConfigError, KeyError, TypeError, ValueError: it is not what `to_dict` gave.
        """
        return cls(**{**fields, "costs": PassCosts.from_dict(fields["costs"])})

    def to_dict(self) -> dict[str, Any]:
        """For JSON. No leaves are left out: older versions do not know them."""
        fields = dataclasses.asdict(self)
        if not self.leaves:
            del fields["leaves"]
        return fields


@dataclasses.dataclass(frozen=True)
class PromptLookupConfig(Record):
    """How the text so far drafts for itself.

    Attributes:
        gamma: draft tokens proposed per iteration (γ), at least 1.
        ngram: the last tokens that are looked for further up, at most.
    """

    gamma: int = 4
    ngram: int = option(3, least=1, most=MAX_NGRAM)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_gamma(self.gamma)


@dataclasses.dataclass(frozen=True)
class TwoModelConfig(Record):
    """How a second, smaller model drafts.

    Attributes:
        model: the second model; its vocabulary is the target's.
        gamma: draft tokens proposed per iteration (γ), at least 1.
    """

    model: ModelConfig
    gamma: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_gamma(self.gamma)


@dataclasses.dataclass(frozen=True)
class FeatureConfig(Record):
    """How a draft that reads the target's hidden states drafts (`nn.features`).

    Attributes:
        gamma: draft tokens proposed per iteration (γ), at least 1.
    """

    gamma: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_gamma(self.gamma)

    def validate_for(self, config: ModelConfig) -> None:
        """Every model has hidden states."""


@dataclasses.dataclass(frozen=True)
class FeatureSettings(Record):
    """`FeatureConfig` in use.

    Attributes:
        layer: the settings of the arrays that the draft adds (`nn.features.layer_config`).
        gamma: see FeatureConfig.
    """

    layer: ModelConfig
    gamma: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_gamma(self.gamma)


DrafterSettings = DraftConfig | PromptLookupConfig | TwoModelConfig | FeatureSettings


def _check_gamma(gamma: Any) -> None:
    check(
        gamma >= 1,
        f"gamma must be an integer >= 1, got {gamma!r}; for no speculation use method='ar'",
    )
