"""Names of tensors that were saved from a wrapper of the model, such as torch.compile's."""

import re
from collections.abc import Iterable, Mapping

import numpy as np

from convert.sources.base import Source

# A wrapper is a module that holds the model, or a part of it, under one of these names.
_WRAPPERS = {
    "module.": "DataParallel",
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
    "base_model.model.": "PEFT",
}
_INNER = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_OUTER = re.compile(r"^(module\.)+")
_OUTER_OF_PEFT = re.compile(r"^(module\.|base_model\.model\.)+")
_ADAPTED = re.compile(r"(^|\.)(base_layer|lora_\w+|modules_to_save)\.")
_PEFT = re.compile(rf"(^|\.)base_model\.model\.|{_ADAPTED.pattern}")


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """The names of all tensors of a source, each with what it is without names of wrappers.

    If two would become the same, none is changed. PEFT's prefix is a part of the names where an
    adapter is left that is not merged.
    """
    names = dict.fromkeys(names)
    outer = _OUTER if any(map(_ADAPTED.search, names)) else _OUTER_OF_PEFT
    plain = {name: outer.sub("", _INNER.sub("", name)) for name in names}
    return plain if len(set(plain.values())) == len(plain) else dict(zip(names, names, strict=True))


def wrappers_of(names: Mapping[str, str]) -> tuple[str, ...]:
    """What wrapped the model when tensors were saved, in words; of `plain_names`."""
    left_out = "".join(f".{name}" for name, plain in names.items() if name != plain)
    return tuple(
        f"{prefix} ({tool})" for prefix, tool in _WRAPPERS.items() if f".{prefix}" in left_out
    )


def is_from_peft(name: str) -> bool:
    """Whether a tensor is of an adapter, or of a layer that one is wrapped around."""
    return _PEFT.search(name) is not None


class Unwrapped:
    """A source under plain names.

    Args:
        source: whose names may be those of wrappers.
        others: names of tensors that belong to it and are not here.

    Attributes:
        wrappers: what wrapped the model, in words.
    """

    def __init__(self, source: Source, others: Iterable[str] = ()) -> None:
        plain = plain_names([*source.tensors, *source.faults, *others])
        self._source = source
        self._names = {plain[name]: name for name in source.tensors}
        self.wrappers = wrappers_of(plain)
        self.tensors = {plain[name]: tensor for name, tensor in source.tensors.items()}
        self.faults = {plain[name]: fault for name, fault in source.faults.items()}

    def read(self, name: str, out: np.ndarray, first_row: int = 0) -> None:
        self._source.read(self._names[name], out, first_row)
