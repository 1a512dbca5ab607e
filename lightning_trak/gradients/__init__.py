"""Per-sample gradients of the model output, ∇θ f(z; θ): pure torch, no Lightning.

``gradients="auto"`` takes the first engine that suits the model:

- ``"hooks"``: one forward and one backward pass of the whole batch. The gradients of a layer's parameters follow from
  its inputs and the gradients of its outputs, by a rule for each type of layer (`layer_rule`): linear layers,
  convolutions and transposed ones, embeddings, normalisations, PReLU, multi-head attention, LSTM, GRU and RNN. What has
  no rule is differentiated per sample; see `HooksEngine`.
- ``"vmap"``: ``torch.func.vmap`` over the whole model.
- ``"loop"``: one backward pass for each example.

Which engine was chosen, and for which parameters another one and why, is reported once. On a few examples of every
checkpoint the per-sample gradients, with random weights, must add up to autograd's gradient of the batch, for each
parameter. If they do not, that is an error (`GradientsDiffer`).
"""

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
