"""S3D self-speculative decoding in pure JAX.

    lm = s3d_jax.load()  # the small model in the package, or load("path/to/native/checkpoint")
    print(lm.generate("Once upon a time", max_new_tokens=64)[0].text)

The names below are imported where they are first used, so that `import s3d_jax` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from s3d_jax.conversation import Conversation
    from s3d_jax.engine.options import GenerateOptions
    from s3d_jax.engine.programs import keep_programs
    from s3d_jax.engine.results import Result, Stats
    from s3d_jax.errors import (
        CheckpointError,
        ConfigError,
        ConversionError,
        DeviceError,
        InputError,
        NumericalError,
        S3DError,
        TrainingError,
    )
    from s3d_jax.lm import LM, load
    from s3d_jax.settings.drafting import DraftConfig, symmetric_skip
    from s3d_jax.settings.model import ModelConfig, RopeConfig
    from s3d_jax.settings.sampling import SamplingConfig

__version__ = "0.1.0"

_HOME = {
    "engine.options": ("GenerateOptions",),
    "engine.programs": ("keep_programs",),
    "engine.results": ("Result", "Stats"),
    "settings.drafting": ("DraftConfig", "symmetric_skip"),
    "settings.model": ("ModelConfig", "RopeConfig"),
    "settings.sampling": ("SamplingConfig",),
    "conversation": ("Conversation",),
    "errors": (
        "CheckpointError",
        "ConfigError",
        "ConversionError",
        "DeviceError",
        "InputError",
        "NumericalError",
        "S3DError",
        "TrainingError",
    ),
    "lm": ("LM", "load"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "LM",
    "CheckpointError",
    "ConfigError",
    "Conversation",
    "ConversionError",
    "DeviceError",
    "DraftConfig",
    "GenerateOptions",
    "InputError",
    "ModelConfig",
    "NumericalError",
    "Result",
    "RopeConfig",
    "S3DError",
    "SamplingConfig",
    "Stats",
    "TrainingError",
    "keep_programs",
    "load",
    "symmetric_skip",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
