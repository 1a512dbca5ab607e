"""Which parameters are attributed."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parameter import is_lazy


def select_parameters(module: nn.Module, parameters: str | Sequence[str] | None) -> list[str]:
    """Return the names of the attributed parameters, in the module's order.

    Args:
        module: the model.
        parameters: None for all that require a gradient; else names or glob patterns, frozen parameters included.

    Raises:
        ValueError: if a pattern matches nothing, if no parameter is left, or if one is complex or lazy (without a
            shape).

    >>> select_parameters(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)), "1.*")
    ['1.weight', '1.bias']
    """
    lazy = [name for name, value in (*module.named_parameters(), *module.named_buffers()) if is_lazy(value)]
    if lazy:
        raise ValueError(
            f"{type(module).__name__}.{lazy[0]} has no shape yet: its module is lazy. Pass a batch through the"
            " model in __init__ or configure_model, or give its size."
        )
    own = dict(module.named_parameters())
    own = {name: value for name, value in own.items() if value.is_floating_point() or value.is_complex()}
    if parameters is None:
        chosen = [name for name, value in own.items() if value.requires_grad]
        if not chosen:
            raise ValueError(
                f"{type(module).__name__} has no parameter that requires a gradient. Unfreeze some, or name those to"
                " attribute with parameters=..."
            )
        return _real(module, chosen)
    patterns = [parameters] if isinstance(parameters, str) else list(parameters)
    if not patterns:
        raise ValueError("parameters names none; leave it at None for all parameters that require a gradient.")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in own):
            near = difflib.get_close_matches(pattern, own, n=3, cutoff=0.4) or list(own)[:3]
            raise ValueError(
                f"parameters={pattern!r} matches no parameter of {type(module).__name__}; there are, for example,"
                f" {', '.join(map(repr, near))}. Names are those of module.named_parameters(); * matches anything."
            )
    return _real(module, [name for name in own if any(fnmatchcase(name, pattern) for pattern in patterns)])


def _real(module: nn.Module, names: list[str]) -> list[str]:
    """Return names of parameters; raise a ValueError if some are complex."""
    own = dict(module.named_parameters())
    found = [name for name in names if own[name].is_complex()]
    if found:
        raise ValueError(
            f"{len(found)} of the {len(names)} parameters of {type(module).__name__} to attribute are complex, e.g."
            f" {found[0]!r} ({own[found[0]].dtype}); only real parameters can be attributed. Store them as"
            " torch.view_as_real(value), and use torch.view_as_complex(self.weight) in forward. Or leave them out of"
            " the scores: name only the others with TRAKCallback(parameters=[...])."
        )
    return names
