"""Checks of the callback's arguments: each returns its argument, or raises an error that names it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isfinite
from typing import Any


def choice(name: str, value: str, choices: Sequence[str]) -> str:
    """Return ``value`` if it is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")
    return value


def number_or_auto(name: str, value: Any, least: float, *, itself: bool) -> float | str:
    """Return ``"auto"`` or a finite number above ``least``; with ``itself``, also ``least``."""
    if value == "auto":
        return "auto"
    finite = isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)
    if not finite or value < least or (value == least and not itself):
        bound = f"of at least {least}" if itself else f"above {least}"
        raise ValueError(f"{name} must be 'auto' or a finite number {bound}, got {value!r}.")
    return value


def number(name: str, value: Any, least: float) -> float:
    """Return a number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= least:
        raise ValueError(f"{name} must be a number of at least {least}, got {value!r}.")
    return value


def flag(name: str, value: Any) -> bool:
    """Return True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}.")
    return value


def left_out(why: str, **values: tuple[Any, Any]) -> None:
    """Raise unless each argument has its default: ``name=(value, default)``."""
    for name, (value, default) in values.items():
        if value != default:
            raise ValueError(f"{why}, so {name} must be left out, got {name}={value!r}.")


def seed(value: Any) -> int:
    """Return an integer."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"seed must be an integer, got {value!r}.")
    return value


def positive_or_none(name: str, value: Any) -> int | None:
    """Return a positive integer, or None."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"{name} must be a positive integer or None, got {value!r}.")
    return value


def names(parameters: Any) -> str | list[str] | None:
    """Return names or patterns of parameters; the parameters themselves are refused."""
    if parameters is None or isinstance(parameters, str):
        return parameters
    named = list(parameters) if isinstance(parameters, Iterable) else [parameters]
    others = [type(name).__name__ for name in named if not isinstance(name, str)]
    if others:
        raise TypeError(
            f"parameters must be names or patterns of parameters, got {others[0]}. Name them as"
            " module.named_parameters() does, e.g. parameters='head.*'."
        )
    return named
