"""What a module is made of: noted before it is used, put back and compared after."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_CONTAINERS = (dict, list, set, deque)
_HOOKS = "_hooks"  # how nn.Module's attributes that hold hooks end, or "_hooks_with_kwargs" and the like


class ModuleChanged(RuntimeError):
    """A module is not what it was before it was featurized.

    Attributes:
        restored: whether all of it could be put back, so that training may go on.
    """

    def __init__(self, changes: list[str], restored: bool) -> None:
        super().__init__(
            f"Featurizing changed the module: {'; '.join(changes)}. "
            + (
                "It is as it was again."
                if restored
                else "That cannot be undone, so training from here on would differ from training without TRAKCallback."
            )
            + " Let model_output, and what it calls, leave parameters, their gradients and hooks alone."
        )
        self.restored = restored


class ModuleState:
    """A module at one moment: its structure, its attributes, and which tensors it holds.

    Covered are all submodules, and modules that they hold without registering them:

    - their attributes, and what dictionaries, lists and sets among these hold: parameters, buffers, submodules, hooks;
    - the values of buffers, and of other tensors that are no parameters, as the counts of a metric;
    - of parameters ``requires_grad``, ``.grad``, hooks, and the version counter, by which torch notes changes in place.
      Their values are not copied.

    Args:
        module: any module.
        optimizers: what must hold the same parameters afterwards.

    >>> layer = nn.Linear(1, 1)
    >>> state, weight = ModuleState(layer), layer.weight
    >>> layer.weight = nn.Parameter(torch.zeros(1, 1))
    >>> state.restore(), layer.weight is weight
    (['weight is another object'], True)
    """

    def __init__(self, module: nn.Module, optimizers: Iterable[torch.optim.Optimizer] = ()) -> None:
        hidden = hidden_modules(module)
        self._parts = [_Part(name, part) for name, part in module.named_modules()]
        self._parts += [_Part(f"{name}.{local}", part) for name, own in hidden for local, part in own.named_modules()]
        self._parameters = [_ParameterState(name, value) for name, value in module.named_parameters()]
        self._parameters += [
            _ParameterState(f"{name}.{local}", value) for name, own in hidden for local, value in own.named_parameters()
        ]
        self._groups = [(group, list(group["params"])) for optimizer in optimizers for group in optimizer.param_groups]
        self.lost: list[str] = []

    def restore(self) -> list[str]:
        """Put back what can be put back.

        Returns:
            What of the invariant did not hold: parameters, buffers, their gradients and hooks that were others. What a
            forward pass may well leave behind, as an attribute that it sets, is put back without mention. In ``lost``
            is what could not be put back.
        """
        changes = [change for part in self._parts for change in part.restore()]
        changes += [change for parameter in self._parameters for change in parameter.restore()]
        self.lost = [f"{state.name} has other values" for state in self._parameters if state.has_other_values()]
        for group, before in self._groups:
            if not _same(group["params"], before):
                group["params"][:] = before
                changes.append("the optimizer holds other parameters")
        return changes + self.lost


@contextmanager
def unchanged(module: nn.Module, optimizers: Iterable[torch.optim.Optimizer] = ()) -> Iterator[None]:
    """Leave a module as it was.

    Raises:
        ModuleChanged: if it was changed in what must not change; also where an error passes through that leaves it
            changed for good.
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


def hidden_modules(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """List the modules that a module holds in plain attributes, lists or dictionaries, as one hides a teacher.

    >>> student = nn.Linear(1, 1)
    >>> student.teacher = [nn.Linear(1, 1)]
    >>> hidden_modules(student)
    [('teacher', Linear(in_features=1, out_features=1, bias=True))]
    """
    known = set(module.modules())
    found: list[tuple[str, nn.Module]] = []
    for part in list(known):
        for name, value in vars(part).items():
            if name == "_modules":
                continue
            held = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
            for own in held:
                if isinstance(own, nn.Module) and own not in known:
                    known.update(own.modules())
                    found.append((name, own))
    return found


@contextmanager
def hidden_frozen(module: nn.Module) -> Iterator[None]:
    """Keep a backward pass from reaching the parameters of modules that are not registered."""
    hidden = [value for _, own in hidden_modules(module) for value in own.parameters() if value.requires_grad]
    for value in hidden:
        value.requires_grad_(False)
    try:
        yield
    finally:
        for value in hidden:
            value.requires_grad_(True)


class _Part:
    """One submodule: its attributes, the contents of containers among them, and tensors that are no parameters."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self._name, self._attributes = name, vars(module)
        self._before = dict(self._attributes)
        held = {key: value for key, value in self._before.items() if isinstance(value, _CONTAINERS)}
        self._contents = {key: _copy(value) for key, value in held.items()}
        tensors = [value for value in self._before.values() if isinstance(value, Tensor)]
        tensors += [value for value in module._buffers.values() if value is not None]
        self._tensors = [(value, value._version, value.detach().clone()) for value in tensors if _can_change(value)]

    def restore(self) -> list[str]:
        changes = []
        for key, before in self._contents.items():
            held = self._before[key]
            if not _same(held, before):
                changes += self._describe(key, held, before)
                _refill(held, before)
        for value, version, before in self._tensors:
            if value._version != version:
                with torch.no_grad():
                    value.copy_(before)
        self._attributes.clear()
        self._attributes.update(self._before)
        return changes

    def _describe(self, key: str, held: Any, before: Any) -> list[str]:
        """Say what of a container must not have changed."""
        if key in ("_parameters", "_buffers"):
            names = [name for name in {**before, **held} if held.get(name) is not before.get(name)]
            return [f"{self._path(name)} is another object" for name in names]
        if key == "_modules" or _HOOKS in key:
            what = "submodules" if key == "_modules" else "hooks"
            return [f"{self._name or 'the module'} has other {what}"]
        return []

    def _path(self, name: str) -> str:
        return f"{self._name}.{name}" if self._name else name


class _ParameterState:
    """One parameter: what must not change about it."""

    def __init__(self, name: str, value: nn.Parameter) -> None:
        self.name, self._value, self._version = name, value, value._version
        self._requires_grad, self._grad = value.requires_grad, value.grad
        self._grad_version = None if value.grad is None else value.grad._version
        self._hooks = dict(value._backward_hooks or {})

    def restore(self) -> list[str]:
        changes, value = [], self._value
        if value.requires_grad != self._requires_grad:
            changes.append(f"requires_grad of {self.name} is {value.requires_grad}")
            value.requires_grad_(self._requires_grad)
        if value.grad is not self._grad:
            changes.append(f"the gradient of {self.name} is another one")
            value.grad = self._grad
        if dict(value._backward_hooks or {}) != self._hooks:
            changes.append(f"{self.name} has other hooks")
            _refill(value._backward_hooks, self._hooks)
        return changes

    def has_other_values(self) -> bool:
        grad = self._grad
        return self._value._version != self._version or (grad is not None and grad._version != self._grad_version)


def _can_change(tensor: Tensor) -> bool:
    """Tell whether a tensor has values that may change; outside of inference mode those made within it cannot."""
    return not is_lazy(tensor) and not tensor.is_inference()


def _copy(container: Any) -> Any:
    return dict(container) if isinstance(container, dict) else list(container)


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
