"""Which layers can be left to hooks, and which axis of their outputs is the batch: tried on a few examples."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Size, Tensor, nn

from lightning_trak.gradients.calls import layer_gradients, move_batch_first
from lightning_trak.gradients.copies import CopyTrial
from lightning_trak.gradients.engine import EngineUnsuitable, close
from lightning_trak.gradients.function import ModelFunction
from lightning_trak.gradients.loop import numbered_gradient
from lightning_trak.gradients.modulewise import rows_of_examples
from lightning_trak.gradients.rules import find_rule
from lightning_trak.gradients.tracing import Call, Layer, Tracer

_AXES = ("first", "second", "minor")


def plan_layers(
    function: ModelFunction, batch: Any, size: int, copying: bool = True
) -> tuple[list[Layer], dict[str, Size], dict[str, str]]:
    """Find the layers that hooks can differentiate, and parameters that can be copied instead.

    Every example i gets its own weight vᵢ, and the weighted sum of the outputs is differentiated. The batch axis of a
    layer's output is the axis along which the entries of its gradient scale with vᵢ. This works for every shape. It
    also shows a layer whose output is shared by all examples. The batch has at least two examples, if there are as
    many. ``copying`` says whether copies may be used.

    Returns:
        The layers; the shapes of copies; and for each parameter that is left to neither, the reason.
    """
    weights, outputs, reference = numbered_gradient(function, batch, size)
    reasons: dict[str, str] = {}
    layers = []
    found = find_layers(function)
    copies = CopyTrial(function, batch, weights, outputs, reference).find(found) if copying else {}
    function = function.restrict(name for name in function.parameters if name not in copies)
    trial = _Trial(function, batch, size, weights, outputs)
    for layer in trial.with_axes(_without(found, copies)):
        if isinstance(layer, Layer):
            layers.append(layer)
        else:
            reasons.update(layer)
    sums, seen, outside, refused = trial.weighted_sums(layers)
    for name, gradient in reference.items():
        if name in reasons or name in copies:
            continue
        if name in outside:
            reasons[name] = "used outside its module"
        elif name not in seen:
            reasons[name] = refused.get(name, "no gradient passes through its module, or it cannot be run again")
        elif name in sums and not close(sums[name], gradient, function.tolerance):
            reasons[name] = "its module mixes examples"
    return _without(layers, reasons), copies, reasons


def _without(layers: list[Layer], names: Container[str]) -> list[Layer]:
    """Remove some parameters, and layers that have none left."""
    for layer in layers:
        layer.parameters = {local: name for local, name in layer.parameters.items() if name not in names}
    return [layer for layer in layers if layer.parameters]


def find_layers(function: ModelFunction) -> list[Layer]:
    """List the modules that own attributed parameters, each with its rule, in the model's order."""
    canonical = {id(value): name for name, value in function.module.named_parameters()}
    layers: list[Layer] = []
    covered: set[nn.Module] = set()
    for path, module in function.module.named_modules():
        if module in covered or isinstance(module, torch.jit.ScriptModule):
            continue
        found = find_rule(module)
        whole = found is not None and found.whole
        if whole:
            covered.update(module.modules())
        own = module.named_parameters(recurse=whole, remove_duplicate=False)
        firsts: dict[str, str] = {}  # one parameter may be registered several times
        for local, value in own:
            firsts.setdefault(canonical[id(value)], local)
        names = {local: name for name, local in firsts.items() if name in function.parameters}
        if names:
            rule = None if found is None else found.rule
            layers.append(Layer(module, path or type(module).__name__, names, rule, whole))
    return layers


class _Trial:
    """Runs the model on a few examples to see what its layers do."""

    def __init__(self, function: ModelFunction, batch: Any, size: int, weights: Tensor, outputs: Tensor) -> None:
        self._function, self._batch, self._size = function, batch, size
        self._weights, self._outputs = weights, outputs

    def with_axes(self, layers: list[Layer]) -> list[Layer | dict[str, str]]:
        """Set every layer's batch axis; replace a layer that has none by the reason, for each of its parameters."""
        plain, weighted = self._gradients(layers, None), self._gradients(layers, self._weights)
        found: list[Layer | dict[str, str]] = []
        shared: list[Layer] = []
        for layer in layers:
            pairs = list(zip(plain[id(layer)], weighted[id(layer)], strict=True))
            axis = next((axis for axis in _AXES if all(self._scales(*pair, axis) for pair in pairs)), None)
            reached = any(bool(gradient.any()) for gradient, _ in pairs)
            layer.known = layer.whole or reached
            if reached and layer.rule is not None and not layer.whole:
                if axis is not None:
                    layer.batch_axis = axis
                    layer.positions = {len(gradient) // self._size for gradient, _ in pairs}
                elif not self._can_be_repeated(layer, [gradient for gradient, _ in pairs], shared):
                    why = "no axis of its layer's output is the batch"
                    found.append(dict.fromkeys(layer.parameters.values(), why))
                    continue
            found.append(layer)
        return found

    def _can_be_repeated(self, layer: Layer, gradients: Sequence[Tensor], others: list[Layer]) -> bool:
        """Try to repeat a layer's output for every example, as for position embeddings; keep that if it works.

        If some ``others`` are repeated already, try first without. One of them may come before this layer, whose output
        then has a batch axis.
        """
        ways = [None] if others else []
        for layer.shared in (*ways, "leading" if all(len(gradient) == 1 for gradient in gradients) else "missing"):
            try:
                plain, weighted = (self._gradients([*others, layer], weights) for weights in (None, self._weights))
            except Exception:  # with one more axis, a model may fail in any way
                continue
            pairs = list(zip(plain[id(layer)], weighted[id(layer)], strict=True))
            if all(len(gradient) == self._size and self._scales(gradient, other, "first") for gradient, other in pairs):
                layer.positions = {1}
                if layer.shared is not None:
                    others.append(layer)
                return True
        layer.shared = None
        return False

    def _gradients(self, layers: list[Layer], weights: Tensor | None) -> dict[int, list[Tensor]]:
        """Return the gradients of the first output of every call of every layer."""
        found: dict[int, list[Tensor]] = {id(layer): [] for layer in layers}

        def note(call: Call, grads: tuple[Tensor | None, ...]) -> None:
            found[id(call.layer)] += [grad for grad in grads if grad is not None][:1]

        watched = {name for layer in layers for name in layer.parameters.values()}  # detached, and so cheap
        names = [*watched] if watched >= self._function.parameters.keys() else []
        outputs, _ = Tracer(layers, note).run(self._function, self._batch, self._size, weights, names)
        if not self._close(outputs, self._outputs):
            raise EngineUnsuitable("the model's output changes when its layers are watched")
        return found

    def _close(self, one: Tensor, other: Tensor) -> bool:
        return close(one, other, self._function.tolerance)

    def _scales(self, plain: Tensor, weighted: Tensor, axis: str) -> bool:
        """Tell whether a gradient's entries scale with the examples' weights along an axis."""
        if plain.ndim == 0 or (axis == "second" and (plain.ndim < 2 or plain.shape[1] != self._size)):
            return False
        if axis != "second" and len(plain) % self._size:
            return False
        first, second = (move_batch_first(grad, axis, self._size).reshape(self._size, -1) for grad in (plain, weighted))
        return self._close(first * self._weights[:, None].to(first), second)

    def weighted_sums(self, layers: list[Layer]) -> tuple[dict[str, Tensor], set[str], set[str], dict[str, str]]:
        """Return Σᵢ vᵢ gᵢ of the parameters whose gradients have to be checked.

        Also return the parameters that were seen at all, those used elsewhere, and those that were refused, with the
        reason. A layer whose rule refuses it is treated as one without a rule from here on.
        """
        sums: dict[str, Tensor] = {}
        seen: set[str] = set()
        refused: list[tuple[Layer, str]] = []

        def receive(call: Call, grads: tuple[Tensor | None, ...]) -> None:
            if not call.layer.known:
                seen.update(call.layer.parameters.values())
                return
            call.layer.batched[call.number] = rows_of_examples(call.tensors(), self._size)
            try:
                gradients = layer_gradients(call, grads, self._size)
            except EngineUnsuitable as error:
                refused.append((call.layer, str(error)))
                return
            seen.update(gradients)
            if call.layer.rule is None or call.layer.whole:
                for name, gradient in gradients.items():
                    total = gradient.weighted_sum(self._weights)
                    sums[name] = sums[name] + total if name in sums else total

        names = [name for layer in layers for name in layer.parameters.values()]
        tracer = Tracer(layers, receive)
        outputs, outside = tracer.run(self._function, self._batch, self._size, names=list(dict.fromkeys(names)))
        if not self._close(outputs, self._outputs):
            raise EngineUnsuitable("the model's output changes when outputs of layers are repeated")
        with_rule = [layer for layer, _ in refused if layer.rule is not None]
        for layer in with_rule:
            layer.rule = None
        if with_rule:
            return self.weighted_sums(layers)
        # If another layer has such a parameter too, a part of its gradient is missing.
        missed = {name: why for layer, why in refused for name in layer.parameters.values()}
        return sums, seen - missed.keys(), set(outside), missed
