"""Rules for convolutions and transposed convolutions in one, two and three dimensions."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad

from lightning_trak.gradients.gradient import ConvGradient, Gradient
from lightning_trak.gradients.rules.registry import LayerCall, layer_rule


@layer_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def convolution(layer: Any, call: LayerCall) -> dict[str, Gradient | Tensor]:
    """y = W ∗ x + b, with all strides, dilations, groups and padding modes of torch."""
    inputs, padding = call.input, layer.padding
    if layer.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        inputs = pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
        padding = (0,) * len(layer.stride)
    return {"weight": _weight(layer, inputs, call.grad, padding), "bias": call.grad.flatten(2).sum(2)}


@layer_rule(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def transposed_convolution(layer: Any, call: LayerCall) -> dict[str, Gradient | Tensor]:
    """The adjoint of a convolution: its weight's gradient is that of the convolution from output to input."""
    return {"weight": _weight(layer, call.grad, call.input, layer.padding), "bias": call.grad.flatten(2).sum(2)}


def _weight(layer: Any, inputs: Tensor, grads: Tensor, padding: tuple[int, ...]) -> ConvGradient:
    options = {"stride": layer.stride, "dilation": layer.dilation, "groups": layer.groups}
    return ConvGradient(inputs, grads, layer.weight.shape, padding=padding, **options)
