"""HF checkpoints to native ones and back: the command `s3d-convert`, and three functions.

    convert.convert("path/to/hf_folder", "models/mine")
    convert.verify("models/mine", "path/to/hf_folder").agrees
    convert.export("models/mine", "path/to/new_hf_folder")

They are imported when they are used, so that `import convert` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convert.to_hf import export
    from convert.to_native import convert
    from convert.verification import verify

_HOME = {"convert": "to_native", "export": "to_hf", "verify": "verification"}

__all__ = ["convert", "export", "verify"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
