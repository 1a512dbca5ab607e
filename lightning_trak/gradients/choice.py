"""Which engine differentiates a model: the first, of those that may, that can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_trak.gradients.engine import Engine, EngineUnsuitable
from lightning_trak.gradients.function import ModelFunction
from lightning_trak.gradients.hooks import HooksEngine
from lightning_trak.gradients.loop import LoopEngine
from lightning_trak.gradients.vmap import VmapEngine

ENGINES: dict[str, Callable[[], Engine]] = {"hooks": HooksEngine, "vmap": VmapEngine, "loop": LoopEngine}
"""By name, best first: ``gradients="auto"`` takes the first that suits the model."""


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
        self._reasons: list[str] = []

    def choose(self, function: ModelFunction, batch: Any, size: int) -> Engine:
        """Return the best engine that is left and suits the model, prepared on the examples of ``batch``."""
        while self._left:
            engine = ENGINES[self._left[0]]()
            try:
                engine.prepare(function, batch, size)
                return engine
            except EngineUnsuitable as error:
                self.reject(error)
        raise AssertionError("reject raises when nothing is left")

    def reject(self, error: EngineUnsuitable) -> None:
        """Pass over the engine that was chosen last, because of ``error``."""
        name = self._left.pop(0)
        self._reasons.append(f"not {name}, as {error}")
        if not self._left:
            raise ValueError(
                f"gradients={self._gradients!r} cannot differentiate this model: {error}. Use gradients='auto' or"
                " 'loop'."
            ) from error

    def report(self, engine: Engine) -> str:
        """Say what was chosen, and why nothing better."""
        return "; ".join([f"gradients by {engine}", *self._reasons])
