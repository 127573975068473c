"""Writes folders and files that appear whole or not at all."""

import contextlib
import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from s3d_jax.errors import CheckpointError

_REASONS = {
    errno.ENOSPC: "the disk is full: free some space, or write to another disk",
    errno.EDQUOT: "the disk quota is used up: free some space, or write to another disk",
    errno.EACCES: "no permission to write there: choose another place, or change its permissions",
    errno.EPERM: "no permission to write there: choose another place, or change its permissions",
    errno.EROFS: "the file system is read-only: choose another place",
    errno.ENOTDIR: "a part of the path is a file, not a folder: choose another place",
    errno.EEXIST: "a part of the path is a file, not a folder: choose another place",
    errno.ENAMETOOLONG: "the path is too long: choose a shorter one",
}


def _write_error(out: str | os.PathLike[str], error: OSError) -> CheckpointError:
    """Explains in plain words why `out` could not be written."""
    reason = _REASONS.get(error.errno or 0, error.strerror or str(error))
    return CheckpointError(f"cannot write {out}: {reason}")


@contextlib.contextmanager
def staged_folder(
    out: str | os.PathLike[str], *, overwrite: bool = False, needs: int = 0
) -> Iterator[Path]:
    """Gives an empty folder, which becomes `out` if the block succeeds.

    The folder is next to `out` and called `<name>.partial-<random>`. After the block it is flushed
    to disk and renamed, so `out` is never visible half written. An exception removes it; a kill or
    a power cut can leave it under its partial name. An existing `out` stays until the new one is
    complete.

    Args:
        out: the folder to write; missing parents are created.
        overwrite: replace an existing checkpoint folder. Other folders are never replaced.
        needs: bytes that will be written, so that a full disk is noticed before the work.

    Raises:
        CheckpointError: `out` exists, or cannot be written (permission, disk full, ...). An OSError
            in the block counts as a failure to write.
    """
    shown, out = out, Path(os.path.realpath(out))
    check_replaceable(out, overwrite)
    partial = out.with_name(f"{out.name}.partial-{secrets.token_hex(4)}")
    try:
        check_space(shown, needs)
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        _flush(partial)
        _replace(partial, out)
    except OSError as error:
        raise _write_error(shown, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # exists only after a failure


def free_space(out: str | os.PathLike[str]) -> int:
    """Free bytes on the disk of `out`, which need not exist."""
    folder = Path(os.path.realpath(out))
    while not folder.is_dir():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def check_space(out: str | os.PathLike[str], needs: int) -> None:
    """Checks that the disk has room.

    Raises:
        CheckpointError: the disk has fewer than `needs` bytes free.
    """
    if needs > (free := free_space(out)):
        raise CheckpointError(
            f"cannot write {out}: it needs {needs / 1e9:.1f} GB, and the disk has "
            f"{free / 1e9:.1f} GB free: free some space, or write to another disk"
        )


def check_apart(out: str | os.PathLike[str], *sources: str | os.PathLike[str] | None) -> None:
    """Checks that writing `out` replaces none of the sources.

    Raises:
        CheckpointError: `out` is a source, or contains one.
    """
    target = Path(os.path.realpath(out))
    for source in sources:
        if source is None:
            continue
        read = Path(os.path.realpath(source))
        if target == read or target in read.parents:
            raise CheckpointError(
                f"cannot write {out}: it is, or contains, what is being read ({source}): choose "
                "another folder"
            )


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file, which has the old text or the new one at any time, never a part.

    Raises:
        OSError: it cannot be written.
    """
    partial = path.with_name(path.name + ".partial-" + secrets.token_hex(4))
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_replaceable(out: str | os.PathLike[str], overwrite: bool) -> None:
    """Checks before a long computation that `staged_folder` will be able to write.

    Raises:
        CheckpointError: `out` exists and must not be replaced, or is no checkpoint; or no folder
            can be created there.
    """
    shown, out = out, Path(os.path.realpath(out))
    try:
        parent = out.parent
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "")
        if not out.exists():
            return
        if not out.is_dir():
            raise CheckpointError(f"cannot write {out}: it exists and is not a folder")
        if not any(out.iterdir()):
            return
        is_checkpoint = _is_checkpoint(out)
    except OSError as error:
        raise _write_error(shown, error) from error
    if not overwrite:
        raise CheckpointError(
            f"{out} exists and is not empty: choose another folder"
            + (", or replace it with --overwrite (overwrite=True)" if is_checkpoint else "")
        )
    if not is_checkpoint:
        raise CheckpointError(
            f"{out} is no checkpoint that s3d_jax wrote, or in HF's format, so it is not replaced: "
            "choose another folder"
        )


def _is_checkpoint(folder: Path) -> bool:
    """Whether the folder can be replaced: a native one, or a HF folder with weights."""
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(fields, dict):
        return False
    formats = ("s3d_jax", "s3d_jax draft")
    native = fields.get("format") in formats and (folder / "weights").is_dir()
    return native or ("model_type" in fields and any(folder.glob("*.safetensors")))


def _flush(folder: Path) -> None:
    for parent, _, files in os.walk(folder):
        for path in (*(os.path.join(parent, name) for name in files), parent):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _replace(partial: Path, out: Path) -> None:
    """Renames. An old folder is moved aside first, and moved back if renaming fails."""
    aside = None
    if out.exists() and any(out.iterdir()):
        aside = out.with_name(f"{out.name}.old-{secrets.token_hex(4)}")
        out.rename(aside)
    try:
        partial.rename(out)
    except BaseException:
        if aside is not None:
            aside.rename(out)
        raise
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)
    descriptor = os.open(out.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
