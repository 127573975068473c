"""The model families, one small file each. To add one, write its file and list it in `_MODULES`.

Of the families in `MULTIMODAL` only the text model is read. Exports are of `FAMILIES`.
"""

from collections.abc import Mapping
from typing import Any

from convert.families import (
    gemma,
    gemma2,
    gemma3,
    granite,
    llama,
    mistral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    smollm3,
)
from convert.families.common import Family, Names, Part, Table, native_shape, pieces
from s3d_jax.errors import ConfigError
from s3d_jax.settings.model import ModelConfig

__all__ = [
    "FAMILIES",
    "MULTIMODAL",
    "Family",
    "Names",
    "Part",
    "Table",
    "family_for_export",
    "family_of",
    "native_shape",
    "pieces",
]

# Exports take the first that can express the model.
_MODULES = llama, mistral, phi3, qwen2, qwen3, gemma, gemma2, gemma3, olmo2, granite, smollm3

FAMILIES: dict[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in _MODULES}

MULTIMODAL: dict[str, Family] = {family.model_type: family for family in (gemma3.MULTIMODAL,)}


def family_of(fields: Mapping[str, Any]) -> Family:
    """The family of a HF config.json.

    Raises:
        ConfigError: its model_type is missing or not supported, or it is a mixture of experts.
    """
    model_type = fields.get("model_type")
    families = FAMILIES | MULTIMODAL
    supported = ", ".join(sorted(families))
    if model_type is None:
        raise ConfigError(f"config.json has no model_type; supported are: {supported}")
    experts = sorted(name for name, value in fields.items() if "expert" in name and value)
    if experts or "moe" in str(model_type):
        listed = f" ({', '.join(experts)})" if experts else ""
        raise ConfigError(
            f"model_type {model_type!r:.80} is a mixture of experts{listed}, which is not "
            f"supported; supported are the dense models {supported}"
        )
    if not isinstance(model_type, str) or model_type not in families:
        raise ConfigError(
            f"model_type {model_type!r:.80} is not supported; supported are: {supported}"
        )
    return families[model_type]


def family_for_export(config: ModelConfig) -> Family:
    """The first family that can express the model, so that it reads back what it writes.

    Raises:
        ConfigError: no family can; names what the nearest one loses.
    """
    lost = {}
    for name, family in FAMILIES.items():
        try:
            back = family.config(family.write(config)).replace(dtype=config.dtype)
        except ConfigError:  # a value that the family refuses
            continue
        if back == config:
            return family
        wanted, got = config.to_dict(), back.to_dict()
        lost[name] = sorted(key for key in wanted if wanted[key] != got[key])
    nearest = min(lost, key=lambda name: len(lost[name]), default=None)
    reason = f"{nearest} cannot express {', '.join(lost[nearest])}" if nearest else "all refuse it"
    raise ConfigError(f"no HF model family can express this model: {reason}")
