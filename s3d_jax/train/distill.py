"""Self-distillation data: the target's own continuations of given prompts."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from s3d_jax.engine.results import Result
from s3d_jax.errors import InputError
from s3d_jax.lm import LM
from s3d_jax.settings.training import DistillConfig, PromptsConfig
from s3d_jax.storage.staging import write_atomically
from s3d_jax.texts.documents import Document
from s3d_jax.train.folder import describe, differences


def prompts_of(documents: Sequence[Document], config: PromptsConfig) -> list[np.ndarray]:
    """The prompts that documents give: their own, or the beginnings of texts.

    Args:
        documents: read with `prompts`.
        config: how many prompts, and how long ones; a text with fewer tokens is used whole.

    Returns:
        int32 [n] each.

    Raises:
        InputError: all prompts are too long.
    """

    def size(document: Document) -> int:
        whole = len(document.tokens)
        length = whole if config.whole_prompts else min(config.prompt_tokens, whole)
        return document.prompt_tokens or length

    prompts = [document.tokens[:n] for document in documents if (n := size(document))]
    if config.longest is not None:
        fitting = [prompt for prompt in prompts if len(prompt) <= config.longest]
        if prompts and not fitting:
            raise InputError(
                f"all {len(prompts)} prompts have more than {config.longest} tokens "
                "(--longest-prompt)"
            )
        prompts = fitting
    return prompts[: config.limit]


def distill(
    lm: LM,
    prompts: Sequence[Sequence[int] | np.ndarray],
    out: str | os.PathLike[str],
    config: DistillConfig = DistillConfig(),
    *,
    identity: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Path:
    """Writes one JSON line per prompt: its "prompt_tokens" and "tokens"; both as text, "prompt" and
    "text" (null without a tokenizer); and the "temperature".

    The lines go to `<out>.partial` as they come, which becomes `out` at the end; the options are in
    `<out>.partial.json`. A call that finds a partial file of the same options continues after its
    last whole line. The outcome is the same, since every prompt has its own seed. (As with any
    batch: without exact sums, two almost equal logits may be rounded into another order.)

    Args:
        lm: the target; its draft, where it has one, makes it faster and changes nothing else.
        prompts: token ids.
        out: the .jsonl file.
        config: how the prompts are continued.
        identity: JSON that tells this target from others; None is its configuration.
        overwrite: replace `out`, and a partial file of other options.
        progress: show a bar.

    Raises:
        NumericalError: the model's logits are no numbers.
        InputError: `out` exists, or cannot be written; a partial file of other options; or prompts
            that cannot be used, noticed before the first one is continued.
    """
    from tqdm import tqdm

    path = Path(out)
    rows = _checked(lm, prompts)
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists: choose another file, or replace it with --overwrite")
    options = {
        "target": dict(identity or {"config": lm.config.to_dict()}),
        "prompts": len(rows),
        "prompts_sha256": _hash(rows),
        **dataclasses.asdict(config),
    }
    if lm.config.kv_cache is not None:
        options["kv_cache"] = lm.config.kv_cache
    partial = _Partial(path, options)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        done = partial.begin(overwrite)
        with (
            partial.path.open("a", encoding="utf-8") as file,
            tqdm(
                total=len(rows),
                initial=done,
                desc="distilling",
                unit=" texts",
                disable=not progress,
            ) as bar,
        ):
            for line in _continued(lm, rows, done, config):
                file.write(json.dumps(line) + "\n")
                file.flush()
                bar.update()
        partial.finish()
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def _continued(
    lm: LM, rows: list[np.ndarray], done: int, config: DistillConfig
) -> Iterator[dict[str, Any]]:
    """The lines of the prompts from number `done`, in order."""
    if done == len(rows):
        return
    numbers = np.arange(done, len(rows))
    # The fractional parts of i·f step over 1 in a share f of all i, evenly spread.
    f = config.sampled_fraction
    sampled = np.floor((numbers + 1) * f) > np.floor(numbers * f)
    temperatures = np.where(sampled, config.temperature, 0.0).tolist()
    results = lm.generate_many(
        rows[done:],
        rows=config.batch_size,
        max_new_tokens=config.max_new_tokens,
        temperature=temperatures,
        top_p=config.top_p,
        seed=[(config.seed * 1_000_003 + int(i)) % 2**32 for i in numbers],
    )
    finished: dict[int, Result] = {}  # they wait for the prompts before them
    following = 0
    for i, result in results:
        result.check()
        finished[i] = result
        while (ready := finished.pop(following, None)) is not None:
            prompt = rows[done + following]
            yield {
                "prompt_tokens": prompt.tolist(),
                "tokens": ready.tokens,
                "prompt": _text(lm, prompt),
                "text": ready.text,
                "temperature": temperatures[following],
            }
            following += 1


def _checked(lm: LM, prompts: Sequence[Sequence[int] | np.ndarray]) -> list[np.ndarray]:
    rows = [np.asarray(prompt, np.int32) for prompt in prompts]
    if not rows:
        raise InputError("no prompts")
    for i, row in enumerate(rows):
        if not row.size:
            raise InputError(f"prompt {i} is empty")
        outside = row[(row < 0) | (row >= lm.config.vocab_size)]
        if outside.size:
            raise InputError(
                f"prompt {i} holds token {outside[0]}; the vocabulary has {lm.config.vocab_size}"
            )
    long = [i for i, row in enumerate(rows) if len(row) >= lm.max_length]
    if long:
        raise InputError(
            f"{len(long)} of {len(rows)} prompts leave no room for a new token: prompt {long[0]} "
            f"has {len(rows[long[0]])} tokens, and the model is made for {lm.max_length}: leave "
            "them out, or take the beginnings of texts (--prompt-tokens)"
        )
    return rows


def _hash(rows: Sequence[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(np.int32(len(row)).tobytes() + row.tobytes())
    return digest.hexdigest()


def _text(lm: LM, row: np.ndarray) -> str | None:
    return None if lm.tokenizer is None else lm.tokenizer.decode(row, skip_special_tokens=True)


class _Partial:
    """The unfinished file, and the options of the call that writes it."""

    def __init__(self, out: Path, options: Mapping[str, Any]) -> None:
        self.out = out
        self.path = out.with_name(out.name + ".partial")
        self._options_path = out.with_name(out.name + ".partial.json")
        self._options = json.loads(json.dumps(options))

    def begin(self, overwrite: bool) -> int:
        """The number of whole lines of an earlier call; the rest is cut off.

        Raises:
            InputError: that call had other options, and its lines are not to be overwritten.
        """
        if self.path.exists():
            changes = self._changes()
            if not changes:
                lines = self.path.read_bytes().splitlines(True)
                lines = [line for line in lines if line.endswith(b"\n")]
                with self.path.open("r+b") as file:
                    file.truncate(sum(map(len, lines)))
                return len(lines)
            if not overwrite:
                raise InputError(
                    f"{self.path} is what another call left unfinished ({changes}): repeat that "
                    "call to finish it, choose another file, or discard it with --overwrite"
                )
            self.path.unlink()
        write_atomically(self._options_path, json.dumps(self._options, indent=1))
        return 0

    def _changes(self) -> str:
        """The differences between that call's options and this one's, as text; "" for none."""
        try:
            old = json.loads(self._options_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            old = None
        if not isinstance(old, dict):
            return "its options are not known"
        return describe(differences(old, self._options))

    def finish(self) -> None:
        os.replace(self.path, self.out)
        self._options_path.unlink(missing_ok=True)
