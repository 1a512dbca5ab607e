"""Per-sample gradients of the model output, ∇θ f(z; θ): pure torch, no Lightning."""

from __future__ import annotations

from collections.abc import Callable

from lightning_trak.gradients.engine import Engine, EngineUnsuitable, Sink
from lightning_trak.gradients.function import ModelFunction
from lightning_trak.gradients.loop import LoopEngine, batch_gradient
from lightning_trak.gradients.vmap import VmapEngine

__all__ = ["Engine", "EngineUnsuitable", "LoopEngine", "ModelFunction", "Sink", "VmapEngine", "batch_gradient"]

ENGINES: dict[str, Callable[[], Engine]] = {"vmap": VmapEngine, "loop": LoopEngine}
"""By name, best first: ``gradients="auto"`` tries them in this order."""
