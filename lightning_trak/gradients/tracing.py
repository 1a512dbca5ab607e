"""One forward and one backward pass that yields every call of a layer, with its inputs and output gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook

from lightning_trak.data.batch import map_tensors, tensors_of
from lightning_trak.gradients.engine import EngineUnsuitable
from lightning_trak.gradients.function import ModelFunction
from lightning_trak.gradients.rules import Rule


@dataclass
class Layer:
    """A module that is watched, and what the trial showed about it.

    Attributes:
        module: the module.
        name: its name in the model.
        parameters: attributed parameters that it uses: name in the module → name in the model.
        rule: computes their gradients; None if the module's own forward is differentiated per sample.
        whole: whether the rule takes the call as it is; see `layer_rule`.
        batch_axis: of its output. ``"first"``: the first axis is the batch, or examples × positions. ``"second"``: the
            second. ``"minor"``: the first axis is positions × examples.
        shared: set if it is called once for all examples, so that its output must be repeated for each. ``"leading"``:
            the output has a batch axis of size one. ``"missing"``: it has none. None for any other layer.
        known: whether a gradient reached it in the trial; if none did, the trial showed nothing.
        positions: the numbers of rows that an example had in the trial, where rows are examples × positions.
        batched: for a module without a rule: which tensor arguments had the batch axis first, by number of the call.
    """

    module: nn.Module
    name: str
    parameters: dict[str, str]
    rule: Rule | None
    whole: bool = False
    batch_axis: str = "first"
    shared: str | None = None
    known: bool = True
    positions: set[int] = field(default_factory=set)
    batched: dict[int, list[bool]] = field(default_factory=dict)


@dataclass
class Call:
    """One call of a layer: its arguments, kept until the gradients of its outputs are known.

    Attributes:
        layer: which one.
        args: positional arguments.
        kwargs: keyword arguments.
        number: how often the layer was called before, in this forward pass.
        versions: version counters of the tensors among the arguments.
    """

    layer: Layer
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    number: int = 0
    versions: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.versions = [tensor._version for tensor in self.tensors()]

    def tensors(self) -> list[Tensor]:
        """Return its arguments that are tensors."""
        return tensors_of((self.args, self.kwargs))

    def check_unchanged(self) -> None:
        """Raise if an input was overwritten since: what the layer saw is lost."""
        if self.versions != [tensor._version for tensor in self.tensors()]:
            raise EngineUnsuitable(f"an input of {self.layer.name} is modified in place afterwards")


Receive = Callable[[Call, tuple[Tensor | None, ...]], None]


class Tracer:
    """Watches the calls of layers during a forward pass, and hands each over when the backward pass reaches it.

    Within a watched layer its parameters are detached, so no time is spent on gradients summed over the batch. If a
    gradient still arrives at a parameter, it is also used outside the layers that are watched for it.

    Args:
        layers: what to watch.
        receive: takes (call, gradients of its outputs), each as soon as it is known.
    """

    def __init__(self, layers: Sequence[Layer], receive: Receive) -> None:
        self._layers = layers
        self._receive = receive
        self._active = False
        self._size = 0
        self._anchor = torch.zeros(())
        self._calls: dict[int, int] = {}

    def run(
        self, function: ModelFunction, batch: Any, size: int, weights: Tensor | None = None, names: Sequence[str] = ()
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Run one forward and one backward pass of Σᵢ vᵢ f(zᵢ).

        Args:
            function: the model at some weights.
            batch: what ``model_output`` takes.
            size: b, the number of its examples.
            weights: v, (b,); None for ones.
            names: the parameters for which the layers are watched, and others to differentiate with respect to.

        Returns:
            The outputs (b,), and the gradients that arrived at parameters of ``names``, from uses outside the layers.
        """
        self._size, self._calls = size, {}
        own = {name: value.detach() for name, value in function.parameters.items()}
        leaves = {name: own[name].requires_grad_() for name in names}

        def differentiate(batch: Any) -> Tensor:
            output = function.model_output(batch)
            if output.requires_grad and len(output) == size:
                (output if weights is None else output * weights).sum().backward()
            return output.detach()

        self._anchor = torch.zeros((), requires_grad=True)
        with ExitStack() as stack:
            for layer in self._layers:
                stack.enter_context(_replaced_forward(layer.module, partial(self._forward, layer)))
            self._active = True
            stack.callback(setattr, self, "_active", False)
            outputs = function.call(differentiate, batch, parameters={**own, **leaves})
        return outputs, {name: value.grad for name, value in leaves.items() if value.grad is not None}

    def _forward(self, layer: Layer, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._active or not torch.is_grad_enabled():
            return original(*args, **kwargs)
        with _detached(layer):
            result = original(*args, **kwargs)
        number = self._calls[id(layer)] = self._calls.get(id(layer), -1) + 1
        call = Call(layer, args, kwargs, number)
        hooked: list[Tensor] = []
        shapes: list[torch.Size] = []

        def attach(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            tensor = repeated(tensor, layer, self._size)
            if not tensor.requires_grad:
                tensor = _Start.apply(self._anchor, tensor)  # type: ignore[no-untyped-call]
            tensor, whole = hookable(tensor, call)
            hooked.append(whole)
            shapes.append(tensor.shape)
            return tensor

        def received(grads: Sequence[Tensor | None]) -> None:
            shaped = zip(grads, shapes, strict=True)
            self._received(call, tuple(None if grad is None else grad.view(shape) for grad, shape in shaped))

        result = map_tensors(result, attach)
        if len(hooked) == 1:
            hooked[0].register_hook(lambda grad: received([grad]))
        elif hooked:
            register_multi_grad_hook(hooked, received)
        return result

    def _received(self, call: Call, grads: tuple[Tensor | None, ...]) -> None:
        call.check_unchanged()
        self._active = False  # a rule may call the layer again
        try:
            with torch.no_grad():
                self._receive(call, grads)
        finally:
            self._active = True
        call.args, call.kwargs, call.versions = (), {}, []


def hookable(tensor: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Return the output to go on with, and the tensor to hook, with the same entries in the same order.

    The output of a layer may be a view, as that of a linear layer. In-place operations on it bypass the hooks of the
    view, but not those of its base.
    """
    base = tensor._base
    if base is None:
        return tensor, tensor
    whole = base.numel() == tensor.numel() and base.is_contiguous() and tensor.is_contiguous()
    if whole and base.requires_grad and all(other is not base and other._base is not base for other in call.tensors()):
        return tensor, base
    tensor = tensor.clone()
    return tensor, tensor if tensor._base is None else tensor._base  # the copy of a tensor subclass may be a view


def repeated(tensor: Tensor, layer: Layer, size: int) -> Tensor:
    """Repeat for each example what a layer computed once for all."""
    if layer.shared is None:
        return tensor
    tensor = tensor if layer.shared == "leading" else tensor.unsqueeze(0)
    return tensor.expand(size, *tensor.shape[1:]).clone()


class _Start(torch.autograd.Function):
    """A copy that requires a gradient, and at which the backward pass ends: nothing before it is attributed."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tensor: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return torch.zeros(()), None


@contextmanager
def _replaced_forward(module: nn.Module, replacement: Callable[..., Any]) -> Iterator[None]:
    own = vars(module).get("forward")
    module.forward = partial(replacement, module.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own  # type: ignore[method-assign]


@contextmanager
def _detached(layer: Layer) -> Iterator[None]:
    """Detach the attributed parameters that a layer uses; restore them afterwards."""
    found = [
        (layer.module.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]) for path in layer.parameters
    ]
    before = [owner._parameters[name] for owner, name in found]
    _put(layer.module, found, [None if value is None else value.detach() for value in before])
    try:
        yield
    finally:
        _put(layer.module, found, before)


def _put(module: nn.Module, places: Sequence[tuple[nn.Module, str]], values: Sequence[Any]) -> None:
    for (owner, name), value in zip(places, values, strict=True):
        owner._parameters[name] = value
    if isinstance(module, nn.RNNBase):  # it keeps a list of them as well
        module._flat_weights = [getattr(module, name, None) for name in module._flat_weights_names]  # type: ignore[misc]


def detached_arguments(call: Call) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Return the arguments of a call, detached."""
    args, kwargs = map_tensors((call.args, call.kwargs), Tensor.detach)
    return args, kwargs
