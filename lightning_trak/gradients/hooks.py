"""Per-sample gradients from one forward and one backward pass of the whole batch."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Size, Tensor

from lightning_trak.gradients.calls import WrongRule, layer_gradients
from lightning_trak.gradients.engine import Engine, EngineUnsuitable, NotPrepared, Sink
from lightning_trak.gradients.function import ModelFunction
from lightning_trak.gradients.gradient import DenseGradient
from lightning_trak.gradients.loop import LoopEngine
from lightning_trak.gradients.planning import plan_layers
from lightning_trak.gradients.tracing import Call, Layer, Tracer
from lightning_trak.gradients.vmap import VmapEngine


class HooksEngine:
    """One batched forward and backward pass; per-sample gradients follow from layers' inputs and output gradients.

    For each attributed parameter, `prepare` finds the first of these methods that is right on a few examples:

    1. A rule, if its layer has one (`layer_rule`).
    2. A copy for each example, if the model accepts copies, as of a scale or a class token (`CopyTrial`).
    3. Running its module again, per sample, if the module is called on the batch (`module_gradients`).
    4. Differentiating the whole model, per sample, with respect to such parameters only: by `vmap`, else in a loop.
       Parameters that are used outside their modules need this, and those whose use mixes axes.

    Goodfellow, "Efficient per-example gradient computations", arXiv 1510.01799; Rochette, Manoel, Tramel, "Efficient
    per-example gradient computations in convolutional neural networks", arXiv 1912.06015.
    """

    name = "hooks"
    batch_size: int | None = None

    def __init__(self) -> None:
        self._layers: list[Layer] = []
        self._handled: list[str] = []
        self._copies: dict[str, Size] = {}
        self._copying = True
        self._others: Engine | None = None
        self._other_names: list[str] = []
        self._reasons: dict[str, str] = {}

    def prepare(self, function: ModelFunction, batch: Any, size: int) -> None:
        """Find a method for every parameter; see `Engine.prepare`. What an earlier batch showed is kept."""
        known = {layer.name: layer for layer in self._layers if layer.known}
        layers, self._copies, self._reasons = plan_layers(function, batch, size, copying=self._copying)
        self._layers = [layer if layer.known else known.get(layer.name, layer) for layer in layers]
        self._other_names = [name for name in function.parameters if name in self._reasons]
        self._handled = [name for name in function.parameters if name not in self._reasons]
        if not self._handled:
            raise EngineUnsuitable(f"no parameter is left to hooks; e.g. {_first(self._reasons)}")
        self._others = _engine_for(function.restrict(self._other_names), batch, size) if self._other_names else None

    def __call__(self, function: ModelFunction, batch: Any, size: int, sink: Sink) -> Tensor:
        """Send the gradients layer by layer, as the backward pass reaches them; see `Engine`."""
        lengths = _Lengths(size)

        def receive(call: Call, grads: tuple[Tensor | None, ...]) -> None:
            if not _is_known(call.layer, grads):
                return
            lengths.check(call.layer, grads[0])
            for name, gradient in layer_gradients(call, grads, size).items():
                if name in names:
                    sink(slice(0, size), name, gradient)

        names = set(self._handled)
        outputs, arrived = self._run(Tracer(self._layers, receive), function, batch, size)
        for name, gradient in arrived.items():
            if name not in self._copies:
                raise EngineUnsuitable(f"{name} is used outside its layers, but was not on the first examples")
            sink(slice(0, size), name, DenseGradient(gradient.reshape(size, *function.parameters[name].shape)))
        if self._others is not None:
            self._others(function.restrict(self._other_names), batch, size, sink)
        return outputs

    def _run(self, tracer: Tracer, function: ModelFunction, batch: Any, size: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Run both passes with copies. If copies do not fit a batch, none are used from then on."""
        try:
            return tracer.run(function.with_copies(self._copies, size), batch, size, names=self._handled)
        except (torch.OutOfMemoryError, EngineUnsuitable, WrongRule):
            raise
        except RuntimeError as error:
            if not self._copies:
                raise
            self._copying = False
            raise NotPrepared(f"copies of {next(iter(self._copies))} did not fit this batch: {error}") from error

    def __str__(self) -> str:
        said = [self.name]
        own = [layer for layer in self._layers if layer.rule is None]
        if own:
            said.append(f"{len(own)} modules without a rule run again (e.g. {own[0].name})")
        if self._others is not None:
            total = len(self._other_names) + len(self._handled)
            by = f"{self._others.name} for {len(self._other_names)} of {total} parameters"
            said.append(f"{by} ({_first(self._reasons)})")
        return ", ".join(said)


def _is_known(layer: Layer, grads: Sequence[Tensor | None]) -> bool:
    """Tell whether a gradient reached a layer in the trial; if not, raise if one reaches it now."""
    if not layer.known and any(grad is not None and bool(grad.any()) for grad in grads):
        raise NotPrepared(f"no gradient reached {layer.name} on the first examples, but one does now")
    return layer.known


class _Lengths:
    """Checks that the rows of layers' outputs are still those of whole examples, as in the trial.

    Rows may be examples × positions, and batches may differ in the number of positions. Then it changes by the same
    ratio in all layers. Data-dependent routing, as to experts, shows as a changed number of rows.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._ratios: set[Fraction] | None = None

    def check(self, layer: Layer, grad: Tensor | None) -> None:
        """Raise EngineUnsuitable if the rows of a layer's output gradient are not those of whole examples."""
        if not layer.positions or grad is None or layer.batch_axis == "second" or not self._size:
            return
        rows, left = divmod(len(grad), self._size)
        possible = {Fraction(rows, positions) for positions in layer.positions if positions > 1}
        if left == 0 and (rows == 1 and 1 in layer.positions):
            return
        if possible and self._ratios is not None:
            possible &= self._ratios
        if left or not possible:
            raise EngineUnsuitable(f"the rows of {layer.name} are not those of whole examples in every batch")
        self._ratios = possible


def _engine_for(function: ModelFunction, batch: Any, size: int) -> Engine:
    """Return the best engine for a part of the parameters."""
    try:
        engine: Engine = VmapEngine()
        engine.prepare(function, batch, size)
    except EngineUnsuitable:
        engine = LoopEngine()
        engine(function, batch, size, lambda *_: None)
    return engine


def _first(reasons: dict[str, str]) -> str:
    name = next(iter(reasons))
    return f"{name}: {reasons[name]}"
