"""Per-sample gradients of the model output, ∇θ f(z; θ): pure torch, no Lightning."""

from __future__ import annotations

from lightning_trak.gradients.check import GradientsDiffer, check_gradients
from lightning_trak.gradients.engine import Engine, EngineUnsuitable, NotPrepared, Sink
from lightning_trak.gradients.function import ModelFunction
from lightning_trak.gradients.gradient import ConvGradient, DenseGradient, Gradient, OuterGradient, RowsGradient
from lightning_trak.gradients.hooks import HooksEngine
from lightning_trak.gradients.loop import LoopEngine, batch_gradient, numbered_gradient
from lightning_trak.gradients.rules import LayerCall, layer_rule
from lightning_trak.gradients.selector import ENGINES, Selector, Trial
from lightning_trak.gradients.vmap import VmapEngine

__all__ = [
    "ENGINES",
    "ConvGradient",
    "DenseGradient",
    "Engine",
    "EngineUnsuitable",
    "Gradient",
    "GradientsDiffer",
    "HooksEngine",
    "LayerCall",
    "LoopEngine",
    "ModelFunction",
    "NotPrepared",
    "OuterGradient",
    "RowsGradient",
    "Selector",
    "Sink",
    "Trial",
    "VmapEngine",
    "batch_gradient",
    "check_gradients",
    "layer_rule",
    "numbered_gradient",
]
