"""What `s3d generate` and `s3d chat` have in common: the model, and how it decodes."""

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any, Literal

from s3d_jax.drafters import registry
from s3d_jax.errors import InputError
from s3d_jax.settings.arguments import add_options, build, given
from s3d_jax.settings.drafting import parse_leaves, parse_skip
from s3d_jax.settings.options import option
from s3d_jax.settings.sampling import SamplingConfig

if TYPE_CHECKING:
    from s3d_jax.lm import LM


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Arguments of `load`."""

    draft_model: str | None = option(
        None,
        "of two-model: native checkpoint of a smaller model with the same vocabulary",
        metavar="DIR",
    )
    draft: str | None = option(
        None,
        "which of the trained drafts; s3d info lists them",
        metavar="NAME",
        shown="the fastest that s3d tune --drafts found on this device, else the one called "
        '"default", or the only one',
    )
    max_length: int | None = option(None, "tokens per row at most", shown="the model's")
    dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        None, "cast the weights while loading"
    )
    kv_cache: Literal["int8"] | None = option(
        None,
        "hold the keys and values of texts in int8, with a scale for each token and key head",
        shown="the weights' float type",
    )
    mesh: str | None = option(
        None,
        'several devices: "model=4" divides matrices and cache over 4, "data=2,model=2" also the '
        "rows of a batch over 2; s3d info says what a mesh divides",
        metavar="AXES",
        shown="one device",
    )


@dataclasses.dataclass(frozen=True)
class _Decoding:
    """Arguments of `generate` except the sampling settings."""

    gamma: int | None = option(
        None,
        "draft tokens per iteration",
        metavar="G",
        shown="what s3d tune chose for this device, else the draft's own; 4 for other methods",
    )
    skip: str | None = option(
        None,
        'layers that the draft skips: "2-5", "2,3,6"',
        metavar="LAYERS",
        shown="what s3d tune chose for this device, else the draft's own; of self-spec the middle "
        "half, of early-exit the last half",
    )
    leaves: str | None = option(
        None,
        'of s3d: other candidates that are verified beside the draft tokens, "2+1": two for the '
        "first, one for the second",
        metavar="N+N",
        shown="what s3d tune chose for this device, unless --gamma or --skip is given; else none",
    )
    adaptive: bool | None = option(
        None, "of s3d: decode plainly for a while where drafting does not pay", shown="yes"
    )
    copies: bool | None = option(
        None,
        "of s3d: copy what followed, without a draft pass, where the text repeats itself",
        shown="as --adaptive",
    )
    ngram: int | None = option(
        None, "of prompt-lookup: how many of the last tokens are looked for at most", shown="3"
    )
    max_new_tokens: int = option(128, "tokens to generate at most")
    seed: int = option(0, "of sampling", metavar="S")
    stop: tuple[str, ...] = option((), "ends a text; may be repeated", metavar="TEXT")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds --model."""
    parser.add_argument(
        "--model",
        metavar="DIR",
        help="native checkpoint folder, as written by s3d-convert (default: the small model that "
        "comes with the package)",
    )


def add_decoding(parser: argparse.ArgumentParser) -> None:
    """Adds the group "decoding"."""
    group = parser.add_argument_group("decoding")
    group.add_argument(
        "--method",
        choices=registry.method_names(),
        default=registry.DEFAULT,
        help=f"what drafts (default: {registry.DEFAULT}). "
        + "; ".join(f"{name}: {what}" for name, what in registry.summaries().items()),
    )
    for settings in (_Decoding, SamplingConfig, ModelOptions):
        add_options(group, settings)


def load_model(arguments: argparse.Namespace, *, use_draft: bool = True) -> "LM":
    """The model that the options name.

    Args:
        arguments: `ModelOptions` among them.
        use_draft: as in `load`.

    Raises:
        InputError: a draft model for a method that has none; else as `load`.
    """
    from s3d_jax.lm import load

    options = given(ModelOptions, arguments)
    if "draft_model" in options and getattr(arguments, "method", "two-model") != "two-model":
        raise InputError("--draft-model is for --method two-model")
    return load(arguments.model, **options, use_draft=use_draft, progress=True)


def decoding_options(arguments: argparse.Namespace, lm: "LM") -> dict[str, Any]:
    """Keyword arguments of `generate` and `conversation`.

    Raises:
        InputError: --skip names layers that the model does not have, or --leaves is no such list.
    """
    options = dataclasses.asdict(build(_Decoding, arguments))
    if options["skip"] is not None:
        options["skip"] = parse_skip(options["skip"], lm.config.num_layers)
    if options["leaves"] is not None:
        options["leaves"] = parse_leaves(options["leaves"])
    return {"method": arguments.method, **options, **given(SamplingConfig, arguments)}
