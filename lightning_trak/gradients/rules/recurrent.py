"""The rule for LSTM, GRU and RNN: the gates are linear layers, reached by running the recurrence step by step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lightning_trak.gradients.engine import EngineUnsuitable
from lightning_trak.gradients.gradient import Gradient, OuterGradient
from lightning_trak.gradients.rules.registry import LayerCall, layer_rule


@layer_rule(nn.LSTM, nn.GRU, nn.RNN, whole=True)
def recurrent(layer: Any, call: LayerCall) -> dict[str, Gradient | Tensor]:
    """Run the layer again, step by step, and differentiate with respect to the gates' pre-activations.

    These are Wᵢ xₜ + bᵢ and Wₕ hₜ₋₁ + bₕ, so the rule for linear layers applies to both.
    """
    inputs = call.args[0] if call.args else (call.kwargs or {})["input"]
    if not isinstance(inputs, Tensor) or inputs.ndim != 3 or layer.proj_size:
        raise EngineUnsuitable(f"nn.{type(layer).__name__} of a packed or unbatched sequence, or with proj_size")
    inputs = inputs.transpose(0, 1) if layer.batch_first else inputs
    states = call.args[1] if len(call.args) > 1 else (call.kwargs or {}).get("hx")
    steps: dict[str, list[tuple[Tensor, Tensor]]] = {}
    with torch.enable_grad():
        outputs, last = _run(layer, inputs, _initial(layer, inputs, states), steps)
        outputs = outputs.transpose(0, 1) if layer.batch_first else outputs
        used = [(out, grad) for out, grad in zip((outputs, *last), call.grads, strict=True) if grad is not None]
        gates = [gate for pairs in steps.values() for _, gate in pairs]
        grads = iter(
            torch.autograd.grad([out for out, _ in used], gates, [grad for _, grad in used], materialize_grads=True)
        )
    gradients: dict[str, Gradient | Tensor] = {}
    for suffix, pairs in steps.items():
        values = torch.stack([value.detach() for value, _ in pairs], dim=1)
        stacked = torch.stack([next(grads) for _ in pairs], dim=1).detach()
        gradients[f"weight_{suffix}"] = OuterGradient(stacked, values)
        gradients[f"bias_{suffix}"] = stacked.sum(1)
    return gradients


def _initial(layer: Any, inputs: Tensor, states: Any) -> list[Tensor]:
    """Return the initial h, and c of an LSTM, each (layers · directions, b, hidden)."""
    count = 2 if isinstance(layer, nn.LSTM) else 1
    if states is None:
        shape = (layer.num_layers * (1 + layer.bidirectional), inputs.shape[1], layer.hidden_size)
        return [inputs.new_zeros(shape)] * count
    return list(states) if count == 2 else [states]


def _run(
    layer: Any, inputs: Tensor, initial: list[Tensor], steps: dict[str, list[tuple[Tensor, Tensor]]]
) -> tuple[Tensor, list[Tensor]]:
    """Run all layers and directions; return the outputs (T, b, ·) and the last states, as the layer does."""
    last = []
    for number in range(layer.num_layers):
        directions = []
        for reverse in range(1 + layer.bidirectional):
            suffix = f"l{number}" + "_reverse" * reverse
            place = number * (1 + layer.bidirectional) + reverse
            outputs, state = _scan(layer, suffix, inputs, [value[place] for value in initial], bool(reverse), steps)
            directions.append(outputs)
            last.append(state)
        inputs = torch.cat(directions, dim=-1)
    return inputs, [torch.stack(values) for values in zip(*last, strict=True)]


def _scan(
    layer: Any,
    suffix: str,
    inputs: Tensor,
    state: list[Tensor],
    reverse: bool,
    steps: dict[str, list[tuple[Tensor, Tensor]]],
) -> tuple[Tensor, list[Tensor]]:
    """Run one direction of one layer over time; record (input, pre-activations) of each of its two linear layers."""
    weights = [getattr(layer, f"weight_{side}_{suffix}").detach() for side in ("ih", "hh")]
    biases = [getattr(layer, f"bias_{side}_{suffix}").detach() if layer.bias else None for side in ("ih", "hh")]
    outputs: list[Any] = [None] * len(inputs)
    order = range(len(inputs))
    for time in reversed(order) if reverse else order:
        gates = []
        for side, value, weight, bias in zip(("ih", "hh"), (inputs[time], state[0]), weights, biases, strict=True):
            gate = linear(value, weight, bias)
            gate = gate if gate.requires_grad else gate.requires_grad_()
            steps.setdefault(f"{side}_{suffix}", []).append((value, gate))
            gates.append(gate)
        state = _cell(layer, gates[0], gates[1], state)
        outputs[time] = state[0]
    return torch.stack(outputs), state


def _cell(layer: Any, from_input: Tensor, from_hidden: Tensor, state: list[Tensor]) -> list[Tensor]:
    """One step, from the pre-activations (b, gates · hidden) to the next state."""
    if isinstance(layer, nn.LSTM):
        i, f, g, o = (from_input + from_hidden).chunk(4, dim=1)
        c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        return [o.sigmoid() * c.tanh(), c]
    if isinstance(layer, nn.GRU):
        (r, z, n), (hr, hz, hn) = from_input.chunk(3, dim=1), from_hidden.chunk(3, dim=1)
        z = (z + hz).sigmoid()
        new = (n + (r + hr).sigmoid() * hn).tanh()
        return [new + z * (state[0] - new)]
    activate = torch.tanh if layer.nonlinearity == "tanh" else torch.relu
    return [activate(from_input + from_hidden)]
