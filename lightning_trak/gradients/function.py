"""A module's outputs as a pure function of one checkpoint's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_trak.data.batch import fresh, with_numbers_told
from lightning_trak.gradients.substitution import placed_elsewhere, places_elsewhere, places_of_tensors, with_values

_LISTS_OF_WEIGHTS = ("_flat_weights", "_flat_weight_refs")
_HALF = {torch.float16, torch.bfloat16}
_EXACT, _COARSE = 1e-3, 0.05  # relative difference of numbers that should be the same, in float32 and in 16 bits


class _Dtypes(TorchFunctionMode):
    """Records the dtypes of all results."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.dtypes.add(result.dtype)
        return result


class _MethodCall(nn.Module):
    """Gives any method of a module the ``forward`` that `torch.func.functional_call` calls."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, method: Any, *args: Any) -> Any:
        with with_numbers_told(self.module, args) as plain:
            return method(*plain)


class ModelFunction:
    """A module evaluated at the weights of one checkpoint; the module's own weights are neither read nor changed.

    Args:
        module: defines ``model_output(batch) -> (b,)``.
        weights: a state dict for ``module``; names and shapes must fit.
        parameters: names of the attributed parameters, as in ``module.named_parameters()``.
        device: where the weights are put.
        convert: applied to the buffers that are in no state dict, e.g. to cast them to the weights' precision.

    Attributes:
        parameters: the attributed parameters by name, detached, in the order given.
        tolerance: the relative difference that is allowed between two ways to compute a number; see `observing`.
        method: the name of the method that it evaluates.
        tried: the last batch that was differentiated in a trial, and the result; see `numbered_gradient`.

    Raises:
        ValueError: if ``weights`` do not fit ``module``; missing, unexpected and wrongly shaped tensors are listed.

    >>> module = nn.Linear(2, 1)
    >>> module.model_output = lambda x: module(x).squeeze(1)
    >>> weights = {"weight": torch.tensor([[1.0, 2.0]]), "bias": torch.zeros(1)}
    >>> ModelFunction(module, weights, ["weight"]).output(torch.tensor([[3.0, 4.0]]))
    tensor([11.])
    """

    def __init__(
        self,
        module: nn.Module,
        weights: Mapping[str, Tensor],
        parameters: Iterable[str],
        device: torch.device | str = "cpu",
        convert: Callable[[Tensor], Tensor] = lambda buffer: buffer,
    ) -> None:
        check_fit(module, weights)
        self.module, self.method = module, "model_output"
        weights = _by_name(module, weights)
        values = {name: weights.get(name, value).detach().to(device) for name, value in module.named_parameters()}
        for name, buffer in module.named_buffers():  # cloned, since a forward pass may change them in place
            values[name] = (weights[name] if name in weights else convert(buffer)).detach().clone().to(device)
        self.parameters = {name: values.pop(name) for name in parameters}
        self._others = values
        self._call = _MethodCall(module)
        self._places = {f"module.{place}": name for place, name in places_of_tensors(module).items()}
        self._elsewhere = places_elsewhere(module)
        floating = {value.dtype for value in (*self.parameters.values(), *self._others.values())}
        self.tried: tuple[Any, Any] | None = None
        self.tolerance = _COARSE if floating & _HALF else _EXACT

    def _copy(self) -> ModelFunction:
        other = copy(self)
        other.tried = None
        return other

    @property
    def n_params(self) -> int:
        """p, the number of attributed parameters."""
        return sum(value.numel() for value in self.parameters.values())

    def restrict(self, names: Iterable[str]) -> ModelFunction:
        """Return the same function with fewer attributed parameters."""
        restricted = self._copy()
        restricted.parameters = {name: self.parameters[name] for name in names}
        restricted._others = {**self._others, **self.parameters}
        return restricted

    def of(self, method: str) -> ModelFunction:
        """Return the function that evaluates another method of the module, (b,) like ``model_output``."""
        other = self._copy()
        other.method = method
        return other

    def with_copies(self, copies: Mapping[str, torch.Size], size: int) -> ModelFunction:
        """Return the same function with some parameters replaced by ``size`` copies, each of the shape given."""
        other = self._copy()
        others = {name: self.parameters[name].reshape(shape).expand(size, *shape) for name, shape in copies.items()}
        other.parameters = {**self.parameters, **others}
        return other

    def call(self, method: Any, *args: Any, parameters: Mapping[str, Tensor] | None = None) -> Any:
        """Call ``method(*args)``, a bound method of the module, at the checkpoint's weights.

        Args:
            method: e.g. ``module.model_output``.
            args: its arguments. Their containers are copied, so the method may change them. Instead of a
                `NumberedBatch` it gets the batch.
            parameters: used instead of the attribute `parameters`, to differentiate with respect to them.
        """
        values = {**self._others, **(self.parameters if parameters is None else parameters)}
        with self._differentiable(), placed_elsewhere(self._elsewhere, values):
            return with_values(self._call, values, self._places, (method, *fresh(args)))

    def prepare(self, method: Callable[[], object]) -> None:
        """Call a method without arguments, and use the buffers that it sets in all later calls.

        Parameters that it adds are frozen, so that no backward pass reaches them.
        """
        buffers, parameters = dict(self.module.named_buffers()), dict(self.module.named_parameters())

        def keep() -> None:
            method()
            found = dict(self.module.named_buffers())
            self._others.update({name: found[name].detach() for name in buffers if name in found})
            for name, value in self.module.named_parameters():
                if name not in parameters:
                    value.requires_grad_(False)

        self.call(keep)

    @contextmanager
    def _differentiable(self) -> Iterator[None]:
        """Run recurrent layers without cuDNN, which cannot differentiate them in eval mode; restore their lists."""
        recurrent = [part for part in self.module.modules() if isinstance(part, nn.RNNBase)]
        # A list of weights, and one of what it was made from: if that is outdated, a layer makes both anew.
        own = [{key: vars(part).get(key) for key in _LISTS_OF_WEIGHTS} for part in recurrent]
        if not recurrent or next(iter(self.parameters.values())).device.type != "cuda":
            off: AbstractContextManager[Any] = nullcontext()
        else:
            off = torch.backends.cudnn.flags(enabled=False)
        try:
            with off:
                yield
        finally:
            for part, lists in zip(recurrent, own, strict=True):
                vars(part).update(lists)

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Raise the `tolerance` if the function, evaluated meanwhile, computes anything in 16 bits."""
        with _Dtypes() as seen:
            yield
        if seen.dtypes & _HALF:
            self.tolerance = _COARSE

    def observe(self, batch: Any) -> Tensor:
        """Return the outputs, with gradients enabled: without, some modules take a faster, slightly different path."""
        leaves = {name: value.detach().requires_grad_() for name, value in self.parameters.items()}
        with self.observing():
            return self.output(batch, leaves)

    def output(self, batch: Any, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return ``model_output(batch)``, shape (b,)."""
        return self.call(self.model_output, batch, parameters=parameters)  # type: ignore[no-any-return]

    def model_output(self, batch: Any) -> Tensor:
        """Return the module's own ``model_output(batch)``, after checking its shape; to be called through `call`."""
        output = getattr(self.module, self.method)(fresh(batch))
        if not isinstance(output, Tensor) or output.ndim != 1:
            got = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"{type(self.module).__name__}.{self.method}(batch) returned {got}; expected one number for each"
                " example of the batch, a tensor of shape (b,). Reduce it to one scalar for each, e.g. with"
                " .squeeze(-1) or .sum(dim=...) over everything but the batch."
            )
        return output


def _by_name(module: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights by the name of each parameter and buffer; of several names the last counts: it is loaded last."""
    names = {id(value): name for name, value in (*module.named_parameters(), *module.named_buffers())}
    own = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return {names[id(value)]: weights[name] for name, value in own if name in weights}


def check_fit(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Raise a ValueError that lists what differs if ``weights`` are not a state dict of ``module``."""
    own = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    strict = getattr(module, "strict_loading", True)
    problems = [f"missing: {name}" for name in own if name not in weights and strict]
    problems += [f"unexpected: {name}" for name in weights if name not in own and strict]
    problems += [
        f"{name}: shape {tuple(weights[name].shape)} in the checkpoint, {tuple(value.shape)} in the model"
        for name, value in own.items()
        if name in weights and weights[name].shape != value.shape
    ]
    if problems:
        shown = "; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
        raise ValueError(
            f"The checkpoint does not fit {type(module).__name__}: {shown}. {_remedy(own, weights)}, or attribute other"
            " checkpoints with ckpt_path=..."
        )


def _remedy(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str:
    """Say what to do about weights that do not fit. They may be those of a part of the module."""
    first = next(iter(weights), "")
    prefix = next((name[: -len(first)] for name in own if name.endswith(f".{first}")), None)
    if prefix is not None and set(own) >= {prefix + name for name in weights}:
        part = prefix.rstrip(".")
        return f"They are those of its part {part!r}: load them into module.{part}, and save module.state_dict()"
    return "Build the model with the hyperparameters it was trained with"
