"""The command `s3d-convert`, also `python -m convert`."""

import argparse
import collections
import dataclasses
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from convert.options import ConversionOptions, VerificationOptions
from s3d_jax import __version__
from s3d_jax.errors import S3DError
from s3d_jax.settings.arguments import RAW, Parser, add_options, build, json_stdout, prepare_streams

if TYPE_CHECKING:
    from convert.parity import Parity
    from convert.plan import DryRun, TensorEntry
    from convert.to_native import ConversionReport
    from convert.verification import Verification
    from s3d_jax.settings.model import ModelConfig

_MAX_ARRAYS = 20  # that differ, and are named

_DESCRIPTION = """\
Converts a language model to the native checkpoint of s3d_jax:

  s3d-convert HF_DIR_OR_ID OUT_DIR                from Hugging Face (or a .gguf or llama2.c file)
  s3d-convert NATIVE_DIR OUT_DIR --quantize int8  from a native checkpoint, to int8
  s3d-convert inspect HF_DIR_OR_ID                list the tensors, and what each becomes
  s3d-convert verify NATIVE_DIR HF_DIR_OR_ID      measure how far the two differ (or a file)
  s3d-convert export NATIVE_DIR OUT_DIR           back to a Hugging Face folder

Works tensor by tensor, so a model larger than the memory can be converted. OUT_DIR appears when it
is complete, or not at all."""

_EPILOG = """\
examples:
  s3d-convert HuggingFaceTB/SmolLM-135M models/smollm
  s3d-convert ~/Llama-2-7b-chat-hf models/llama2 --dtype bfloat16
  s3d-convert --dry-run microsoft/Phi-3-mini-4k-instruct models/phi3
  s3d-convert ~/Llama-2-7b-chat-hf models/llama2-int8 --quantize int8
  s3d-convert stories260K.bin models/stories --tokenizer path/to/tokenizer_folder
  s3d-convert export models/smollm smollm-hf --max-shard-size 500MB"""

_EXPORT_DESCRIPTION = """\
Writes a Hugging Face folder (config.json, safetensors, tokenizer) from a native checkpoint. Float
weights are the same bit for bit. A quantised checkpoint is written in its dtype, as the
numbers that its integers and scales stand for, which 16 bits round once more."""

_EXPORT_EPILOG = """\
examples:
  s3d-convert export models/smollm smollm-hf
  s3d-convert export models/llama2 llama2-hf --max-shard-size 2GB"""

_INSPECT_DESCRIPTION = """\
Lists the tensors of a model: name, dtype, shape, file, and the native array that each goes into
(with its place there), or why it is not needed. Reads config.json, the index and the headers of the
files that are there, but no weights. Fetches only config and index of a model on the hub.

Exit code: 0, or 1 if tensors are missing, unknown, or of a wrong shape or dtype."""

_INSPECT_EPILOG = """\
examples:
  s3d-convert inspect ~/Llama-2-7b-chat-hf
  s3d-convert inspect microsoft/Phi-3-mini-4k-instruct --json"""

_VERIFY_DESCRIPTION = """\
Runs a native checkpoint, and its original in HF transformers, over the same tokens, and compares
the logits. The tokens are a text's where the checkpoint has a tokenizer, else random. One model is
in memory at a time. Needs torch: pip install 's3d-jax[torch]'.

Of a GGUF or llama2.c file, settings and weights are compared first, bit for bit, without torch.

Exit code: 0 if weights agree and the KL divergence is within --max-kl, else 1."""

_VERIFY_EPILOG = """\
examples:
  s3d-convert verify models/smollm HuggingFaceTB/SmolLM-135M
  s3d-convert verify models/smollm2 SmolLM2-135M-Instruct.Q4_1.gguf
  s3d-convert verify models/phi3 ~/Phi-3-mini-4k-instruct --dtype bfloat16 --json"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        The exit code: 0 done, 1 faults were found, 2 wrong input, 130 interrupted.
    """
    prepare_streams()
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = {"export": _export, "inspect": _inspect, "verify": _verify}
    try:
        if arguments and arguments[0] in commands:
            return commands[arguments[0]](arguments[1:])
        return _convert(arguments)
    except S3DError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has seen enough
        sys.stderr.close()
        return 141


def _convert(argv: list[str]) -> int:
    parser = _parser("s3d-convert", _DESCRIPTION, _EPILOG)
    parser.add_argument("--version", action="version", version=f"s3d_jax {__version__}")
    parser.add_argument(
        "source",
        metavar="HF_DIR_OR_ID",
        help="a folder, an id on the hub such as HuggingFaceTB/SmolLM-135M, a GGUF file, a "
        "llama2.c .bin file, or a native checkpoint",
    )
    parser.add_argument("out", metavar="OUT_DIR", help="the native checkpoint folder to write")
    add_options(parser, ConversionOptions)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="say what would be read and written, and how much memory and disk that takes; write "
        "nothing, and need no more than config.json and the index",
    )
    arguments = parser.parse_args(argv)
    options = build(ConversionOptions, arguments)
    if arguments.dry_run:
        from convert.plan import dry_run

        planned = dry_run(arguments.source, arguments.out, options)
        if options.progress:
            _print_dry_run(planned, arguments.out)
        return 0
    from convert.to_native import write_native

    report = write_native(arguments.source, arguments.out, options)
    if options.progress:
        _print_report(report)
    if report.tokenizer_problem:  # to stderr, and if quiet too: a part of the model is useless
        print(
            f"warning: {report.tokenizer_problem}. The weights are converted; the model works with "
            "token ids only",
            file=sys.stderr,
        )
    if report.config.dtype == "float16" and report.config.overflows_float16:
        print(
            "warning: models of Gemma's kind overflow in float16: convert with --dtype bfloat16",
            file=sys.stderr,
        )
    if (loss := report.loss) is not None and loss.kl > loss.acceptable_kl:
        better = "--quantize int8 or " if report.config.quantization != "int8" else ""
        better = "--quantize blocks, " * arguments.source.endswith(".gguf") + better
        print(
            f"warning: the KL divergence from the float weights is {loss.kl:.2g} nats, above "
            f"{loss.acceptable_kl}, so the text will often differ: convert with {better}--dtype "
            "bfloat16",
            file=sys.stderr,
        )
    return 0


def _print_dry_run(found: "DryRun", out: str) -> None:
    print(
        f"{found.name}: {found.model_type}, {found.num_params:,} parameters, to be written in "
        f"{found.config.precision}"
    )
    where = dict.fromkeys(found.remote, ", to be downloaded") | dict.fromkeys(
        found.absent, ", not here: what it holds is taken from config.json and the index"
    )
    for file, size in found.files.items():
        print(f"  read       {file}: {_size(size)}{where.get(file, '')}")
    print(f"  read       of these, {_size(found.num_read)} of weights")
    for line in _counted(found.unneeded):
        print(f"  skip       {line} (s3d-convert inspect lists them)")
    if found.wrappers:
        print(f"  leave out  {', '.join(found.wrappers)} of the names of tensors")
    if found.ignored_fields:
        print(f"  pass       {', '.join(found.ignored_fields)} of config.json, not understood")
    if found.drafts:
        print(f"  drafts     {', '.join(found.drafts)}")
    print(f"  tokenizer  {', '.join(found.tokenizer) or 'none: the model would take token ids'}")
    print(
        f"  write      {out}: {_size(found.num_written)}; the disk has {_size(found.num_free)} free"
    )
    print(f"  memory     about {_size(found.memory)}")
    print("a dry run: nothing was written")


def _counted(unneeded: Mapping[str, str]) -> list[str]:
    """Counts the tensors of each reason."""
    reasons = collections.Counter(unneeded.values())
    return [f"{n} tensor{'s'[: n > 1]}: {reason}" for reason, n in reasons.items()]


def _size(num_bytes: int | None) -> str:
    if num_bytes is None:
        return "of unknown size"
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"


def _inspect(argv: list[str]) -> int:
    parser = _parser("s3d-convert inspect", _INSPECT_DESCRIPTION, _INSPECT_EPILOG)
    parser.add_argument(
        "source",
        metavar="HF_DIR_OR_ID",
        help="a folder, an id on the hub, a .gguf or a llama2.c .bin",
    )
    add_options(parser, ConversionOptions, ["revision", "ignore_fields"])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    from convert.plan import inspect

    with json_stdout(arguments.json) as out:
        options = build(ConversionOptions, arguments)
        target, entries = inspect(arguments.source, options.revision, options.ignore_fields)
        model_type, num_params = target.origin.model_type, target.num_params
        faults = sum(entry.is_fault for entry in entries)
        if arguments.json:
            tensors = [dataclasses.asdict(entry) for entry in entries]
            facts = {"model_type": model_type, "num_params": num_params, "num_faults": faults}
            print(json.dumps(facts | {"tensors": tensors}, indent=1), file=out)
        else:
            _print_entries(entries)
            if wrappers := target.origin.wrappers:
                print(f"left out of the names of tensors: {', '.join(wrappers)}")
            arrays, used = len(target.origin.table), sum(e.native is not None for e in entries)
            print(
                f"{model_type}, {num_params:,} parameters: {used} tensors make up {arrays} native "
                f"arrays; {len(entries) - used - faults} are not needed, {faults} at fault"
            )
    return 1 if faults else 0


def _print_entries(entries: Sequence["TensorEntry"]) -> None:
    rows = [("tensor", "dtype", "shape", "file", "becomes")]
    for entry in entries:
        becomes = f"{entry.native}{entry.slice}" if entry.native else "not needed"
        if entry.reason:
            becomes = f"FAULT: {entry.reason}" if entry.is_fault else f"{becomes}: {entry.reason}"
        shape = "?" if entry.shape is None else str(list(entry.shape))
        name = entry.name if entry.name.isprintable() else repr(entry.name)
        rows.append((name, entry.dtype or "?", shape, entry.file or "-", becomes))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(x.ljust(width) for x, width in zip(row, widths, strict=True)).rstrip())


def _verify(argv: list[str]) -> int:
    parser = _parser("s3d-convert verify", _VERIFY_DESCRIPTION, _VERIFY_EPILOG)
    parser.add_argument("native", metavar="NATIVE_DIR", help="a native checkpoint folder")
    parser.add_argument(
        "source",
        metavar="HF_DIR_OR_ID",
        help="what it was converted from: a folder, a hub id, a .gguf or a llama2.c .bin",
    )
    add_options(parser, VerificationOptions)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    from convert.verification import verify_with

    options = build(VerificationOptions, arguments)
    with json_stdout(arguments.json) as out:
        verification = verify_with(arguments.native, arguments.source, options)
        if arguments.json:
            facts = dataclasses.asdict(verification) | {"agrees": verification.agrees}
            print(json.dumps(facts, indent=1), file=out)
        else:
            _print_verification(verification, arguments)
    return 0 if verification.agrees else 1


def _print_verification(verification: "Verification", arguments: argparse.Namespace) -> None:
    verdict = "agrees" if verification.agrees else "DIFFERS"
    print(
        f"{arguments.native} ({verification.native_dtype}) against {arguments.source} "
        f"({' and '.join(verification.stored_dtypes)}):"
    )
    if (stored := verification.stored) is not None:
        for line in stored.settings:
            print(f"  another setting: {line}")
        equal = stored.num_arrays - len(stored.arrays)
        print(f"  weights the same bit for bit   {equal} of {stored.num_arrays} arrays")
        for path, difference in itertools.islice(stored.arrays.items(), _MAX_ARRAYS):
            how = "missing, or of another shape" if difference is None else f"by {difference:.1e}"
            print(f"    {path} differs: {how}")
    if (parity := verification.parity) is None:
        print(f"  logits                         not compared: {verification.parity_skipped}")
        print(f"{verdict}: of settings and weights, which count as the same if they are equal")
        return
    print(
        f"  ours in {parity.dtype} against HF transformers in {parity.reference}, {_what(parity)}:"
    )
    _print_parity(parity)
    if parity.hf_rounding:
        print(f"  HF's own rounding: HF in {parity.dtype} against HF in {parity.reference}:")
        _print_parity(parity.hf_rounding)
    print(f"{verdict}: a KL divergence up to {verification.max_kl:.0e} counts as the same model")


def _print_parity(parity: "Parity") -> None:
    print(f"    largest difference of a logit  {parity.max_difference:.1e}")
    print(f"    mean difference of a logit     {parity.mean_difference:.1e}")
    print(f"    KL divergence from HF          {parity.kl:.1e} nats")
    print(f"    same greedy token              {parity.greedy_agreement:.1%} of the positions")


def _what(parity: "Parity") -> str:
    return f"{parity.num_tokens} {'tokens of text' if parity.is_text else 'random tokens'}"


def _print_report(report: "ConversionReport") -> None:
    has_none = "; no tokenizer, so it works with token ids only (--tokenizer DIR takes one along)"
    tokenizer = "" if report.tokenizer else has_none
    print(
        f"{report.out}: {report.num_params:,} parameters in {report.config.precision}, "
        f"{report.num_bytes / 2**20:,.1f} MiB{tokenizer}"
    )
    if report.drafts:
        print(f"trained drafts that came along: {', '.join(report.drafts)}")
    if report.config.quantization:
        _print_loss(report)
    for line in _counted(report.unneeded):
        print(f"not converted: {line}")
    if report.wrappers:
        print(f"left out of the names of tensors: {', '.join(report.wrappers)}")
    if report.ignored_fields:
        print(f"not understood, and passed: {', '.join(report.ignored_fields)} of config.json")
    if (parity := report.parity) is None:
        print(f"parity with HF transformers: not measured, {report.parity_skipped}")
    else:
        print(
            f"parity with HF transformers in {parity.reference}, ours in {parity.dtype}, "
            f"{_what(parity)}: {_shortly(parity)}"
        )
        if parity.hf_rounding:
            print(
                f"  HF's own rounding to {parity.dtype}: {_shortly(parity.hf_rounding)} "
                "(--dtype float32 rounds nothing)"
            )
        elif report.is_rounded:
            stored = " and ".join(report.stored_dtypes)
            print(
                f"  these differences include the rounding of the weights from {stored} to "
                f"{_rounded_to(report.config)}"
            )
    if report.tokenizer:
        print(f'next: s3d generate "Once upon a time" --model {report.out}')
    else:
        print(f"next: s3d info --model {report.out}")


def _rounded_to(config: "ModelConfig") -> str:
    """Blocks are kept: what is rounded are floats."""
    return config.dtype if config.quantization == "blocks" else config.precision


def _shortly(parity: "Parity") -> str:
    return (
        f"largest difference of a logit {parity.max_difference:.1e}, same greedy token at "
        f"{parity.greedy_agreement:.1%} of the positions"
    )


def _print_loss(report: "ConversionReport") -> None:
    loss, precision = report.loss, report.config.precision
    if loss is None:
        print(f"what {precision} costs: not measured, {report.loss_skipped}")
        return
    tokens = f"{loss.num_tokens:,} random tokens"
    if loss.perplexity is not None:
        before, after = loss.perplexity
        tokens = f"{loss.num_tokens:,} tokens of text, perplexity {before:.3f} -> {after:.3f}"
    print(
        f"{precision} against {report.config.dtype}: {tokens}, KL divergence {loss.kl:.1e} nats, "
        f"same greedy token at {loss.greedy_agreement:.1%} of the positions"
    )


def _export(argv: list[str]) -> int:
    parser = _parser("s3d-convert export", _EXPORT_DESCRIPTION, _EXPORT_EPILOG)
    parser.add_argument("native", metavar="NATIVE_DIR", help="a native checkpoint folder")
    parser.add_argument("out", metavar="OUT_DIR", help="the Hugging Face folder to write")
    parser.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        default="5GB",
        help="limit each safetensors file to this, such as 500MB (default: 5GB)",
    )
    add_options(parser, ConversionOptions, ["overwrite", "progress"])
    arguments = parser.parse_args(argv)
    options = build(ConversionOptions, arguments)
    from convert.to_hf import export

    out = export(
        arguments.native,
        arguments.out,
        max_shard_size=arguments.max_shard_size,
        overwrite=options.overwrite,
        progress=options.progress,
    )
    if options.progress:
        print(f"{out}: load it by transformers.AutoModelForCausalLM.from_pretrained({str(out)!r})")
    return 0


def _parser(name: str, description: str, epilog: str) -> Parser:
    return Parser(prog=name, description=description, epilog=epilog, formatter_class=RAW)


if __name__ == "__main__":
    sys.exit(main())
