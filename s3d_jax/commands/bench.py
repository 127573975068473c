"""The command `s3d bench`."""

import argparse
import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s3d_jax.commands.generation import ModelOptions, add_model, load_model
from s3d_jax.drafters import registry
from s3d_jax.errors import InputError
from s3d_jax.settings.arguments import RAW, add_options, build
from s3d_jax.settings.drafting import parse_leaves
from s3d_jax.settings.options import option
from s3d_jax.settings.records import Checked

if TYPE_CHECKING:
    from s3d_jax.bench.contestants import Contestant
    from s3d_jax.lm import LM
    from s3d_jax.texts.suites import Prompt

_CALIBRATION_PROMPTS = 4
_HF_DTYPES = ("float32", "bfloat16", "float16")

_DESCRIPTION = """\
Runs prompts through several methods in one process, in turns, greedily and one at a time, and
prints for each: speed with and without prefill, time to the first token, compile time, τ and
acceptance, improvement over plain decoding, whether the output is the same, memory."""

_EPILOG = """\
methods: s3d, ar, prompt-lookup, self-spec, early-exit, eagle and medusa (with a draft of that
kind), two-model (with --draft-model); where torch is installed, HF transformers on the same
weights: hf, hf-prompt-lookup; and, where llama-cpp-python is, llama.cpp on --gguf: llama.cpp,
llama.cpp-prompt-lookup. A method runs with the settings that are fastest on a few of the prompts,
or with given ones: s3d:gamma=4, self-spec:gamma=2:skip=3-6, prompt-lookup:gamma=4:ngram=2,
hf:dtype=bfloat16; s3d:gamma=4:adaptive=no always drafts, s3d:copies=no never copies from the text,
and s3d:leaves=2+1 verifies other candidates as well; s3d:draft=NAME, and of eagle and medusa, takes
another draft of the model (on one device). Each setting is a row of its own.

examples:
  s3d bench --plot bench.png
  s3d bench --methods ar,s3d:gamma=2,s3d:gamma=6 --suite stories
  s3d bench --model models/smollm --methods s3d:gamma=4,s3d:gamma=4:draft=deeper,eagle
  s3d bench --model models/smollm --suite mt_bench.jsonl --limit 4 --methods s3d,prompt-lookup,hf
  s3d bench --model models/smollm --methods s3d,hf:dtype=float32,llama.cpp --gguf smollm.gguf"""


@dataclasses.dataclass(frozen=True)
class _Options(Checked):
    suite: tuple[str, ...] = option(
        (),
        "chat, stories, dialogues, code, or a .jsonl(.gz) file of MT-Bench, Spec-Bench, HumanEval, "
        "GSM8K or your own; may be repeated",
        metavar="NAME|FILE",
        shown="chat for a model with a chat template, else stories and dialogues; these for the "
        "model of the package",
    )
    methods: str = option(
        "ar,s3d,prompt-lookup,self-spec,early-exit", "what to measure, see below", metavar="LIST"
    )
    gguf: Path | None = option(
        None, "of llama.cpp: the same model, whatever its quantisation", metavar="FILE"
    )
    limit: int | None = option(None, "prompts of each category at most", shown="all", least=1)
    max_new_tokens: int = option(128, "tokens to generate per prompt", least=1)
    repeats: int = option(3, "turns that are measured", least=1)
    json: bool = option(False, "print one JSON object and no table")
    plot: Path | None = option(None, "draw a PNG (needs matplotlib)", metavar="FILE")


def add_command(commands: Any) -> None:
    """Adds `bench` to the subparsers of `s3d`."""
    parser = commands.add_parser(
        "bench",
        help="measure the methods against each other",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=RAW,
    )
    add_model(parser)
    add_options(parser, ModelOptions, ["draft_model", "draft", "dtype", "kv_cache", "mesh"])
    add_options(parser, _Options)
    parser.set_defaults(run=run)


def parse_methods(text: str) -> list[tuple[str, dict[str, Any]]]:
    """ "s3d:gamma=4,ar" -> [("ar", {}), ("s3d", {"gamma": 4})]; plain decoding is always first.

    Raises:
        InputError: a method or a setting that does not exist.
    """
    from s3d_jax.bench.external import EXTERNAL
    from s3d_jax.drafters.stored import KINDS

    known = (*registry.method_names(), *EXTERNAL)
    fixed = {"ar": (), **EXTERNAL}
    chosen: list[tuple[str, dict[str, Any]]] = [("ar", {})]
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, *settings = entry.split(":")
        if name not in known:
            raise InputError(f"--methods names {name!r}; known are {', '.join(known)}")
        own = fixed[name] if name in fixed else registry.option_names(name)
        pairs = [_parse_setting(setting, entry, own) for setting in settings]
        options = dict(pairs)
        if len(options) < len(pairs):
            raise InputError(f"--methods: {entry!r} has the same setting twice: give several rows")
        if "draft" in options and name not in KINDS:
            raise InputError(f"--methods: {name} has no draft of the model, got {entry!r}")
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
        if name == "dtype" and value in _HF_DTYPES:
            return name, value
        if name in ("adaptive", "copies"):
            return name, {"yes": True, "no": False}[value]
        if name == "skip":
            first, _, last = value.partition("-")
            if layers := range(int(first), int(last or first) + 1):
                return name, layers
        if name == "leaves":
            return name, parse_leaves(value)
        if name == "draft" and value:
            return name, value
        known = {"gamma", "ngram", "adaptive", "copies", "skip", "leaves", "dtype", "draft"}
        if name in set(own) - known and value:
            return name, int(value) if value.isdecimal() else value
    except (ValueError, KeyError, InputError):
        pass
    raise InputError(
        f"--methods: {entry!r} is not understood; settings are gamma=4, ngram=3, "
        "skip=3-6, leaves=2+1, draft=NAME, adaptive=no and copies=no; of hf dtype=float32, "
        "bfloat16 or float16"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measures the methods, and prints the table."""
    import jax
    from tqdm import tqdm

    from s3d_jax.bench import measure, report
    from s3d_jax.bench.contestants import Ours
    from s3d_jax.bench.external import LLAMA_CPP_METHODS, check_llama_cpp
    from s3d_jax.lm import EMBEDDED
    from s3d_jax.machine import peak_memory_bytes, peak_memory_kind, reset_peak_memory
    from s3d_jax.texts.suites import default_suites, read_suites

    options = build(_Options, arguments)
    methods = parse_methods(options.methods)
    if options.plot:
        report.check_plot(options.plot)
    if any(method in LLAMA_CPP_METHODS for method, _ in methods):
        check_llama_cpp(options.gguf)
    elif options.gguf is not None:
        raise InputError("--gguf is for llama.cpp: name it in --methods, or leave --gguf out")
    folder = Path(arguments.model or EMBEDDED)
    lm = load_model(arguments)
    was_reset = reset_peak_memory()  # loading may need more memory than what it keeps
    loaded = peak_memory_bytes()
    room = lm.max_length - options.max_new_tokens
    suites = options.suite or default_suites(lm, folder)
    prompts = read_suites(suites, lm, room, options.limit)
    candidates = _candidates(lm, folder, methods, options, prompts)
    sample = prompts[:: -(-len(prompts) // _CALIBRATION_PROMPTS)]
    with tqdm(candidates, desc="calibrating", disable=None, leave=False) as bar:
        chosen = [measure.fastest(group, sample, options.max_new_tokens) for group in bar]
    # Otherwise the compile time of programs that several methods share counts for none of them or
    # for the wrong one, and the programs of slower settings count in the peak of memory.
    for one in itertools.chain(*candidates):
        if isinstance(one, Ours):
            one.lm.programs.clear()
    jax.clear_caches()
    contestants = _different(chosen)
    runs = len(contestants) * len(prompts) * (1 + options.repeats)
    with tqdm(total=runs, desc="measuring", unit=" runs", disable=None, leave=False) as bar:
        records = measure.take_turns(
            contestants,
            prompts,
            options.max_new_tokens,
            options.repeats,
            lambda: bar.update() and None,
        )
    found = {
        "about": report.about(),
        "model": folder.name,
        "precision": lm.config.precisions,
        "suites": list(suites),
        "max_new_tokens": options.max_new_tokens,
        "repeats": options.repeats,
        "loaded_memory_bytes": loaded,
        "memory_is": peak_memory_kind(was_reset),
        "rows": measure.summary(contestants, prompts, records, options.max_new_tokens),
    }
    if options.json:
        print(json.dumps(found), file=arguments.stdout)
    else:
        print(report.table(found))
    if options.plot:
        report.draw(found, options.plot)
    return 0


def _different(contestants: list["Contestant"]) -> list["Contestant"]:
    """Each contestant once: the fastest setting of one entry may be the given one of another."""
    found: list[Contestant] = []
    for one in contestants:
        if all((one.method, one.in_full()) != (c.method, c.in_full()) for c in found):
            found.append(one)
    return found


def _candidates(
    lm: "LM",
    folder: Path,
    methods: list[tuple[str, dict[str, Any]]],
    options: _Options,
    prompts: Sequence["Prompt"],
) -> list[list["Contestant"]]:
    """The contestants of each entry of --methods, of which the fastest will run.

    Raises:
        InputError, ConfigError: wrong settings, or settings that the method does not have; torch or
            a second model is missing; the GGUF file is of another model.
    """
    from s3d_jax.bench import external
    from s3d_jax.bench.contestants import Ours
    from s3d_jax.drafters.stored import choose_draft
    from s3d_jax.lm import LM, with_draft
    from s3d_jax.mesh import mesh_of

    groups: list[list[Contestant]] = []
    dtypes = [s.get("dtype", lm.config.dtype) for m, s in methods if m in external.HF_METHODS]
    hf = external.hf_models(folder, dict.fromkeys(dtypes)) if dtypes else {}
    llama_cpp: dict[str, Any] = {}
    with_drafts: dict[str, LM] = {}
    for method, given in methods:
        if method in external.HF_METHODS:
            model = hf[given.get("dtype", lm.config.dtype)]
            tried = external.candidates(method, given)
            groups.append([external.HuggingFace(method, s, lm, model) for s in tried])
            continue
        if method in external.LLAMA_CPP_METHODS:
            if method not in llama_cpp:
                assert options.gguf is not None  # check_llama_cpp has seen it
                llama_cpp[method] = external.llama_cpp_model(
                    options.gguf,
                    lm,
                    prompts,
                    options.max_new_tokens,
                    lookup=method == external.LLAMA_CPP_LOOKUP,
                )
            tried = external.candidates(method, given)
            groups.append([external.LlamaCpp(method, s, lm, llama_cpp[method]) for s in tried])
            continue
        if "skip" in given:
            layers, last = lm.config.num_layers, given["skip"][-1]
            if last >= layers:
                raise InputError(
                    f"--methods: {method} is to skip layer {last}; the model has layers 0 to "
                    f"{layers - 1}"
                )
            given["skip"] = tuple(i in given["skip"] for i in range(layers))
        draft = given.pop("draft", None)
        if draft is not None:
            if mesh_of(lm.params) is not None:
                raise InputError("--methods: draft=NAME takes one device, so leave out --mesh")
            choose_draft(folder, draft, method)  # says which drafts of the kind there are
            if draft not in with_drafts:
                with_drafts[draft] = with_draft(lm, folder, draft)
        model = lm if draft is None else with_drafts[draft]
        settings = [given] if given else registry.candidates(model.target, method)
        for one in settings:
            registry.choose(model.target, method, **one)
        groups.append([Ours(method, one, model, draft) for one in settings])
    return groups
