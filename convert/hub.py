"""Models on the HF hub: what a conversion needs of them, in the hub's own cache."""

import re
from pathlib import Path
from typing import Any

from s3d_jax.errors import ConversionError
from s3d_jax.tokenizer import TOKENIZER_FILES

_SMALL = ("config.json", "generation_config.json", *TOKENIZER_FILES)
_SAFETENSORS = (
    *("model.safetensors", "model.safetensors.index.json"),
    "model-*-of-*.safetensors",
)
_TORCH = (
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
    "pytorch_model-*-of-*.bin",
)
_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def download(model_id: str, revision: str | None = None) -> Path:
    """Fetches a model; files that are in the hub's cache already are not fetched again.

    The environment variables of huggingface_hub hold: HF_ENDPOINT, HF_HOME, HF_TOKEN,
    HF_HUB_OFFLINE.

    Args:
        model_id: "owner/name".
        revision: branch, tag or commit; None is the main branch.

    Returns:
        The folder in the cache: safetensors if the model has them, else torch's .bin files.

    Raises:
        ConversionError: no such model, no access, no network, disk full.
    """
    if not _ID.fullmatch(model_id):
        raise ConversionError(f"{model_id}: there is no such folder")
    from huggingface_hub import errors, snapshot_download

    def fetch(patterns: tuple[str, ...]) -> Path:
        options: dict[str, Any] = dict(revision=revision, allow_patterns=[*_SMALL, *patterns])
        return Path(snapshot_download(model_id, **options))

    try:
        folder = fetch(_SAFETENSORS)
        if not any(folder.glob("*.safetensors")):
            folder = fetch(_TORCH)
        return folder
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
    except Exception as error:  # the HTTP library has kinds of its own, no subclasses of OSError
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise _error(model_id, f"the download failed ({reason})") from error


def _error(model_id: str, reason: str) -> ConversionError:
    return ConversionError(f"{model_id}: {reason}")
