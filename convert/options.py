"""What can be asked of a conversion: defaults, and the help texts of `s3d-convert`."""

import dataclasses
import os
from typing import TYPE_CHECKING, Literal, TypeAlias

from s3d_jax.settings.model import DTYPES, QUANTIZATIONS
from s3d_jax.settings.options import option
from s3d_jax.settings.records import Checked, check

if TYPE_CHECKING:
    Dtype: TypeAlias = str
    Quantization: TypeAlias = str
else:
    Dtype, Quantization = Literal[DTYPES], Literal[tuple(QUANTIZATIONS)]


@dataclasses.dataclass(frozen=True)
class ConversionOptions(Checked):
    """Options of `convert.convert`, which explains them.

    Raises:
        ConfigError: an option is unknown, or contradicts another one.
    """

    dtype: Dtype | None = option(None, "cast the weights", shown="keep the stored type")
    quantization: Quantization | None = option(
        None,
        "; ".join(f"{name}: {words}" for name, words in QUANTIZATIONS.items())
        + "; also print perplexity and KL divergence against the weights before",
        flag="--quantize",
    )
    text: str | os.PathLike[str] | None = option(
        None,
        "measure these on a .txt or .jsonl file",
        metavar="FILE",
        shown="stories and dialogues of the package",
    )
    tokenizer: str | os.PathLike[str] | None = option(
        None, "take the tokenizer from this folder", metavar="DIR", shown="from the source"
    )
    revision: str | None = option(
        None, "take this branch, tag or commit on the hub", metavar="REV", shown="the main branch"
    )
    ignore_fields: tuple[str, ...] = option(
        (),
        "pass a field of config.json that is not understood, since you know that it has no effect "
        "on what the model computes; may be repeated",
        flag="--ignore-field",
        metavar="NAME",
    )
    overwrite: bool = option(
        False,
        "replace an existing checkpoint: all that OUT_DIR holds is removed, files that you put "
        "there too",
    )
    parity: bool = option(
        True,
        "do not compare at the end: with HF transformers (done where torch is installed), and what "
        "is quantised with the weights it was made from",
        flag="--no-parity",
    )
    progress: bool = option(True, "print errors only", flag="--quiet")

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.text is None or self.quantization is not None,
            "a text is to measure on what quantization costs, and none is asked for",
        )


@dataclasses.dataclass(frozen=True)
class VerificationOptions(Checked):
    """Options of `convert.verify`, which explains them.

    Raises:
        ConfigError: an option is unknown or out of range.
    """

    dtype: Dtype = option(
        "float32", "compute in this type; 16 bits round, and HF's own rounding is shown as well"
    )
    num_tokens: int = option(
        640,
        "compare over this many tokens; short sequences do not show a wrong rotary embedding",
        flag="--tokens",
        least=1,
    )
    max_kl: float | None = option(
        None,
        "accept a KL divergence up to this",
        metavar="NATS",
        shown="1e-6; 1e-2 where 16 bits round weights or computation; 0.5 for int4",
    )
    revision: str | None = option(
        None, "take this branch, tag or commit on the hub", metavar="REV", shown="the main branch"
    )
