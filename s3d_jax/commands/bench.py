"""The command `s3d bench`."""

import argparse
import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s3d_jax.drafters import registry
from s3d_jax.errors import InputError

if TYPE_CHECKING:
    from s3d_jax.bench.contestants import Contestant
    from s3d_jax.lm import LM

_DEFAULT_METHODS = "ar,s3d,prompt-lookup,self-spec,early-exit"
_CALIBRATION_PROMPTS = 4

_DESCRIPTION = """\
Runs prompts through several methods in one process, in turns, greedily and one at a time, and
prints what each is worth: speed with and without prefill, time to the first token, compile time, τ
and acceptance, improvement over plain decoding, whether the output is the same, memory."""

_EPILOG = """\
methods: s3d, ar, prompt-lookup, self-spec, early-exit, two-model (with --draft-model); and on the
same weights HF transformers, where torch is installed: hf, hf-prompt-lookup. A method runs with the
settings that are fastest on a few of the prompts, or with those given: s3d:gamma=4, or
self-spec:gamma=2:skip=3-6, or prompt-lookup:gamma=4:ngram=2; s3d:gamma=4:adaptive=no always drafts.
Several settings are several rows.

examples:
  s3d bench --plot bench.png
  s3d bench --methods ar,s3d:gamma=2,s3d:gamma=6 --suite stories
  s3d bench --model models/smollm --suite mt_bench.jsonl --limit 4 --methods s3d,prompt-lookup,hf"""


def add_command(commands: Any) -> None:
    """Adds `bench` to the subparsers of `s3d`."""
    parser = commands.add_parser(
        "bench",
        help="measure the methods against each other",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", metavar="DIR", help="native checkpoint folder (default: the embedded model)"
    )
    parser.add_argument(
        "--draft-model", metavar="DIR", help="of two-model: a smaller one of the same vocabulary"
    )
    parser.add_argument("--draft", metavar="NAME", help="which of the trained drafts")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument(
        "--suite",
        action="append",
        metavar="NAME|FILE",
        help="stories, dialogues, code, or a .jsonl(.gz) file of MT-Bench, Spec-Bench, HumanEval, "
        "GSM8K or your own; may be repeated (default: stories and dialogues)",
    )
    parser.add_argument(
        "--methods", default=_DEFAULT_METHODS, metavar="LIST", help=f"default: {_DEFAULT_METHODS}"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="prompts of each category at most")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: 128")
    parser.add_argument(
        "--repeats", type=int, default=3, metavar="N", help="turns that count (default: 3)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and no table")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw a PNG (needs matplotlib)")
    parser.set_defaults(run=run)


def parse_methods(text: str) -> list[tuple[str, dict[str, Any]]]:
    """ "s3d:gamma=4,ar" -> [("ar", {}), ("s3d", {"gamma": 4})]; plain decoding is always first.

    Raises:
        InputError: a method or a setting that does not exist.
    """
    from s3d_jax.bench.contestants import EXTERNAL

    known = (*registry.method_names(), *EXTERNAL)
    chosen: list[tuple[str, dict[str, Any]]] = [("ar", {})]
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, *settings = entry.split(":")
        if name not in known:
            raise InputError(f"--methods names {name!r}; known are {', '.join(known)}")
        fixed = {"ar": (), "hf": (), "hf-prompt-lookup": ("gamma",)}
        own = fixed[name] if name in fixed else registry.option_names(name)
        pairs = [_parse_setting(setting, entry, own) for setting in settings]
        options = dict(pairs)
        if len(options) < len(pairs):
            raise InputError(f"--methods: {entry!r} says the same setting twice: give several rows")
        if name in fixed and (foreign := sorted(set(options) - set(own))):
            raise InputError(f"--methods: {name} has no {', '.join(foreign)}, got {entry!r}")
        if (name, options) not in chosen:
            chosen.append((name, options))
    return chosen


def _parse_setting(text: str, entry: str, own: Sequence[str]) -> tuple[str, Any]:
    """ "gamma=4" -> ("gamma", 4); `own` are the options of the method."""
    name, _, value = text.partition("=")
    try:
        if name in ("gamma", "ngram") and int(value) >= 1:
            return name, int(value)
        if name == "adaptive":
            return name, {"yes": True, "no": False}[value]
        if name == "skip":
            first, _, last = value.partition("-")
            if layers := range(int(first), int(last or first) + 1):
                return name, layers
        if name in set(own) - {"gamma", "ngram", "adaptive", "skip"} and value:
            return name, int(value) if value.isdecimal() else value
    except (ValueError, KeyError):
        pass
    raise InputError(
        f"--methods: {entry!r} is not understood; settings are gamma=4, ngram=3, "
        "skip=3-6 and adaptive=no"
    )


def run(arguments: argparse.Namespace) -> int:
    import jax
    from tqdm import tqdm

    from s3d_jax.bench import measure, report
    from s3d_jax.lm import EMBEDDED, load
    from s3d_jax.machine import peak_memory_bytes, peak_memory_kind, reset_peak_memory
    from s3d_jax.texts.suites import read_suites

    methods = parse_methods(arguments.methods)
    for name in ("limit", "max_new_tokens", "repeats"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if arguments.plot:
        report.check_plot(arguments.plot)
    lm = load(
        arguments.model,
        dtype=arguments.dtype,
        draft=arguments.draft,
        draft_model=arguments.draft_model,
        progress=True,
    )
    was_reset = reset_peak_memory()  # loading may have needed more than what is kept of it
    loaded = peak_memory_bytes()
    suites = arguments.suite or ["stories", "dialogues"]
    room = lm.max_length - arguments.max_new_tokens
    prompts = read_suites(suites, lm, room, arguments.limit)
    with contextlib.ExitStack() as stack:
        candidates = _candidates(lm, Path(arguments.model or EMBEDDED), methods, stack)
        sample = prompts[:: -(-len(prompts) // _CALIBRATION_PROMPTS)]
        with tqdm(candidates, desc="calibrating", disable=None, leave=False) as bar:
            chosen = [measure.fastest(group, sample, arguments.max_new_tokens) for group in bar]
        # Else programs that several share would be in nobody's compile time, or in that of one who
        # is not the first to need them, and those of the losers in the peak of memory.
        lm.programs.clear()
        jax.clear_caches()
        contestants = _different(chosen)
        runs = len(contestants) * len(prompts) * (1 + arguments.repeats)
        with tqdm(total=runs, desc="measuring", unit=" runs", disable=None, leave=False) as bar:
            records = measure.take_turns(
                contestants,
                prompts,
                arguments.max_new_tokens,
                arguments.repeats,
                lambda: bar.update() and None,
            )
    found = {
        "about": report.about(),
        "model": Path(arguments.model or EMBEDDED).name,
        "precision": lm.config.precision,
        "suites": suites,
        "max_new_tokens": arguments.max_new_tokens,
        "repeats": arguments.repeats,
        "loaded_memory_bytes": loaded,
        "memory_is": peak_memory_kind(was_reset),
        "rows": measure.summary(contestants, prompts, records, arguments.max_new_tokens),
    }
    print(json.dumps(found) if arguments.json else report.table(found))
    if arguments.plot:
        report.draw(found, arguments.plot)
    return 0


def _different(contestants: list["Contestant"]) -> list["Contestant"]:
    """Each once: what was chosen may be what was given in another entry."""
    found: list[Contestant] = []
    for one in contestants:
        if all((one.method, one.in_full()) != (c.method, c.in_full()) for c in found):
            found.append(one)
    return found


def _candidates(
    lm: "LM",
    folder: Path,
    methods: list[tuple[str, dict[str, Any]]],
    stack: contextlib.ExitStack,
) -> list[list["Contestant"]]:
    """For each entry of --methods those of whom the fastest will run.

    Raises:
        InputError, ConfigError: settings that the method does not have, or that are wrong; torch or
            a second model is missing.
    """
    from s3d_jax.bench.contestants import EXTERNAL, HuggingFace, Ours, hf_model

    groups: list[list[Contestant]] = []
    hf = None
    for method, given in methods:
        if method in EXTERNAL:
            hf = hf or stack.enter_context(hf_model(folder, lm.config.dtype))
            lookups = [{"gamma": g} for g in (3, 10)] if method == "hf-prompt-lookup" else [{}]
            groups.append([HuggingFace(method, s, lm, hf) for s in ([given] if given else lookups)])
            continue
        if "skip" in given:
            layers, last = lm.config.num_layers, given["skip"][-1]
            if last >= layers:
                raise InputError(
                    f"--methods: {method} is to skip layer {last}; the model has layers 0 to "
                    f"{layers - 1}"
                )
            given["skip"] = tuple(i in given["skip"] for i in range(layers))
        settings = [given] if given else registry.candidates(lm.target, method)
        for options in settings:
            registry.choose(lm.target, method, **options)
        groups.append([Ours(method, options, lm) for options in settings])
    return groups
