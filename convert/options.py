"""What can be asked of a conversion. Defaults and help texts of `s3d-convert` are those here."""

import dataclasses
import os
from typing import Any

from s3d_jax.settings.model import DTYPES, QUANTIZATIONS
from s3d_jax.settings.records import check


def _option(default: Any, **argument: Any) -> Any:
    """A field, and the arguments of argparse's `add_argument` for it."""
    return dataclasses.field(default=default, metadata=argument)


def check_dtype(dtype: str | None) -> None:
    """Raises ConfigError unless the dtype is known, or None."""
    check(dtype in (None, *DTYPES), f"dtype {dtype!r} is unknown; known are {DTYPES}")


@dataclasses.dataclass(frozen=True)
class ConversionOptions:
    """Options of `convert.convert`, which explains them.

    Raises:
        ConfigError: an option is unknown, or contradicts another one.
    """

    dtype: str | None = _option(
        None, choices=DTYPES, help="cast the weights (default: keep the stored type)"
    )
    quantization: str | None = _option(
        None,
        flag="--quantize",
        choices=QUANTIZATIONS,
        help="store linear layers, embeddings and head in int8 with one scale per output; print "
        "perplexity and KL divergence against the weights before",
    )
    text: str | os.PathLike[str] | None = _option(
        None,
        metavar="FILE",
        help="measure these on a .txt or .jsonl file (default: stories and dialogues of the "
        "package)",
    )
    tokenizer: str | os.PathLike[str] | None = _option(
        None, metavar="DIR", help="take the tokenizer from this folder (default: from the source)"
    )
    revision: str | None = _option(
        None, metavar="REV", help="take this branch, tag or commit on the hub"
    )
    overwrite: bool = _option(
        False,
        help="replace an existing checkpoint: all that OUT_DIR holds is removed, files that you "
        "put there too",
    )
    parity: bool = _option(
        True,
        flag="--no-parity",
        help="do not compare at the end: with HF transformers (done where torch is installed), and "
        "int8 with the weights it was made from",
    )
    progress: bool = _option(True, flag="--quiet", help="print errors only")

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        check(
            self.quantization in (None, *QUANTIZATIONS),
            f"quantization {self.quantization!r} is unknown; known is {QUANTIZATIONS}",
        )
        check(
            self.text is None or self.quantization is not None,
            "a text is to measure on what quantization costs, and none is asked for",
        )
