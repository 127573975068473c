"""The command `s3d-convert`, also `python -m convert`."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from s3d_jax import __version__
from s3d_jax.errors import S3DError

if TYPE_CHECKING:
    from convert.to_native import Report

_DESCRIPTION = """\
Converts a language model to the native checkpoint of s3d_jax:

  s3d-convert HF_DIR_OR_ID OUT_DIR       from Hugging Face (or a llama2.c .bin file)
  s3d-convert export NATIVE_DIR OUT_DIR  back to a Hugging Face folder

Works tensor by tensor, so a model larger than the memory can be converted. OUT_DIR appears when it
is complete, or not at all."""

_EPILOG = """\
examples:
  s3d-convert HuggingFaceTB/SmolLM-135M models/smollm
  s3d-convert ~/Llama-2-7b-chat-hf models/llama2 --dtype bfloat16
  s3d-convert stories260K.bin models/stories --tokenizer path/to/tokenizer_folder
  s3d-convert export models/smollm smollm-hf --max-shard-size 500MB"""

_EXPORT_DESCRIPTION = """\
Writes a Hugging Face folder (config.json, safetensors, tokenizer) from a native checkpoint. The
weights are the same bit for bit."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0 done, 2 wrong input, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _export(words[1:]) if words[:1] == ["export"] else _convert(words)
    except S3DError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130


def _convert(words: list[str]) -> int:
    parser = _parser("s3d-convert", _DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--version", action="version", version=f"s3d_jax {__version__}")
    parser.add_argument(
        "source",
        metavar="HF_DIR_OR_ID",
        help="a folder, an id on the hub such as HuggingFaceTB/SmolLM-135M, or a llama2.c .bin",
    )
    parser.add_argument("out", metavar="OUT_DIR", help="the native checkpoint folder to write")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="cast the weights (default: as stored)",
    )
    parser.add_argument(
        "--tokenizer", metavar="DIR", help="take the tokenizer from there (default: the source)"
    )
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit on the hub")
    parser.add_argument(
        "--no-parity",
        action="store_true",
        help="do not compare with HF transformers at the end (done where torch is installed)",
    )
    _add_common(parser)
    arguments = parser.parse_args(words)
    from convert.to_native import convert

    report = convert(
        arguments.source,
        arguments.out,
        dtype=arguments.dtype,
        tokenizer=arguments.tokenizer,
        revision=arguments.revision,
        overwrite=arguments.overwrite,
        parity=not arguments.no_parity,
        progress=not arguments.quiet,
    )
    if not arguments.quiet:
        _print_report(report)
    if report.tokenizer_problem:  # to stderr, and if quiet too: a part of the model is of no use
        print(
            f"warning: {report.tokenizer_problem}. The weights are converted; the model works with "
            "token ids only",
            file=sys.stderr,
        )
    return 0


def _print_report(report: "Report") -> None:
    tokenizer = "" if report.tokenizer else "; no tokenizer, so it works with token ids only"
    print(
        f"{report.out}: {report.num_params:,} parameters in {report.config.dtype}, "
        f"{report.num_bytes / 2**20:,.1f} MiB{tokenizer}"
    )
    if report.parity is None:
        print(f"parity with HF transformers: not measured, {report.parity_skipped}")
    else:
        print(
            f"parity with HF transformers in float32, {report.parity.num_tokens} tokens: largest "
            f"difference of a logit {report.parity.max_difference:.1e}, same greedy token at "
            f"{report.parity.greedy_agreement:.1%} of the positions"
        )
        if report.is_rounded:
            stored = " and ".join(report.stored_dtypes)
            print(
                f"  these differences include the cast of the weights from {stored} to "
                f"{report.config.dtype}; convert with --dtype float32 to see them without it"
            )
    if report.tokenizer:
        print(f'next: s3d generate "Once upon a time" --model {report.out}')
    else:
        print(f"next: s3d info --model {report.out}")


def _export(words: list[str]) -> int:
    parser = _parser("s3d-convert export", _EXPORT_DESCRIPTION)
    parser.add_argument("native", metavar="NATIVE_DIR", help="a native checkpoint folder")
    parser.add_argument("out", metavar="OUT_DIR", help="the Hugging Face folder to write")
    parser.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        default="5GB",
        help="per safetensors file, like 500MB (default: 5GB)",
    )
    _add_common(parser)
    arguments = parser.parse_args(words)
    from convert.to_hf import export

    out = export(
        arguments.native,
        arguments.out,
        max_shard_size=arguments.max_shard_size,
        overwrite=arguments.overwrite,
        progress=not arguments.quiet,
    )
    if not arguments.quiet:
        print(f"{out}: load it by transformers.AutoModelForCausalLM.from_pretrained({str(out)!r})")
    return 0


def _parser(name: str, description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=name,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an existing checkpoint: all that OUT_DIR holds is removed, files that you "
        "put there too",
    )
    parser.add_argument("--quiet", action="store_true", help="print errors only")


if __name__ == "__main__":
    sys.exit(main())
