"""Self-distillation data: the target's own continuations of given prompts."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from s3d_jax.errors import InputError
from s3d_jax.lm import LM
from s3d_jax.storage.staging import write_atomically
from s3d_jax.texts.documents import Document
from s3d_jax.train.options import differences, in_words


def prompts_of(
    documents: Sequence[Document], limit: int | None, length: int | None
) -> list[np.ndarray]:
    """What there is to continue.

    Args:
        documents: read with `prompts`.
        limit: prompts at most; None takes all.
        length: tokens of a prompt, where the document does not say itself what its prompt is; a
            shorter text is used whole. None uses every text whole.

    Returns:
        int32 [n] each.
    """
    sizes = [d.prompt_tokens or min(length or len(d.tokens), len(d.tokens)) for d in documents]
    prompts = [d.tokens[:n] for d, n in zip(documents, sizes, strict=True) if n]
    return prompts[:limit]


def distill(
    lm: LM,
    prompts: Sequence[Sequence[int] | np.ndarray],
    out: str | os.PathLike[str],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 32,
    sampled_fraction: float = 0.5,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    identity: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Path:
    """Writes one JSON line per prompt: its "prompt_tokens" and "tokens", and "prompt" and "text",
    the same in words (null without a tokenizer), and the "temperature".

    The lines go to `<out>.partial` as they come, which becomes `out` at the end; beside it lies
    `<out>.partial.json` with the options. A call that finds a partial file of the same options goes
    on behind its last whole batch; since every prompt has a seed of its own, the outcome is the
    same.

    Args:
        lm: the target; its draft, where it has one, makes it faster and changes nothing.
        prompts: token ids.
        out: the .jsonl file.
        max_new_tokens: per prompt.
        batch_size: prompts decoded at once.
        sampled_fraction: share of the prompts that are continued by sampling, the others greedily.
        temperature, top_p: of the sampled ones.
        seed: of the sampling.
        identity: JSON that tells this target from others; None is its configuration.
        overwrite: replace `out`, and a partial file of other options.
        progress: show a bar.

    Raises:
        InputError: `out` exists, or cannot be written; a partial file of other options; or prompts
            that cannot be used, noticed before the first one is continued.
    """
    from tqdm import tqdm

    path = Path(out)
    rows = _checked(lm, prompts)
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    if not 0 <= sampled_fraction <= 1:
        raise InputError(f"sampled_fraction must be in [0, 1], got {sampled_fraction}")
    if sampled_fraction and not temperature > 0:
        raise InputError(
            f"temperature must be > 0, got {temperature}: for greedy continuations alone set "
            "sampled_fraction (--sampled-fraction) to 0"
        )
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists: choose another file, or replace it with --overwrite")
    options = {
        "target": dict(identity or {"config": lm.config.to_dict()}),
        "prompts": len(rows),
        "prompts_sha256": _hash(rows),
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "sampled_fraction": sampled_fraction,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
    }
    partial = _Partial(path, options)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        done = partial.begin(batch_size, overwrite)
        with (
            partial.path.open("a", encoding="utf-8") as file,
            tqdm(
                total=len(rows), initial=done, desc="distilling", unit=" texts",
                disable=not progress,
            ) as bar,
        ):  # fmt: skip
            for start in range(done, len(rows), batch_size):
                batch = rows[start : start + batch_size]
                numbers = np.arange(start, start + batch_size)
                # The fractional parts of i·f step over 1 in a share f of all i, evenly spread.
                sampled = np.floor((numbers + 1) * sampled_fraction) > np.floor(
                    numbers * sampled_fraction
                )
                temperatures = np.where(sampled, temperature, 0.0).tolist()
                results = lm.generate(
                    batch + [batch[-1]] * (batch_size - len(batch)),  # one size, one program
                    max_new_tokens=max_new_tokens,
                    temperature=temperatures,
                    top_p=top_p,
                    seed=[(seed * 1_000_003 + int(i)) % 2**32 for i in numbers],
                )
                for row, result, heat in zip(batch, results, temperatures, strict=False):
                    line = {
                        "prompt_tokens": row.tolist(),
                        "tokens": result.tokens,
                        "prompt": _words(lm, row),
                        "text": result.text,
                        "temperature": heat,
                    }
                    file.write(json.dumps(line) + "\n")
                file.flush()
                bar.update(len(batch))
        partial.finish()
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    return path


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


def _words(lm: LM, row: np.ndarray) -> str | None:
    return None if lm.tokenizer is None else lm.tokenizer.decode(row, skip_special_tokens=True)


class _Partial:
    """The unfinished file, and what it was made with."""

    def __init__(self, out: Path, options: Mapping[str, Any]) -> None:
        self.out = out
        self.path = out.with_name(out.name + ".partial")
        self._options_path = out.with_name(out.name + ".partial.json")
        self._options = json.loads(json.dumps(options))

    def begin(self, batch_size: int, overwrite: bool) -> int:
        """Number of lines that an earlier call left in whole batches; the rest is cut off.

        Raises:
            InputError: they are of other options, and not to be overwritten.
        """
        if self.path.exists():
            changes = self._changes()
            if not changes:
                lines = self.path.read_bytes().splitlines(True)
                lines = [line for line in lines if line.endswith(b"\n")]
                whole = len(lines) // batch_size * batch_size
                with self.path.open("r+b") as file:
                    file.truncate(sum(map(len, lines[:whole])))
                return whole
            if not overwrite:
                raise InputError(
                    f"{self.path} is what another call left unfinished ({changes}): repeat that "
                    "call to finish it, choose another file, or discard it with --overwrite"
                )
            self.path.unlink()
        write_atomically(self._options_path, json.dumps(self._options, indent=1))
        return 0

    def _changes(self) -> str:
        """What differs between that call and this one, in words; "" if nothing does."""
        try:
            old = json.loads(self._options_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            old = None
        if not isinstance(old, dict):
            return "with what options is not known"
        return in_words(differences(old, self._options))

    def finish(self) -> None:
        os.replace(self.path, self.out)
        self._options_path.unlink(missing_ok=True)
