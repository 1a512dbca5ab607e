"""Call a module with other tensors in place of its parameters and buffers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.func import functional_call

from lightning_trak.isolation.reach import attributes_of, reached


def places_of_tensors(module: nn.Module) -> dict[str, str]:
    """Return every place of a parameter or buffer, and the name under which the module lists that tensor.

    A tensor in two modules has two places but one name: the first, as in ``module.named_parameters()``. A module under
    two names is one module, so each of its tensors has one place.

    >>> layer = nn.Linear(2, 2, bias=False)
    >>> places_of_tensors(nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)}))  # one module under two names
    {'a.weight': 'a.weight'}
    >>> other = nn.Linear(2, 2, bias=False)
    >>> other.weight = layer.weight  # one parameter in two modules
    >>> places_of_tensors(nn.ModuleDict({"a": layer, "b": other}))
    {'a.weight': 'a.weight', 'b.weight': 'a.weight'}
    """
    names = {id(value): name for name, value in (*module.named_parameters(), *module.named_buffers())}
    places = {}
    for path, part in module.named_modules():
        own = part.named_parameters(recurse=False, remove_duplicate=False)
        for local, value in (*own, *part.named_buffers(recurse=False, remove_duplicate=False)):
            places[f"{path}.{local}" if path else local] = names[id(value)]
    return places


def with_values(
    module: nn.Module,
    values: Mapping[str, Tensor],
    places: Mapping[str, str],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Call ``module(*args, **kwargs)`` with ``values`` in place of its tensors.

    Every place is replaced once. If a module is registered twice, `torch.func.functional_call` with its default
    ``tie_weights=True`` would replace the tensors twice. It would then take the first replacement for the original, and
    never restore the module's own parameter.

    Args:
        module: any module.
        values: tensors by name; tensors that they do not name stay.
        places: see `places_of_tensors`.
        args: positional arguments.
        kwargs: keyword arguments.
    """
    placed = {place: values[name] for place, name in places.items() if name in values}
    return functional_call(module, placed, args, dict(kwargs or {}), tie_weights=False)


class Elsewhere(NamedTuple):
    """A place of a module's tensor outside of its registered modules, e.g. in a list or in an unregistered module.

    Attributes:
        holder: a list, or a dictionary, which may be that of an object's attributes.
        key: index or key in it.
        name: the name under which the module lists the tensor.
    """

    holder: Any
    key: Any
    name: str


def places_elsewhere(module: nn.Module) -> list[Elsewhere]:
    """List where else a module's parameters and buffers are held, besides its registered modules.

    >>> layer = nn.Linear(2, 2, bias=False)
    >>> layer.again = [layer.weight]
    >>> [(place.key, place.name) for place in places_elsewhere(layer)]
    [(0, 'weight')]
    """
    names = {id(value): name for name, value in (*module.named_parameters(), *module.named_buffers())}
    own = {id(held) for part in module.modules() for held in (part._parameters, part._buffers)}
    found = []
    for _, value in reached(module):
        holder = value if isinstance(value, (list, dict)) else attributes_of(value)
        if holder is None or id(holder) in own:
            continue
        items = enumerate(holder) if isinstance(holder, list) else holder.items()
        found += [Elsewhere(holder, key, names[id(held)]) for key, held in items if id(held) in names]
    return found


@contextmanager
def placed_elsewhere(places: Sequence[Elsewhere], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Put ``values`` in these places; restore what was there afterwards."""
    before = [(place, place.holder[place.key]) for place in places if place.name in values]
    for place, _ in before:
        place.holder[place.key] = values[place.name]
    try:
        yield
    finally:
        for place, value in before:
            place.holder[place.key] = value
