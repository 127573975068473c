"""Self-distillation data: the target's own continuations of given prompts."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from s3d_jax.errors import InputError
from s3d_jax.generate import LM


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
    overwrite: bool = False,
    progress: bool = False,
) -> Path:
    """Writes one JSON line per prompt: {"prompt_tokens", "tokens", "text", "temperature"}.

    The lines go to `<out>.partial` as they come, which becomes `out` at the end. A call that finds
    a partial file goes on behind its last whole batch; since every batch has seeds of its own, the
    outcome is the same.

    Args:
        lm: the target; its draft, where it has one, makes it faster and changes nothing.
        prompts: token ids.
        out: the .jsonl file.
        max_new_tokens: per prompt.
        batch_size: prompts decoded at once.
        sampled_fraction: share of the prompts that are continued by sampling, the others greedily.
        temperature, top_p: of the sampled ones.
        seed: of the sampling.
        overwrite: replace `out`.
        progress: show a bar.

    Raises:
        InputError: `out` exists, or cannot be written; or a prompt that cannot be used.
    """
    from tqdm import tqdm

    path = Path(out)
    if not prompts:
        raise InputError("no prompts")
    if not 0 <= sampled_fraction <= 1:
        raise InputError(f"sampled_fraction must be in [0, 1], got {sampled_fraction}")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists: choose another file, or replace it with --overwrite")
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        done = _whole_batches(partial, batch_size)
        with (
            partial.open("a", encoding="utf-8") as file,
            tqdm(
                total=len(prompts), initial=done, desc="distilling", unit=" texts",
                disable=not progress,
            ) as bar,
        ):  # fmt: skip
            for start in range(done, len(prompts), batch_size):
                rows = [np.asarray(p, np.int32) for p in prompts[start : start + batch_size]]
                real = len(rows)
                rows += [rows[-1]] * (batch_size - real)  # one batch size, one program
                numbers = np.arange(start, start + batch_size)
                # The fractional parts of i·f step over 1 in a share f of all i, evenly spread.
                sampled = np.floor((numbers + 1) * sampled_fraction) > np.floor(
                    numbers * sampled_fraction
                )
                temperatures = np.where(sampled, temperature, 0.0).tolist()
                results = lm.generate(
                    rows,
                    max_new_tokens=max_new_tokens,
                    temperature=temperatures,
                    top_p=top_p,
                    seed=[(seed * 1_000_003 + int(i)) % 2**32 for i in numbers],
                )
                for row, result, heat in list(zip(rows, results, temperatures, strict=True))[:real]:
                    line = {
                        "prompt_tokens": row.tolist(),
                        "tokens": result.tokens,
                        "text": result.text,
                        "temperature": heat,
                    }
                    file.write(json.dumps(line) + "\n")
                file.flush()
                bar.update(real)
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def _whole_batches(partial: Path, batch_size: int) -> int:
    """Lines of whole batches in a file that an earlier call left; the rest is cut off."""
    if not partial.exists():
        return 0
    lines = [line for line in partial.read_bytes().splitlines(True) if line.endswith(b"\n")]
    whole = len(lines) // batch_size * batch_size
    partial.write_bytes(b"".join(lines[:whole]))
    return whole
