"""Which engine differentiates a model: the first, of those that may, that can."""

from __future__ import annotations

from collections.abc import Callable
from textwrap import shorten
from typing import Any

import torch

from lightning_trak.gradients.calls import WrongRule
from lightning_trak.gradients.engine import Engine, EngineUnsuitable
from lightning_trak.gradients.function import ModelFunction
from lightning_trak.gradients.hooks import HooksEngine
from lightning_trak.gradients.loop import LoopEngine
from lightning_trak.gradients.vmap import VmapEngine

_LONGEST = 160  # characters of a reason

ENGINES: dict[str, Callable[[], Engine]] = {"hooks": HooksEngine, "vmap": VmapEngine, "loop": LoopEngine}
"""By name, best first: ``gradients="auto"`` takes the first that suits the model."""


def _short(why: str) -> str:
    """Cut a reason, so that a report stays one line."""
    return shorten(why, _LONGEST, placeholder=" ...")


class EngineChoice:
    """Tries engines on a few examples, and remembers why some were passed over.

    Args:
        gradients: ``"auto"`` or the name of the one engine that may be taken.

    Raises:
        ValueError: from `choose` and `reject`, when no engine is left.
    """

    def __init__(self, gradients: str) -> None:
        self._gradients = gradients
        self._left = list(ENGINES) if gradients == "auto" else [gradients]
        self._rejected: list[str] = []
        self._unprepared: list[str] = []

    def choose(self, function: ModelFunction, batch: Any, size: int) -> Engine:
        """Return the best engine that suits the model at these weights, prepared on the examples of ``batch``."""
        self._unprepared = []
        for name in self._left:
            engine, last = ENGINES[name](), name == self._left[-1]
            try:
                engine.prepare(function, batch, size)
                return engine
            except (WrongRule, torch.OutOfMemoryError):
                raise
            except Exception as error:  # the model works: whatever goes wrong here is for want of understanding it
                why = str(error) if isinstance(error, EngineUnsuitable) else f"{type(error).__name__}: {error}"
                if last:
                    raise self._none_left(why) from error
                self._unprepared.append(f"not {name}, as {_short(why)}")
        raise AssertionError("the last engine raises if it fails")

    def reject(self, engine: Engine, error: EngineUnsuitable) -> None:
        """Never choose an engine again, because of an ``error`` that came up in use."""
        self._left.remove(engine.name)
        self._rejected.append(f"not {engine.name}, as {_short(str(error))}")
        if not self._left:
            raise self._none_left(str(error)) from error

    def report(self, engine: Engine) -> str:
        """Say what was chosen, and why nothing better."""
        return "; ".join([f"gradients by {engine}", *self._rejected, *self._unprepared])

    def _none_left(self, why: str) -> ValueError:
        others = "" if self._gradients in ("auto", "loop") else " Use gradients='auto' or 'loop'."
        return ValueError(f"gradients={self._gradients!r} cannot differentiate this model: {why.rstrip('.')}.{others}")
