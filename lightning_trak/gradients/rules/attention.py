"""The rule for `torch.nn.MultiheadAttention`, which has linear projections before and after the attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, multi_head_attention_forward, pad

from lightning_trak.gradients.engine import EngineUnsuitable
from lightning_trak.gradients.gradient import Gradient, OuterGradient
from lightning_trak.gradients.rules.linear import over_positions
from lightning_trak.gradients.rules.registry import LayerCall, layer_rule

_NAMES = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")
_DEFAULTS = {"key_padding_mask": None, "attn_mask": None, "is_causal": False}


@layer_rule(nn.MultiheadAttention, whole=True)
def multihead_attention(layer: nn.MultiheadAttention, call: LayerCall) -> dict[str, Gradient | Tensor]:
    """Linear rules for the projections before and after the attention, which is run again between them."""
    given = {**_DEFAULTS, **dict(zip(_NAMES, call.args, strict=False)), **(call.kwargs or {})}
    if layer.bias_k is not None or call.grads[0] is None or any(grad is not None for grad in call.grads[1:]):
        raise EngineUnsuitable("nn.MultiheadAttention with add_bias_kv, or whose attention weights enter the output")

    def first(tensor: Tensor) -> Tensor:
        return tensor if layer.batch_first else tensor.transpose(0, 1)

    inputs = [first(given[name]) for name in ("query", "key", "value")]
    if inputs[0].ndim != 3:
        raise EngineUnsuitable("nn.MultiheadAttention of one sequence without a batch axis")
    grad = first(call.grads[0])
    projected = _project(layer, inputs)
    heads, sent_back = _attend(layer, projected, grad @ layer.out_proj.weight, given)
    gradients: dict[str, Gradient | Tensor] = {
        "out_proj.weight": OuterGradient(grad, heads),
        "out_proj.bias": over_positions(grad),
    }
    if layer.in_proj_weight is None:
        for name, grads, values in zip("qkv", sent_back, inputs, strict=True):
            gradients[f"{name}_proj_weight"] = OuterGradient(grads, values)
    else:
        gradients["in_proj_weight"] = _joined(sent_back, inputs)
    gradients["in_proj_bias"] = torch.cat([over_positions(grads) for grads in sent_back], dim=1)
    return gradients


def _project(layer: nn.MultiheadAttention, inputs: list[Tensor]) -> list[Tensor]:
    """Return queries, keys and values, each (b, T, E)."""
    if layer.in_proj_weight is None:
        weights = [layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight]
    else:
        weights = list(layer.in_proj_weight.chunk(3))
    biases = [None] * 3 if layer.in_proj_bias is None else list(layer.in_proj_bias.chunk(3))
    return [linear(*three) for three in zip(inputs, weights, biases, strict=True)]


def _attend(
    layer: nn.MultiheadAttention, projected: list[Tensor], grad: Tensor, given: dict[str, Any]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Attend with torch's own function, its projections set to the identity; then differentiate.

    Returns:
        The joined heads, (b, T, E), and the gradients by queries, keys and values, each (b, T, E).
    """
    size = layer.embed_dim
    eye = torch.eye(size, dtype=grad.dtype, device=grad.device)
    with torch.enable_grad():
        query, key, value = leaves = [part.detach().transpose(0, 1).requires_grad_() for part in projected]
        heads, _ = multi_head_attention_forward(
            query,
            key,
            value,
            size,
            layer.num_heads,
            torch.cat([eye] * 3),
            None,
            None,
            None,
            layer.add_zero_attn,
            0.0,
            eye,
            None,
            training=False,
            key_padding_mask=given["key_padding_mask"],
            need_weights=False,
            attn_mask=given["attn_mask"],
            is_causal=given["is_causal"],
        )
        grads = torch.autograd.grad(heads, leaves, grad.transpose(0, 1))
    return heads.detach().transpose(0, 1), tuple(part.transpose(0, 1) for part in grads)


def _is_same(one: Tensor, other: Tensor) -> bool:
    views = (one.data_ptr(), one.shape, one.stride()) == (other.data_ptr(), other.shape, other.stride())
    return views or (one.shape == other.shape and torch.equal(one, other))


def _joined(grads: tuple[Tensor, ...], inputs: list[Tensor]) -> Gradient:
    """Return the gradients of the three stacked projections; three inputs make three times as many positions."""
    if all(_is_same(inputs[0], other) for other in inputs[1:]):
        return OuterGradient(torch.cat(grads, dim=-1), inputs[0])
    size = grads[0].shape[-1]
    blocks = [pad(part, (place * size, (2 - place) * size)) for place, part in enumerate(grads)]
    return OuterGradient(torch.cat(blocks, dim=1), torch.cat(inputs, dim=1))
