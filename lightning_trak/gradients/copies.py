"""Parameters that a model uses directly, e.g. a scale or a class token: each example gets its own copy."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_trak.data.batch import tensors_of
from lightning_trak.gradients.engine import close
from lightning_trak.gradients.function import ModelFunction
from lightning_trak.gradients.loop import batch_gradient
from lightning_trak.gradients.tracing import Layer

_LARGEST = 2**20  # entries: larger parameters are no scales or tokens, and their copies might not fit into memory
_MOST_AXES = 3  # between the batch axis and a parameter's own axes: channels or positions, height and width

_HARMLESS = {"abs", "clamp", "clone", "contiguous", "cos", "detach", "exp", "float", "log", "log1p", "neg", "positive"}
_HARMLESS |= {"reciprocal", "relu", "sigmoid", "sin", "softplus", "sqrt", "square", "tanh", "to", "type", "type_as"}
_HARMLESS |= {"add", "div", "iadd", "imul", "isub", "itruediv", "mul", "pow", "radd", "rdiv", "rmul", "rpow", "rsub"}
_HARMLESS |= {"rtruediv", "sub", "true_divide", "truediv"}
_HARMLESS |= {"device", "dim", "dtype", "is_cuda", "ndim", "requires_grad", "requires_grad_", "shape", "size"}


class _Unsuitable(Exception):
    """An operation on a copy might confuse its batch axis with another axis."""


class _Watch(TorchFunctionMode):
    """Allows only operations on copies that keep the examples apart, whatever the sizes: elementwise ones.

    What is computed from copies alone is watched like a copy. What is computed from copies and the batch is not.

    Args:
        copies: the leaves.
    """

    def __init__(self, copies: Iterable[Tensor]) -> None:
        super().__init__()
        self._copies = {id(copy): copy for copy in copies}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = tensors_of((args, kwargs))
        own = [tensor for tensor in tensors if id(tensor) in self._copies]
        result = func(*args, **kwargs)
        if not own:
            return result
        name = _name(func)
        if not (name in _HARMLESS or _keeps_first_axis(name, own, args, kwargs, result)):
            raise _Unsuitable(name)
        if isinstance(result, Tensor) and result.shape[:1] == own[0].shape[:1]:
            others = [tensor for tensor in tensors if id(tensor) not in self._copies]
            if all(tensor.ndim < result.ndim or tensor.shape[0] == 1 for tensor in others):
                self._copies[id(result)] = result
        return result


def _name(func: Any) -> str:
    """Return the name of an operation, or of an attribute that is read, without underscores."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", "")
    return str(name).strip("_")


def _keeps_first_axis(name: str, own: list[Tensor], args: Any, kwargs: Any, result: Any) -> bool:
    """Tell whether an operation on axes leaves the first one alone."""
    if name == "expand":
        return bool(result.ndim == own[0].ndim)
    if name in ("cat", "concat", "concatenate"):
        return bool((args[1] if len(args) > 1 else kwargs.get("dim", 0)) not in (0, -result.ndim))
    return False


class CopyTrial:
    """Finds the parameters that can be replaced by one copy for each example, thanks to broadcasting.

    The gradient of copy i is then that of example i, and the backward pass of the batch computes it. A few examples
    show whether that works:

    - with copies, the outputs must stay the same;
    - when every example i is weighted with vᵢ, the gradient of copy i must be vᵢ times as large;
    - the gradients of all copies must add up to the parameter's;
    - copies may only be used in operations that keep the examples apart in every batch, see `_Watch`.

    Args:
        function: the model at some weights.
        batch: a few examples.
        weights: v, (b,), no two the same.
        outputs: f of these examples, (b,).
        reference: Σᵢ vᵢ ∇f(zᵢ) by parameter.
    """

    def __init__(
        self,
        function: ModelFunction,
        batch: Any,
        weights: Tensor,
        outputs: Tensor,
        reference: Mapping[str, Tensor],
    ) -> None:
        self._function, self._batch = function, batch
        self._weights, self._outputs, self._reference = weights, outputs, reference

    def find(self, layers: Iterable[Layer]) -> dict[str, torch.Size]:
        """Try the parameters of modules without a rule, together for each class; return the shapes of copies."""
        groups: dict[tuple[type, str], list[str]] = {}
        for layer in layers:
            for local, name in layer.parameters.items():
                small = self._function.parameters[name].numel() <= _LARGEST
                if layer.rule is None and small and name in self._reference:
                    groups.setdefault((type(layer.module), local), []).append(name)
        found: dict[str, torch.Size] = {}
        for names in groups.values():
            found.update(next((copies for copies in self._ways(names) if self._fit(copies)), {}))
        return found

    def _ways(self, names: Sequence[str]) -> list[dict[str, torch.Size]]:
        """List the shapes to try: without a leading axis of size one, or with such axes added in front."""
        shapes = {name: self._function.parameters[name].shape for name in names}
        ways = [
            {name: torch.Size([1] * axes + list(shape)) for name, shape in shapes.items()}
            for axes in range(_MOST_AXES + 1)
        ]
        if all(shape[:1] == (1,) for shape in shapes.values()):
            ways.insert(0, {name: shape[1:] for name, shape in shapes.items()})
        return ways

    def _fit(self, copies: dict[str, torch.Size]) -> bool:
        function = self._function.restrict(copies).with_copies(copies, len(self._weights))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about shapes that do not match
                outputs, plain = batch_gradient(function, self._batch, watch=_Watch)
                _, weighted = batch_gradient(function, self._batch, self._weights)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # with one more axis, a model may fail in any way
            return False
        pairs = zip(copies, plain, weighted, strict=True)
        same = close(outputs, self._outputs, function.tolerance)
        return same and all(self._scales(*pair) for pair in pairs)

    def _scales(self, name: str, plain: Tensor | None, weighted: Tensor | None) -> bool:
        """Tell whether a gradient scales with the examples' weights; False if it is zero, which shows nothing."""
        if plain is None or weighted is None or not bool(plain.any()):
            return False
        tolerance, reference = self._function.tolerance, self._reference[name]
        first, second = (gradient.reshape(len(gradient), -1) for gradient in (plain, weighted))
        scaled = close(first * self._weights[:, None].to(first), second, tolerance)
        return scaled and close(second.sum(0).reshape(reference.shape), reference, tolerance)
