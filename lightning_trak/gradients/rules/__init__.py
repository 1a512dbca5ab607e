"""One rule for each type of layer: its parameters' per-sample gradients from its input and output gradient."""

from __future__ import annotations

from lightning_trak.gradients.rules import attention, convolution, linear, normalization, recurrent
from lightning_trak.gradients.rules.registry import LayerCall, Registered, Rule, find_rule, layer_rule

__all__ = ["LayerCall", "Registered", "Rule", "find_rule", "layer_rule"]
__all__ += ["attention", "convolution", "linear", "normalization", "recurrent"]
