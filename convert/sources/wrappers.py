"""Names of tensors that were saved from a wrapper of the model, such as torch.compile's."""

import re
from collections.abc import Iterable

import numpy as np

from convert.sources.base import Source

# A wrapper is a module that holds the model, or a part of it, under one of these names.
_WRAPPERS = {
    "module.": "DataParallel",
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
}
_INNER = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PEFT = re.compile(r"(^|\.)(base_model\.model|base_layer|lora_\w+|modules_to_save)\.")


def plain_name(name: str) -> str:
    """The name of a tensor without those of wrappers."""
    name = _INNER.sub("", name)
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def wrappers_of(names: Iterable[str]) -> tuple[str, ...]:
    """What wrapped the model when tensors of these names were saved, in words."""
    left_out = "".join(f".{name}" for name in names if plain_name(name) != name)
    return tuple(
        f"{prefix} ({tool})" for prefix, tool in _WRAPPERS.items() if f".{prefix}" in left_out
    )


def is_from_peft(name: str) -> bool:
    """Whether a tensor is of an adapter, or of a layer that one is wrapped around."""
    return _PEFT.search(name) is not None


class Unwrapped:
    """A source under plain names.

    Args:
        source: whose names may be those of wrappers. If two would become the same, none is changed.

    Attributes:
        wrappers: what wrapped the model, in words.
    """

    def __init__(self, source: Source) -> None:
        names = {plain_name(name): name for name in source.tensors}
        if len(names) < len(source.tensors):
            names = {name: name for name in source.tensors}
        self._source, self._names = source, names
        self.wrappers = wrappers_of(name for plain, name in names.items() if plain != name)
        self.tensors = {plain: source.tensors[name] for plain, name in names.items()}
        self.faults = {plain_name(name): fault for name, fault in source.faults.items()}

    def read(self, name: str, out: np.ndarray, first_row: int = 0) -> None:
        self._source.read(self._names[name], out, first_row)
