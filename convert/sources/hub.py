"""Fetches what a conversion needs of a model on the HF hub, into the hub's own cache."""

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from convert.sources.base import first_line
from s3d_jax.errors import ConversionError
from s3d_jax.storage.adapters import ADAPTER_CONFIG, adapter_problem
from s3d_jax.storage.tokenizer import TEMPLATES, TOKENIZER_FILES

_SMALL = ("config.json", "generation_config.json", ADAPTER_CONFIG, *TOKENIZER_FILES, TEMPLATES)
_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
_TORCH = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin")
_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def download(model_id: str, revision: str | None = None) -> Path:
    """Fetches a model, except for files that are in the hub's cache already.

    Of a model with an adapter (see `adapter_problem`), no weights are fetched.

    Obeys the environment variables of huggingface_hub: HF_ENDPOINT, HF_HOME, HF_TOKEN,
    HF_HUB_OFFLINE.

    Args:
        model_id: "owner/name".
        revision: branch, tag or commit; None is the main branch.

    Returns:
        The folder in the cache: safetensors if the model has them, else torch's .bin files.

    Raises:
        ConversionError: no such model, no access, no network, disk full.
    """
    with _explained(model_id, revision):
        if adapter_problem(folder := _fetch(model_id, revision, ())):
            return folder  # to be refused, before gigabytes are fetched
        folder = _fetch(model_id, revision, _SAFETENSORS)
        if not any(folder.glob("*.safetensors")):
            folder = _fetch(model_id, revision, _TORCH)
        return folder


def fetch(model_id: str, revision: str | None, files: Iterable[str]) -> Path:
    """Fetches files of a repository, except for those that are in the hub's cache already.

    Args:
        model_id, revision: as for `download`.
        files: names, or patterns with "*".

    Returns:
        The folder in the cache.

    Raises:
        ConversionError: as `download`.
    """
    with _explained(model_id, revision):
        return Path(_snapshot(model_id, revision, files))


def outline(model_id: str, revision: str | None = None) -> tuple[Path, dict[str, int]]:
    """Fetches config, index and tokenizer of a model, without its weights.

    Args:
        model_id, revision: as for `download`.

    Returns:
        The folder in the cache; and the names of the files that `download` would add, with their
        sizes in bytes. There are none if the hub cannot be reached.

    Raises:
        ConversionError: as `download`.
    """
    with _explained(model_id, revision):
        from huggingface_hub.errors import DryRunError

        for patterns in (_SAFETENSORS, _TORCH):
            indices = tuple(pattern for pattern in patterns if pattern.endswith(".index.json"))
            folder = _fetch(model_id, revision, indices)
            try:
                files = _snapshot(model_id, revision, (*_SMALL, *patterns), dry_run=True)
            except DryRunError:
                return folder, {}
            if any(file.filename.endswith((".safetensors", ".bin")) for file in files):
                break
        return folder, {file.filename: file.file_size for file in files if file.will_download}


def _fetch(model_id: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    return Path(_snapshot(model_id, revision, (*_SMALL, *patterns)))


def _snapshot(model_id: str, revision: str | None, patterns: Iterable[str], **how: Any) -> Any:
    from huggingface_hub import snapshot_download

    return snapshot_download(model_id, revision=revision, allow_patterns=list(patterns), **how)


@contextlib.contextmanager
def _explained(model_id: str, revision: str | None) -> Iterator[None]:
    """Turns an error of the block into one that says in plain words why a model cannot be had."""
    if not _ID.fullmatch(model_id):
        raise ConversionError(f"{model_id}: there is no such folder")
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        reason = "its owner wants to be asked: accept the terms on its page, then set HF_TOKEN"
        raise _error(model_id, reason) from error
    except errors.RevisionNotFoundError as error:
        raise _error(model_id, f"it has no revision {revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        reason = "no such folder here, nor such a model on the hub (if it is private: set HF_TOKEN)"
        raise _error(model_id, reason) from error
    except errors.LocalEntryNotFoundError as error:
        reason = "no such folder here, and the hub cannot be reached (its cache has no copy either)"
        raise _error(model_id, reason) from error
    except errors.HFValidationError as error:
        raise _error(
            model_id, f"no such folder here, nor a valid id of the hub: {error}"
        ) from error
    except Exception as error:  # the HTTP library's errors are no subclasses of OSError
        reason = first_line(error) or type(error).__name__
        raise _error(model_id, f"the download failed ({reason})") from error


def _error(model_id: str, reason: str) -> ConversionError:
    return ConversionError(f"{model_id}: {reason}")
