"""The methods of decoding by name. No other file lists them.

A drafter from outside becomes a method with `register`, or, for the command line, with an entry
point of the group "s3d_jax.drafters" in the package that defines it. This module imports no jax
until a drafter is chosen, so that the command line can list the methods at once.
"""

import functools
import importlib
import importlib.metadata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from s3d_jax.errors import ConfigError

if TYPE_CHECKING:
    from s3d_jax.drafters.base import Choice, Drafter, Target

AR = "ar"  # plain autoregressive decoding: no drafter
DEFAULT = "s3d"
ENTRY_POINTS = "s3d_jax.drafters"

_SUMMARY_OF_AR = "nothing, one token per pass"
_BUILT_IN = {  # where each drafter is, and what it does
    "s3d": ("s3d_jax.drafters.s3d:S3D", "the model, all tokens in one pass"),
    "prompt-lookup": ("s3d_jax.drafters.prompt_lookup:PromptLookup", "the text so far"),
    "self-spec": (
        "s3d_jax.drafters.token_by_token:SelfSpeculative",
        "the model without its middle layers, token by token",
    ),
    "early-exit": (
        "s3d_jax.drafters.token_by_token:EarlyExit",
        "the model without its last layers, token by token",
    ),
    "eagle": (
        "s3d_jax.drafters.features:Eagle",
        "a trained layer over the model's last hidden state, token by token",
    ),
    "medusa": (
        "s3d_jax.drafters.features:Medusa",
        "a trained head for each position over the model's last hidden state",
    ),
    "two-model": ("s3d_jax.drafters.two_model:TwoModel", "a second, smaller model"),
}
_registered: dict[str, "type[Drafter]"] = {}


def register(drafter: "type[Drafter]") -> "type[Drafter]":
    """Makes a drafter a method, under its `name`. Also a decorator.

    Raises:
        ConfigError: the name is taken.
    """
    if drafter.name in method_names() and _registered.get(drafter.name) is not drafter:
        raise ConfigError(f"there is a method {drafter.name!r} already: choose another name")
    _registered[drafter.name] = drafter
    return drafter


def unregister(name: str) -> None:
    """Removes a method that was registered."""
    del _registered[name]


def method_names() -> tuple[str, ...]:
    """The names of all methods."""
    first = (DEFAULT, AR)
    return tuple(dict.fromkeys([*first, *_BUILT_IN, *_registered, *_entry_points()]))


def summaries() -> dict[str, str]:
    """What drafts in each built-in method, for --help."""
    found = {name: summary for name, (_, summary) in _BUILT_IN.items()}
    return {DEFAULT: found[DEFAULT], AR: _SUMMARY_OF_AR} | found


def drafter_class(method: str) -> "type[Drafter]":
    """The drafter of a method.

    Raises:
        ConfigError: there is no such method, or it is AR, which has no drafter.
    """
    if method in _registered:
        return _registered[method]
    if method in _BUILT_IN:
        module, _, name = _BUILT_IN[method][0].partition(":")
        return getattr(importlib.import_module(module), name)
    if method in (points := _entry_points()):
        _registered[method] = points[method].load()
        return _registered[method]
    raise ConfigError(f"method must be one of {method_names()}, got {method!r}")


def option_names(method: str) -> tuple[str, ...]:
    """The drafting options that a method takes.

    AR takes (and ignores) the built-in drafters' options, so that the same call works with and
    without speculation.
    """
    if method != AR:
        return drafter_class(method).options
    return tuple(dict.fromkeys(name for m in _BUILT_IN for name in drafter_class(m).options))


def choose(
    target: "Target",
    method: str,
    *,
    gamma: int | None = None,
    skip: Sequence[bool] | None = None,
    leaves: Sequence[int] | None = None,
    adaptive: bool | None = None,
    copies: bool | None = None,
    ngram: int | None = None,
    **own: Any,
) -> "Choice":
    """The drafter of a method with its settings.

    Args:
        target: the model.
        method: one of `method_names()`.
        gamma, skip, leaves, adaptive, copies, ngram: options of the built-in drafters; None where
            not given.
        **own: options of a drafter from outside.

    Raises:
        ConfigError: an unknown method, an option that it does not take, or a wrong value (of "ar"
            too, which uses none).
    """
    from s3d_jax.drafters.base import Choice

    if method not in method_names():
        raise ConfigError(f"method must be one of {method_names()}, got {method!r}")
    options = dict(gamma=gamma, skip=skip, leaves=leaves, adaptive=adaptive, copies=copies)
    options |= dict(ngram=ngram) | own
    given = {name: value for name, value in options.items() if value is not None}
    if foreign := sorted(set(given) - set(option_names(method))):
        raise ConfigError(
            f"method {method!r} has no {', '.join(foreign)}; it has "
            f"{', '.join(option_names(method))}"
        )
    if method != AR:
        return drafter_class(method).choose(target, given)
    for other in ("s3d", "prompt-lookup"):  # together they take all options
        known = drafter_class(other).options
        drafter_class(other).choose(target, {k: v for k, v in given.items() if k in known})
    return Choice()


def candidates(target: "Target", method: str) -> list[dict[str, Any]]:
    """The options among which `s3d bench` looks for a method's fastest, where none are given."""
    return [{}] if method == AR else drafter_class(method).candidates(target)


@functools.cache
def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    return {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}
