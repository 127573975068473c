"""The command `s3d`: generate, chat, info; the others are in train, bench and tune."""

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from s3d_jax import __version__
from s3d_jax.commands.bench import add_command as add_bench
from s3d_jax.commands.train import add_commands as add_training
from s3d_jax.commands.tune import add_command as add_tune
from s3d_jax.errors import InputError, S3DError
from s3d_jax.settings.drafting import METHODS

if TYPE_CHECKING:
    from s3d_jax.drafters.stored import Draft
    from s3d_jax.lm import LM
    from s3d_jax.settings.drafting import DraftConfig

_DESCRIPTION = """\
S3D self-speculative decoding: the model drafts several tokens at once with its own middle layers
skipped, then verifies them in one full pass. The text is that of plain decoding, in fewer
passes."""

_GENERATE_EPILOG = """\
examples:
  s3d generate "Once upon a time"
  s3d generate "Once upon a time" "The dog" --model models/smollm --temperature 0.8 --json
  echo "Once upon a time" | s3d generate - --method ar"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0 done, 2 wrong input, 130 interrupted."""
    arguments = _parser().parse_args(argv)
    usual = warnings.formatwarning
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # no lines of source
    try:
        return arguments.run(arguments)
    except S3DError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has seen enough
        sys.stderr.close()
        return 141
    finally:
        warnings.formatwarning = usual


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="s3d", description=_DESCRIPTION, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"s3d_jax {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    generate = commands.add_parser(
        "generate",
        help="continue one or more prompts",
        description="Continues one or more prompts, all in one batch, and prints the texts.",
        epilog=_GENERATE_EPILOG,
        formatter_class=raw,
    )
    generate.add_argument(
        "prompt", nargs="+", metavar="PROMPT", help="a text; - reads standard input"
    )
    _add_model(generate)
    _add_decoding(generate)
    generate.add_argument(
        "--ids",
        action="store_true",
        help='prompts and output are token ids ("1 15 7"), for checkpoints without a tokenizer',
    )
    generate.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object per prompt: text, tokens, finish_reason, stats",
    )
    generate.set_defaults(run=_generate)

    chat = commands.add_parser(
        "chat",
        help="talk with a model that has a chat template",
        description="A conversation in the terminal. Ctrl-C ends an answer, an empty line or "
        "Ctrl-D the conversation. When the context has no room left for an answer, the oldest "
        "turns are forgotten.",
    )
    _add_model(chat)
    _add_decoding(chat)
    chat.add_argument("--system", metavar="TEXT", help="system message to begin with")
    chat.set_defaults(run=_chat)
    add_training(commands)
    add_bench(commands)
    add_tune(commands)

    info = commands.add_parser(
        "info",
        help="what a checkpoint is: shape, size, draft",
        description="Prints what a native checkpoint holds, without loading its weights.",
    )
    _add_model(info)
    info.add_argument("--json", action="store_true", help="print one JSON object")
    info.set_defaults(run=_info)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="DIR",
        help="native checkpoint folder, as written by s3d-convert (default: the small model that "
        "comes with the package)",
    )


def _add_decoding(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("decoding")
    group.add_argument(
        "--method",
        choices=METHODS,
        default="s3d",
        help="who drafts: s3d, the model in one pass (default); ar, nobody: one token per pass; "
        "prompt-lookup, the text so far; self-spec and early-exit, the model without its middle or "
        "last layers, token by token; two-model, a second one",
    )
    group.add_argument(
        "--gamma",
        type=int,
        metavar="G",
        help="draft tokens per iteration (default: what s3d tune chose for this device, else the "
        "draft's own; 4 for other methods)",
    )
    group.add_argument(
        "--adaptive",
        action=argparse.BooleanOptionalAction,
        help="of s3d: decode plainly for a while where drafting does not pay (default: yes)",
    )
    group.add_argument(
        "--ngram",
        type=int,
        metavar="N",
        help="of prompt-lookup: how many of the last tokens are looked for at most (default: 3)",
    )
    group.add_argument(
        "--draft-model",
        metavar="DIR",
        help="of two-model: native checkpoint of a smaller model with the same vocabulary",
    )
    group.add_argument(
        "--draft", metavar="NAME", help="which of the trained drafts (default: s3d info lists them)"
    )
    group.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: 128")
    group.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)"
    )
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="0 is off (default)")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="1 is off (default)")
    group.add_argument("--min-p", type=float, default=0.0, metavar="P", help="0 is off (default)")
    group.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="R", help="1 is off (default)"
    )
    for name in ("presence", "frequency"):
        group.add_argument(
            f"--{name}-penalty", type=float, default=0.0, metavar="P", help="0 is off (default)"
        )
    group.add_argument("--seed", type=int, default=0, metavar="S", help="of sampling (default: 0)")
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="ends a text; may be repeated"
    )
    group.add_argument(
        "--max-length", type=int, metavar="N", help="tokens per row at most (default: the model's)"
    )
    group.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="cast the weights while loading"
    )


def _load(arguments: argparse.Namespace) -> "LM":
    from s3d_jax.lm import load

    if arguments.draft_model is not None and arguments.method != "two-model":
        raise InputError("--draft-model is for --method two-model")
    return load(
        arguments.model,
        dtype=arguments.dtype,
        draft=arguments.draft,
        draft_model=arguments.draft_model,
        max_length=arguments.max_length,
        progress=True,
    )


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    names = """method gamma adaptive ngram max_new_tokens temperature top_k top_p min_p
        repetition_penalty presence_penalty frequency_penalty seed stop"""
    return {name: getattr(arguments, name) for name in names.split()}


def _generate(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    if arguments.prompt.count("-") > 1:
        raise InputError("standard input (-) can be read only once")
    texts = [sys.stdin.read().rstrip("\n") if p == "-" else p for p in arguments.prompt]
    prompts = [_parse_ids(text) for text in texts] if arguments.ids else texts
    lm = _load(arguments)
    total = arguments.max_new_tokens * len(prompts)
    with tqdm(total=total, desc="generating", unit=" tokens", disable=None, leave=False) as bar:
        results = lm.generate(
            prompts, progress=lambda n: bar.update(n - bar.n) and None, **_options(arguments)
        )
    for text, result in zip(texts, results, strict=True):
        if arguments.json:
            print(
                json.dumps(
                    {
                        "prompt": text,
                        "text": result.text,
                        "tokens": result.tokens,
                        "finish_reason": result.finish_reason,
                        "stopped_by": result.stopped_by,
                        "stats": result.stats.to_dict(),
                    }
                )
            )
        elif arguments.ids or result.text is None:
            print(*result.tokens)
        else:
            print(text + result.text)
    if not arguments.json:
        stats = [result.stats for result in results]
        new, iterations = sum(s.new_tokens for s in stats), sum(s.iterations for s in stats)
        seconds = stats[0].decode_seconds
        share = sum(s.plain_iterations for s in stats) / max(iterations, 1)
        plain = f", {share:.0%} of them plain" if arguments.method != "ar" and share else ""
        print(
            f"[{arguments.method}: {new} tokens in {seconds:.2f} s ({new / seconds:.1f}/s), "
            f"{new / max(iterations, 1):.2f} per iteration{plain}; "
            f"prefill {stats[0].prefill_seconds:.2f} s, "
            f"compilation {stats[0].compile_seconds:.1f} s]",
            file=sys.stderr,
        )
    return 0


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError as error:
        raise InputError(f"--ids takes numbers, got {text!r}") from error


def _chat(arguments: argparse.Namespace) -> int:
    conversation = _load(arguments).conversation(arguments.system or None, **_options(arguments))
    interactive = sys.stdin.isatty()
    while True:
        try:
            question = input("> " if interactive else "").strip()
        except EOFError:
            return 0
        if not question:
            return 0
        try:
            for piece in conversation.stream(question):
                print(piece, end="", flush=True)
        except InputError as error:  # the question is refused, and the conversation goes on
            print(f"error: {error}", file=sys.stderr)
            continue
        except KeyboardInterrupt:
            print(" ...", end="")
        print()


def _info(arguments: argparse.Namespace) -> int:
    import jax

    from s3d_jax.decoding.step import PREFILL_BUCKETS
    from s3d_jax.drafters.stored import draft_names, read_draft
    from s3d_jax.lm import EMBEDDED, default_draft
    from s3d_jax.nn import transformer as model
    from s3d_jax.nn.cache import layer_slots
    from s3d_jax.storage import native as checkpoint
    from s3d_jax.storage.tuning import read_entries

    header = checkpoint.read_header(arguments.model or EMBEDDED)
    config = header.config
    drafts = {
        name: _draft_facts(read_draft(header.path, name, config, weights=False))
        for name in draft_names(header.path)
    }
    tuned = read_entries(header.path)
    parameters = model.num_params(config)
    weights = model.weight_bytes(config)
    size = jax.numpy.dtype(config.dtype).itemsize  # numpy's own knows no bfloat16
    per_slot = 2 * config.num_kv_heads * config.head_dim * size
    cache = per_slot * config.num_layers
    context = config.max_position_embeddings
    full_cache = per_slot * sum(layer_slots(config, context, PREFILL_BUCKETS[-1]))
    facts = {
        "model": str(header.path),
        "parameters": parameters,
        "weight_bytes": weights,
        "cache_bytes_per_token": cache,
        "cache_bytes_of_full_row": full_cache,
        "config": config.to_dict(),
        "drafts": drafts,
        "tuning": tuned,
        "tokenizer": header.has_tokenizer,
        "eos_token_ids": list(header.eos_token_ids),
        "generation_config_ignored": header.generation_config_ignored,
        "source": header.source,
    }
    if arguments.json:
        print(json.dumps(facts))
        return 0
    rows = [
        ("model", arguments.model or "the embedded one"),
        ("parameters", f"{parameters:,} in {config.precision}, {weights / 2**20:,.1f} MiB"),
        (
            "shape",
            f"{config.num_layers} layers, width {config.hidden_size}, feed-forward "
            f"{config.intermediate_size}, {config.num_heads} heads / {config.num_kv_heads} "
            f"key-value heads of {config.head_dim}, vocabulary {config.vocab_size}",
        ),
        ("context", f"{config.max_position_embeddings} tokens, rope {config.rope.type}"),
        (
            "cache",
            f"{cache / 1024:,.1f} KiB per token and row; {full_cache / 2**20:,.1f} MiB for a row "
            f"of {context} tokens" + (", with windows" if full_cache < cache * context else ""),
        ),
        *_draft_rows(drafts, default_draft(config)),
        *map(_tuning_row, tuned),
        ("tokenizer", "yes" if header.has_tokenizer else "none: use --ids"),
        ("end of text", ", ".join(map(str, header.eos_token_ids)) or "none"),
    ]
    if header.generation_config_ignored:
        ignored = ", ".join(f"{k}={v}" for k, v in header.generation_config_ignored.items())
        rows.append(("not used", f"from generation_config.json: {ignored} (pass what you want)"))
    for name, value in rows:
        print(f"{name:12} {value}")
    return 0


def _draft_facts(draft: "Draft") -> dict[str, Any]:
    reached = draft.training.get("reached", {})
    return {
        **draft.config.to_dict(),
        "draft_depth": draft.config.draft_depth,
        "parameters": draft.num_params,
        "mode": draft.training.get("mode"),
        "tokens_per_iteration": reached.get("tokens_per_iteration"),
    }


def _draft_rows(
    drafts: dict[str, dict[str, Any]], untrained: "DraftConfig"
) -> list[tuple[str, str]]:
    def layers(skip: Sequence[bool]) -> str:
        return f"layers {[i for i, skipped in enumerate(skip) if not skipped]} of {len(skip)}"

    if not drafts:
        shape = f"{layers(untrained.skip)}, gamma {untrained.gamma}"
        return [("draft", f"untrained, {shape} (s3d train makes one)")]
    rows = []
    for name, facts in drafts.items():
        tau = facts["tokens_per_iteration"]
        reached = "" if tau is None else f", {tau:.2f} tokens per iteration when trained"
        rows.append(
            (
                "draft",
                f"{name}: {layers(facts['skip'])}, gamma {facts['gamma']}, "
                f"{facts['parameters']:,} parameters{reached}",
            )
        )
    return rows


def _tuning_row(entry: dict[str, Any]) -> tuple[str, str]:
    key, tuned = entry["key"], entry["tuning"]
    skipped = [i for i, skip in enumerate(tuned["skip"]) if skip]
    return (
        "tuned",
        f"γ={tuned['gamma']}, layers {skipped} skipped, improvement factor "
        f"{tuned['improvement_factor']:.2f}; {key['dtype']}, draft {key['draft'] or 'untrained'}, "
        f"{key['device']}",
    )
