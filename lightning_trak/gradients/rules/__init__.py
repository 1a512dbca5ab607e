"""One rule for each type of layer: its parameters' per-sample gradients from its input and output gradient.

A new rule stands in the file of its kind, or in a new one that is imported here.
"""

from __future__ import annotations

from lightning_trak.gradients.rules import attention, convolution, linear, normalization, recurrent
from lightning_trak.gradients.rules.registry import LayerCall, Registered, Rule, find_rule, layer_rule

__all__ = ["LayerCall", "Registered", "Rule", "find_rule", "layer_rule"]
__all__ += ["attention", "convolution", "linear", "normalization", "recurrent"]
