"""The state of a module: recorded before use, compared and restored afterwards."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_trak.isolation.reach import attributes_of, reached

_CONTAINERS = (dict, list, set, deque)
_REGISTERED = ("_parameters", "_buffers", "_modules")
_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_LARGEST = 2**26  # entries: larger tensors and arrays are data and not copied, unless they are buffers
_HOOKS = "_hooks"  # in the names of nn.Module's attributes that hold hooks, e.g. "_forward_hooks_with_kwargs"


class ModuleChanged(RuntimeError):
    """Featurizing changed the module.

    Attributes:
        restored: whether everything could be restored, so that training can go on.
    """

    def __init__(self, changes: list[str], restored: bool) -> None:
        super().__init__(
            f"Featurizing changed the module: {'; '.join(changes)}. "
            + (
                "The module has been restored."
                if restored
                else "That cannot be undone, so training from here on would differ from training without TRAKCallback."
            )
            + " Let model_output, and what it calls, leave parameters, their gradients and hooks alone, and use"
            " parameters through modules, not from tuples or closures."
        )
        self.restored = restored


class ModuleState:
    """A snapshot of a module: its structure, its attributes, and which tensors it holds.

    It covers all submodules, and what they hold unregistered, in containers or in other objects:

    - attributes, and the entries of dictionaries, lists and sets: parameters, buffers, submodules, hooks, counts;
    - the values of buffers, of arrays, and of other tensors that are not parameters, e.g. the counts of a metric;
    - ``requires_grad``, ``.grad``, hooks and version counters of parameters. By the version counter, torch records
      changes in place. The values of parameters are not copied.

    Args:
        module: any module.
        optimizers: they must hold the same parameters afterwards. Their parameters of other modules are covered too.

    >>> layer = nn.Linear(1, 1)
    >>> state, weight = ModuleState(layer), layer.weight
    >>> layer.weight = nn.Parameter(torch.zeros(1, 1))
    >>> state.restore(), layer.weight is weight
    (['weight is another object'], True)
    """

    def __init__(self, module: nn.Module, optimizers: Iterable[torch.optim.Optimizer] = ()) -> None:
        optimizers = list(optimizers)
        found = _found(module, optimizers)
        registered = {id(part) for part in module.modules()}
        copied = {id(value) for value in module.buffers()}
        for _, value in found:
            if isinstance(value, (nn.Embedding, nn.EmbeddingBag)) and value.max_norm is not None:
                copied.add(id(value.weight))  # a forward pass changes it in place
        self._holders: list[_Module | _Container] = []
        self._tensors: list[_TensorState] = []
        self._arrays = []
        for name, value in found:
            if isinstance(value, nn.Module):
                self._holders.append(_Module(name, value, id(value) in registered))
            elif isinstance(value, Tensor):
                self._tensors.append(_TensorState(name, value, id(value) in copied))
            elif isinstance(value, _CONTAINERS):
                self._holders.append(_Container(value))
            elif isinstance(value, np.ndarray) and value.size <= _LARGEST and value.flags.writeable:
                self._arrays.append((value, value.copy()))
            elif attributes_of(value) is not None:
                self._holders.append(_Container(vars(value)))
        self._groups = [(group, list(group["params"])) for optimizer in optimizers for group in optimizer.param_groups]
        self.lost: list[str] = []

    def restore(self) -> list[str]:
        """Restore what can be restored.

        Returns:
            What must not change but did: parameters, buffers, their gradients and hooks. A forward pass may change
            other things, such as attributes; they are restored but not listed. What could not be restored is listed,
            and also in ``lost``.
        """
        changes = [change for holder in self._holders for change in holder.restore()]
        changes += [change for tensor in self._tensors for change in tensor.restore()]
        self.lost = [f"{state.name} has other values" for state in self._tensors if state.has_other_values()]
        for array, copied in self._arrays:
            array[...] = copied
        for group, before in self._groups:
            if not _same(group["params"], before):
                group["params"][:] = before
                changes.append("the optimizer holds other parameters")
        return changes + self.lost


@contextmanager
def unchanged(module: nn.Module, optimizers: Iterable[torch.optim.Optimizer] = ()) -> Iterator[None]:
    """Restore a module afterwards.

    Raises:
        ModuleChanged: if parameters, buffers, their gradients or hooks were changed. If the block itself raises an
            error, only a change that cannot be undone raises this.
    """
    state = ModuleState(module, optimizers)
    try:
        yield
    except BaseException as error:
        state.restore()
        if state.lost:
            raise ModuleChanged(state.lost, restored=False) from error
        raise
    changes = state.restore()
    if changes:
        raise ModuleChanged(changes, restored=not state.lost)


@contextmanager
def others_frozen(module: nn.Module, optimizers: Iterable[torch.optim.Optimizer] = ()) -> Iterator[None]:
    """Keep a backward pass from reaching trained tensors that are not parameters of a module.

    The module may hold them unregistered, as some hide a teacher network, or the optimizers may hold them.

    >>> student = nn.Linear(1, 1)
    >>> student.teacher = [nn.Linear(1, 1)]
    >>> with others_frozen(student):
    ...     student(torch.ones(1)).requires_grad, student.teacher[0](torch.ones(1)).requires_grad
    (True, False)
    """
    own = {id(value) for value in module.parameters()}
    found = [value for _, value in _found(module, optimizers) if id(value) not in own]
    others = [value for value in found if isinstance(value, Tensor) and value.is_leaf and value.requires_grad]
    for value in others:
        value.requires_grad_(False)
    try:
        yield
    finally:
        for value in others:
            value.requires_grad_(True)


def _found(module: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> list[tuple[str, Any]]:
    """List what is reached from a module, then the optimizers' parameters that are not among it."""
    found = list(reached(module))
    known = {id(value) for _, value in found}
    held = [value for optimizer in optimizers for group in optimizer.param_groups for value in group["params"]]
    others = [(f"parameter {place} of the optimizers", value) for place, value in enumerate(held)]
    return found + [(name, value) for name, value in others if id(value) not in known]


class _Container:
    """A dictionary, list, set or deque, and what it held; the dictionary may be that of an object's attributes."""

    def __init__(self, held: Any) -> None:
        self._held = held
        self._before = dict(held) if isinstance(held, dict) else list(held)

    def restore(self) -> list[str]:
        """Restore what the container held; its changes are never an error."""
        if not _same(self._held, self._before):
            _refill(self._held, self._before)
        return []


class _Module:
    """A module: its attributes, and the parameters, buffers, submodules and hooks among them.

    A forward pass may replace buffers. In a registered module these are the buffers of a `ModelFunction`, so the
    module's own buffers must stay. In an unregistered module its own may be replaced.
    """

    def __init__(self, name: str, module: nn.Module, registered: bool) -> None:
        self._name, self._attributes, self._registered = name, vars(module), registered
        self._before = dict(self._attributes)
        named = {key: held for key, held in self._before.items() if key in _REGISTERED or _HOOKS in key}
        self._contents = {key: dict(held) for key, held in named.items() if isinstance(held, dict)}

    def restore(self) -> list[str]:
        """Restore what the module held; return what must not change and did."""
        changes = []
        for key, before in self._contents.items():
            held = self._before[key]
            if not _same(held, before):
                changes += self._describe(key, held, before)
                _refill(held, before)
        if not _same(self._attributes, self._before):
            _refill(self._attributes, self._before)
        return changes

    def _describe(self, key: str, held: Any, before: Any) -> list[str]:
        """List the changes of a container that must not happen."""
        if key in ("_parameters", "_buffers"):
            names = [name for name in {**before, **held} if held.get(name) is not before.get(name)]
            set_anew = key == "_buffers" and not self._registered and list(held) == list(before)
            return [] if set_anew else [f"{self._path(name)} is another object" for name in names]
        return [f"{self._name or 'the module'} has other {'submodules' if key == '_modules' else 'hooks'}"]

    def _path(self, name: str) -> str:
        return f"{self._name}.{name}" if self._name else name


class _TensorState:
    """One tensor: its gradient, hooks and version counter; its values if ``copied``, or if small and no parameter."""

    def __init__(self, name: str, value: Tensor, copied: bool) -> None:
        self.name, self._value = name, value
        self._is_leaf, self._requires_grad = value.is_leaf, value.requires_grad
        # Tensors made in inference mode cannot be changed outside of it.
        self._can_change = not is_lazy(value) and not value.is_inference()
        self._grad = value.grad if value.is_leaf else None
        self._versions = self._versions_now()
        copied = self._can_change and (copied or (not isinstance(value, nn.Parameter) and value.numel() <= _LARGEST))
        self._copy = value.detach().clone() if copied else None
        self._hooks = {kind: dict(getattr(value, kind, None) or {}) for kind in _TENSOR_HOOKS}

    def restore(self) -> list[str]:
        """Restore the tensor's values, gradient and hooks; return what must not change and did."""
        changes, value = [], self._value
        if self._copy is not None and not torch.equal(value, self._copy):  # batch norm does not count versions
            with torch.no_grad():
                value.copy_(self._copy)
        if self._is_leaf and value.is_leaf and value.requires_grad != self._requires_grad:
            changes.append(f"requires_grad of {self.name} is {value.requires_grad}")
            value.requires_grad_(self._requires_grad)
        if self._is_leaf and value.grad is not self._grad:
            changes.append(f"the gradient of {self.name} is another one")
            value.grad = self._grad
        for kind, before in self._hooks.items():
            held = getattr(value, kind, None)
            if dict(held or {}) != before:
                changes.append(f"{self.name} has other hooks")
                _refill(held, before)
        return changes

    def has_other_values(self) -> bool:
        """Whether values changed of which there is no copy."""
        (value, grad), (own, its_grad) = self._versions, self._versions_now()
        return (self._copy is None and own != value) or its_grad != grad

    def _versions_now(self) -> tuple[int | None, int | None]:
        own = self._value._version if self._can_change else None
        return own, None if self._grad is None else self._grad._version


def _same(held: Any, before: Any) -> bool:
    """Tell whether a container holds the same objects in the same order."""
    if len(held) != len(before):
        return False
    if isinstance(before, dict):
        return _same(list(held), list(before)) and _same(list(held.values()), list(before.values()))
    return all(one is other for one, other in zip(held, before, strict=True))


def _refill(held: Any, before: Any) -> None:
    held.clear()
    held.update(before) if isinstance(held, (dict, set)) else held.extend(before)
