"""How a module gets a batch, and how the mixins read it: the forward pass, and the labels."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from inspect import Parameter, signature, unwrap
from traceback import walk_tb
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_trak.data.batch import describe
from lightning_trak.data.loaders import numbered_loader

# Python's messages for a call with arguments that a function does not take.
_WRONG_CALL = re.compile(
    r"\(\) (got an unexpected keyword argument|got multiple values for|missing \d+ required|takes .* arguments? but)"
)


def read_batches(
    trainer: Any,
    module: Any,
    loader: DataLoader[Any],
    rows: Iterable[int],
    batch_size: int | None = None,
    num_workers: int | None = None,
) -> Iterator[tuple[list[int], Any]]:
    """Yield (rows, batch); every batch goes through the trainer's precision and transfer hooks, as in ``predict``."""
    for batch_rows, batch in numbered_loader(loader, rows, batch_size, num_workers):
        batch = trainer.precision_plugin.convert_input(batch)
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        yield batch_rows, trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def forward(module: Any, batch: Any, *fields: str, hook: str, leave_out: tuple[str, ...] = ("labels",)) -> Tensor:
    """Run a module's forward on the inputs of a batch, and return the tensor in its result.

    Args:
        module: a module.
        batch: the inputs, or ``(inputs, ...)``; inputs are a tensor, or a mapping of keyword arguments.
        fields: names that the tensor may have, where forward returns an object or a mapping.
        hook: the method to override where the batch or the result has another form.
        leave_out: keys of a mapping that are not arguments of forward.

    Raises:
        TypeError: if the batch or the result has another form.
    """
    inputs = batch[0] if isinstance(batch, (list, tuple)) and batch else batch
    if isinstance(inputs, Mapping):
        kwargs = {key: value for key, value in inputs.items() if key not in leave_out}
        result = call_forward(module, batch, hook, **kwargs)
    elif isinstance(inputs, Tensor):
        result = call_forward(module, batch, hook, inputs)
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
    """Return ``batch[1]`` or ``batch["labels"]``, the usual place of labels; None if there is nothing."""
    if isinstance(batch, Mapping):
        return batch.get("labels")
    return batch[1] if isinstance(batch, (list, tuple)) and len(batch) >= 2 else None


def has_labels(module: Any, batch: Any, hook: str, default: type) -> bool:
    """Say whether a module finds labels in a batch: at their usual place, or by its own ``hook``, not ``default``'s."""
    return labels_or_none(batch) is not None or getattr(type(module), hook) is not getattr(default, hook)


def labels(module: Any, batch: Any, *, hook: str) -> Tensor:
    """Return the labels of a batch ``(inputs, labels)`` or of a mapping with ``"labels"``.

    Raises:
        TypeError: if there are none.
    """
    value = labels_or_none(batch)
    if not isinstance(value, Tensor):
        raise _wrong_form(module, batch, hook)
    return value


@contextmanager
def labels_in_range(what: str, remedy: str) -> Iterator[None]:
    """Raise a ValueError in place of torch's error for labels out of range; other errors, e.g. of memory, stay."""
    try:
        yield
    except (IndexError, RuntimeError) as error:
        if not any(sign in str(error) for sign in ("out of bounds", "device-side assert")):
            raise
        raise ValueError(f"{what}: {str(error).rstrip('.')}. {remedy}") from error


def only_valid(values: Tensor, valid: Tensor, why: str) -> Tensor:
    """Return floating-point ``values`` if they are ``valid`` everywhere.

    Within `torch.vmap` no single value can be read. There an invalid value becomes NaN, which raises an error later.

    Raises:
        ValueError: with the message ``why``, if some are not valid.
    """
    try:
        wrong = not bool(valid.all())
    except RuntimeError:
        return values.where(valid, torch.nan)
    if wrong:
        raise ValueError(why)
    return values


def call_forward(module: Any, batch: Any, hook: str, /, *args: Tensor, **kwargs: Any) -> Any:
    """Call a module with arguments from a batch; where forward takes others, ``hook`` is the method to override.

    Raises:
        TypeError: if forward does not take them. A forward of ``*args, **kwargs`` may raise another error for them
            further within: that is recognised too. Other errors of forward stay as they are.
    """
    taken = signature(module.forward)
    try:
        taken.bind(*args, **kwargs)
    except TypeError as error:
        raise _not_taken(module, batch, hook, kwargs, error) from error
    try:
        return module(*args, **kwargs)
    except (TypeError, LookupError, ValueError) as error:
        kinds = {parameter.kind for parameter in taken.parameters.values()}
        if kinds & {Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD} and _is_of_arguments(error, module.forward):
            raise _not_taken(module, batch, hook, kwargs, error) from error
        raise


def _is_of_arguments(error: Exception, forward: Any) -> bool:
    """Whether an error means that a function, or one that it calls, got other arguments than it expected."""
    if isinstance(error, TypeError):
        return _WRONG_CALL.search(str(error)) is not None
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    own = getattr(unwrap(forward), "__code__", None)  # deeper errors are hardly about **kwargs or *args
    unpacked = isinstance(error, LookupError) or "values to unpack" in str(error)
    return unpacked and bool(frames) and frames[-1].f_code is own


def _not_taken(module: Any, batch: Any, hook: str, kwargs: Mapping[str, Any], error: Exception) -> TypeError:
    given = f"{', '.join(map(repr, kwargs))} of the batch" if kwargs else "the inputs of the batch alone"
    return TypeError(
        f"{type(module).__name__}.forward cannot be called with {given}, {describe(batch)}: {type(error).__name__}:"
        f" {str(error).rstrip('.')}. Override {hook}(self, batch) to call it; labels are expected as 'labels'."
    )


def _wrong_form(module: Any, batch: Any, hook: str) -> TypeError:
    return TypeError(
        f"The batch is {describe(batch)}; expected (inputs, labels) or a mapping with 'labels'. Override"
        f" {hook}(self, batch) in {type(module).__name__} to say where to find them."
    )
