"""Rules for layers that multiply by a matrix, or look up its rows, at every position."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_trak.gradients.engine import EngineUnsuitable
from lightning_trak.gradients.gradient import Gradient, OuterGradient, RowsGradient
from lightning_trak.gradients.rules.registry import LayerCall, layer_rule


def over_positions(grad: Tensor) -> Tensor:
    """Sum (b, ..., O) over everything between batch and last axis: the gradients of a bias, (b, O)."""
    return grad.flatten(1, -2).sum(1) if grad.ndim > 2 else grad


@layer_rule(nn.Linear)
def linear(layer: nn.Linear, call: LayerCall) -> dict[str, Gradient | Tensor]:
    """y = W x + b at every position: ∂f/∂W = Σₜ gₜ xₜᵀ, ∂f/∂b = Σₜ gₜ."""
    return {"weight": OuterGradient(call.grad, call.input), "bias": over_positions(call.grad)}


@layer_rule("transformers.pytorch_utils.Conv1D")
def transposed_linear(layer: Any, call: LayerCall) -> dict[str, Gradient | Tensor]:
    """y = Wᵀ x + b, GPT-2's linear layer in Hugging Face transformers."""
    return {"weight": OuterGradient(call.input, call.grad), "bias": over_positions(call.grad)}


@layer_rule(nn.Embedding)
def embedding(layer: nn.Embedding, call: LayerCall) -> dict[str, Gradient | Tensor]:
    """y = W[index]: only the rows that are looked up have gradients, except that of ``padding_idx``."""
    if layer.scale_grad_by_freq or layer.max_norm is not None:
        raise EngineUnsuitable("nn.Embedding with scale_grad_by_freq or max_norm depends on the whole batch")
    values = call.grad
    if layer.padding_idx is not None:
        values = values.masked_fill((call.input == layer.padding_idx).unsqueeze(-1), 0)
    return {"weight": RowsGradient(call.input, values, layer.num_embeddings)}
