"""Per-sample gradients from one forward and one backward pass of the whole batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_trak.gradients.calls import layer_gradients
from lightning_trak.gradients.engine import Engine, EngineUnsuitable, Sink
from lightning_trak.gradients.function import ModelFunction
from lightning_trak.gradients.loop import LoopEngine
from lightning_trak.gradients.planning import plan_layers
from lightning_trak.gradients.tracing import Call, Layer, Tracer
from lightning_trak.gradients.vmap import VmapEngine


class HooksEngine:
    """One batched forward and backward; every layer's input and output gradient yield its per-sample gradients.

    Each attributed parameter is dealt with by the first of these ways that is right for it, found out by `prepare` on a
    few examples:

    1. its layer has a rule (`layer_rule`): the rule;
    2. its module is called on the batch: the module's own forward is differentiated example by example;
    3. otherwise (it is used outside its module; its use mixes axes): the whole model is differentiated example by
       example for just these parameters, by `vmap` if it can, else one after the other.

    Goodfellow, "Efficient per-example gradient computations", arXiv 1510.01799; Rochette, Manoel, Tramel, "Efficient
    per-example gradient computations in convolutional neural networks", arXiv 1912.06015.
    """

    name = "hooks"
    batch_size: int | None = None

    def __init__(self) -> None:
        self._layers: list[Layer] = []
        self._handled: list[str] = []
        self._others: Engine | None = None
        self._other_names: list[str] = []
        self._reasons: dict[str, str] = {}

    def prepare(self, function: ModelFunction, batch: Any, size: int) -> None:
        """Find a way for every parameter; see `Engine.prepare`."""
        self._layers, self._reasons = plan_layers(function, batch, size)
        self._other_names = [name for name in function.parameters if name in self._reasons]
        self._handled = [name for name in function.parameters if name not in self._reasons]
        if not self._handled:
            raise EngineUnsuitable(f"no parameter is left to hooks; e.g. {_first(self._reasons)}")
        self._others = _engine_for(function.restrict(self._other_names), batch, size) if self._other_names else None

    def __call__(self, function: ModelFunction, batch: Any, size: int, sink: Sink) -> Tensor:
        """Send the gradients layer by layer, as the backward pass reaches them; see `Engine`."""

        def receive(call: Call, grads: tuple[Tensor | None, ...]) -> None:
            for name, gradient in layer_gradients(call, grads, size).items():
                if name in names:
                    sink(slice(0, size), name, gradient)

        names = set(self._handled)
        outputs, outside = Tracer(self._layers, receive).run(function, batch, size, names=self._handled)
        if outside:
            raise EngineUnsuitable(f"{outside[0]} is used outside its layers, but not on the first examples")
        if self._others is not None:
            self._others(function.restrict(self._other_names), batch, size, sink)
        return outputs

    def __str__(self) -> str:
        if self._others is None:
            return self.name
        by = f"{self._others.name} for {len(self._other_names)} of {len(self._other_names) + len(self._handled)}"
        return f"{self.name}, {by} parameters ({_first(self._reasons)})"


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
