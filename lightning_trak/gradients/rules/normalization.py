"""Rules for layers that scale and shift: normalisations, and PReLU."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_trak.gradients.engine import EngineUnsuitable
from lightning_trak.gradients.gradient import Gradient
from lightning_trak.gradients.rules.registry import LayerCall, layer_rule

Gradients = dict[str, Gradient | Tensor]


@layer_rule(nn.LayerNorm)
def layer_norm(layer: nn.LayerNorm, call: LayerCall) -> Gradients:
    """y = γ x̂ + β with x̂ normalised over the last axes, those of γ."""
    return _last_axes(F.layer_norm(call.input, layer.normalized_shape, eps=layer.eps), call.grad, layer)


@layer_rule(nn.RMSNorm)
def rms_norm(layer: nn.RMSNorm, call: LayerCall) -> Gradients:
    """y = γ x̂ with x̂ = x / RMS(x) over the last axes."""
    return _last_axes(F.rms_norm(call.input, layer.normalized_shape, eps=layer.eps), call.grad, layer)


@layer_rule(nn.GroupNorm)
def group_norm(layer: nn.GroupNorm, call: LayerCall) -> Gradients:
    """y = γ x̂ + β with x̂ normalised over groups of channels."""
    return _channels(F.group_norm(call.input, layer.num_groups, eps=layer.eps), call.grad)


@layer_rule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def instance_norm(layer: Any, call: LayerCall) -> Gradients:
    """y = γ x̂ + β with x̂ normalised over the positions of every channel of every example."""
    own = layer.running_mean is None
    return _channels(
        F.instance_norm(call.input, layer.running_mean, layer.running_var, use_input_stats=own, eps=layer.eps),
        call.grad,
    )


@layer_rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def batch_norm(layer: Any, call: LayerCall) -> Gradients:
    """y = γ x̂ + β with x̂ from the running statistics, as in eval mode."""
    if layer.training or layer.running_mean is None:
        raise EngineUnsuitable("batch normalisation by the statistics of the batch mixes its examples")
    return _channels(F.batch_norm(call.input, layer.running_mean, layer.running_var, eps=layer.eps), call.grad)


@layer_rule(nn.PReLU)
def prelu(layer: nn.PReLU, call: LayerCall) -> Gradients:
    """y = max(0, x) + a min(0, x), with one a in all or one for each channel."""
    grads = call.grad * call.input.clamp(max=0)
    if layer.num_parameters == 1:
        return {"weight": grads.flatten(1).sum(1, keepdim=True)}
    return {"weight": grads.flatten(2).sum(2)} if grads.ndim > 2 else {"weight": grads}


def _last_axes(normalized: Tensor, grad: Tensor, layer: nn.LayerNorm | nn.RMSNorm) -> Gradients:
    axes = len(layer.normalized_shape)
    positions = list(range(1, grad.ndim - axes))
    if not positions:
        return {"weight": grad * normalized, "bias": grad}
    return {"weight": (grad * normalized).sum(positions), "bias": grad.sum(positions)}


def _channels(normalized: Tensor, grad: Tensor) -> Gradients:
    if grad.ndim == 2:
        return {"weight": grad * normalized, "bias": grad}
    return {"weight": (grad * normalized).flatten(2).sum(2), "bias": grad.flatten(2).sum(2)}
