"""How the mixins read a batch: the forward pass, and the labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_trak.gradients.batch import describe


def forward(module: Any, batch: Any, *fields: str, hook: str, leave_out: tuple[str, ...] = ("labels",)) -> Tensor:
    """Run a module's forward on the inputs of a batch, and take a tensor from what it returns.

    Args:
        module: a module.
        batch: ``(inputs, ...)``, a mapping of keyword arguments, or the inputs alone.
        fields: names that the tensor may have, where forward returns an object or a mapping.
        hook: the method to override where the batch or the result is of another form.
        leave_out: keys of a mapping that are not arguments of forward.

    Raises:
        TypeError: if it is of another form.
    """
    if isinstance(batch, Mapping):
        result = module(**{key: value for key, value in batch.items() if key not in leave_out})
    elif isinstance(batch, (list, tuple)) and batch:
        result = module(batch[0])
    elif isinstance(batch, Tensor):
        result = module(batch)
    else:
        raise _wrong_form(module, batch, hook)
    for field in fields:
        if isinstance(result, Mapping) and field in result:
            result = result[field]
        result = getattr(result, field, result)
    if not isinstance(result, Tensor):
        raise TypeError(
            f"{type(module).__name__}.forward returned {describe(result)}; expected a tensor or an object with"
            f" .{fields[0]}. Override {hook}(self, batch)."
        )
    return result


def labels_or_none(batch: Any) -> Any:
    """Return what stands where labels are: ``batch[1]``, or ``batch["labels"]``; None if there is nothing."""
    if isinstance(batch, Mapping):
        return batch.get("labels")
    return batch[1] if isinstance(batch, (list, tuple)) and len(batch) >= 2 else None


def labels(module: Any, batch: Any, *, hook: str) -> Tensor:
    """Take the labels out of a batch ``(inputs, labels)`` or a mapping with ``"labels"``.

    Raises:
        TypeError: if there are none.
    """
    value = labels_or_none(batch)
    if not isinstance(value, Tensor):
        raise _wrong_form(module, batch, hook)
    return value


def _wrong_form(module: Any, batch: Any, hook: str) -> TypeError:
    return TypeError(
        f"The batch is {describe(batch)}; expected (inputs, labels) or a mapping with 'labels'. Override"
        f" {hook}(self, batch) in {type(module).__name__} to say where to find them."
    )
