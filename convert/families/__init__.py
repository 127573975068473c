"""The model families: one small file each. To add one, write its file and list it in `FAMILIES`."""

from collections.abc import Mapping
from typing import Any

from convert.families import llama
from convert.families.common import Family, Part, Table, native_shape, pieces
from s3d_jax.config import ModelConfig
from s3d_jax.errors import ConfigError

__all__ = [
    "FAMILIES",
    "Family",
    "Part",
    "Table",
    "family_for_export",
    "family_of",
    "native_shape",
    "pieces",
]

FAMILIES: dict[str, Family] = {family.model_type: family for family in (llama.FAMILY,)}


def family_of(fields: Mapping[str, Any]) -> Family:
    """The family of a HF config.json.

    Raises:
        ConfigError: its model_type is missing or not supported.
    """
    model_type = fields.get("model_type")
    supported = ", ".join(sorted(FAMILIES))
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type is None:
        raise ConfigError(f"config.json has no model_type; supported are: {supported}")
    experts = sorted(name for name in fields if "expert" in name)
    hint = f". It is a mixture of experts ({', '.join(experts)}), which is not supported" * bool(
        experts
    )
    raise ConfigError(
        f"model_type {model_type!r:.80} is not supported; supported are: {supported}{hint}"
    )


def family_for_export(config: ModelConfig, preferred: str | None = None) -> Family:
    """A family that can express the model, and that reads back what it writes.

    Args:
        config: the native model.
        preferred: model_type to try first, that of the source.

    Raises:
        ConfigError: no family can; names what gets lost in the preferred one.
    """
    order = sorted(FAMILIES, key=lambda name: name != preferred)
    lost = {}
    for name in order:
        family = FAMILIES[name]
        back = family.config(family.write(config)).replace(dtype=config.dtype)
        if back == config:
            return family
        wanted, got = config.to_dict(), back.to_dict()
        lost[name] = ", ".join(sorted(key for key in wanted if wanted[key] != got[key]))
    reasons = "; ".join(f"{name} cannot express {fields}" for name, fields in lost.items())
    raise ConfigError(f"no HF model family can express this model: {reasons}")
