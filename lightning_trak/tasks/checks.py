"""Checks of model outputs: each error says what is wrong and how to correct it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_trak.data.batch import describe, tensors_of

_SHOWN = 10  # the most examples that a message names

_LOOK = {  # the likely cause; not the weights for targets: the train set was featurized with them
    "train": "Look at these examples and at the weights (did training diverge?); remove the examples",
    "target": "Look at these targets: correct or remove them",
}
_STABLER = "or compute model_output in a numerically stable way, e.g. from logsumexp, not from log(softmax)."


def check_dependent(module: Any, dependent: bool, n_parameters: int, method: str = "model_output") -> None:
    """Raise a ValueError unless outputs depend on an attributed parameter."""
    if not dependent:
        raise ValueError(
            f"{type(module).__name__}.{method} does not depend on any of the {n_parameters} attributed"
            " parameters. Compute it without .detach(), .item(), torch.no_grad() or NumPy, and let parameters=..."
            " select some that it uses."
        )


def check_size(module: Any, outputs: Tensor, size: int, method: str = "model_output") -> None:
    """Raise a ValueError unless there is one output for each of ``size`` examples."""
    if outputs.shape != (size,):
        raise ValueError(
            f"{type(module).__name__}.{method}(batch) returned shape {tuple(outputs.shape)} for a batch"
            f" of {size} examples; expected one number for each, ({size},)."
        )


def versions_of(batch: Any) -> list[int | None]:
    """Return the version counter of every tensor of a batch; None for one made in inference mode, which has none."""
    return [None if tensor.is_inference() else tensor._version for tensor in tensors_of(batch)]


def check_unchanged(module: Any, batch: Any, before: Sequence[int | None]) -> None:
    """Raise a ValueError if the tensors of a batch have other versions than ``before``, from `versions_of`."""
    pairs = enumerate(zip(versions_of(batch), before, strict=True))
    changed = [place for place, (one, other) in pairs if one != other]
    if changed:
        raise ValueError(
            f"{type(module).__name__}.model_output changes its batch in place ({describe(batch)}, tensor"
            f" {changed[0] + 1}), so a second call gives other outputs. Work on a copy: x = x / 255, not x /= 255."
        )


def rows_text(rows: Sequence[int]) -> str:
    """Return the first of some rows, for a message.

    >>> rows_text(range(3, 20))
    '3, 4, 5, 6, 7, 8, 9, 10, 11, 12, ...'
    """
    return ", ".join(map(str, rows[:_SHOWN])) + (", ..." if len(rows) > _SHOWN else "")


def check_finite(what: str, values: Tensor, examples: str, rows: Sequence[int]) -> None:
    """Raise a ValueError naming the rows of the ``examples`` (train or target) whose value is NaN or infinite.

    >>> check_finite("model_output", torch.tensor([0.0, float("nan")]), "train", [5, 6])
    Traceback (most recent call last):
        ...
    ValueError: model_output is NaN or infinite for train rows 6. Look at these examples and at the weights (did
    training diverge?); remove the examples, or compute model_output in a numerically stable way, e.g. from logsumexp,
    not from log(softmax).
    """
    bad = (~torch.isfinite(values)).nonzero()[:, 0].tolist()
    if bad:
        shown = rows_text([rows[index] for index in bad])
        raise ValueError(f"{what} is NaN or infinite for {examples} rows {shown}. {_LOOK[examples]}, {_STABLER}")


def check_terms(loss_grad: Tensor, curvature: Tensor, examples: str, rows: Sequence[int]) -> None:
    """Raise a ValueError naming the rows of the ``examples`` whose Q or w is NaN or infinite."""
    check_finite("out_to_loss_grad", loss_grad, examples, rows)
    check_finite("out_to_loss_curvature", curvature, examples, rows)


def check_independent(what: str, together: Tensor, alone: Tensor, tolerance: float, examples: str, row: int) -> None:
    """Raise a ValueError if the output of an example, (1,), differs between its batch and the example alone."""
    if not torch.allclose(together, alone, rtol=tolerance, atol=tolerance):
        raise ValueError(
            f"{what} gives {together.item():.6g} for {examples} row {row} in a batch, and {alone.item():.6g} for it"
            " alone. The output of an example must not depend on the other examples (through padding without a mask,"
            " batch statistics, or negatives from the batch), nor on chance. If you mean the output of the example"
            " alone, use gradients='loop'."
        )


def described_rows(module: Any, said: Any, size: int) -> dict[str, Sequence[Any]]:
    """Return what ``describe`` said of a batch as one value for each of ``size`` examples, by name.

    Raises:
        TypeError: if it is no mapping, or a value is no sequence.
        ValueError: if there are more values, or fewer.

    >>> described_rows(None, {"label": torch.tensor([3, 4])}, 2)
    {'label': [3, 4]}
    """
    hook = f"{type(module).__name__}.describe(batch)"
    if not isinstance(said, Mapping):
        raise TypeError(f"{hook} returned {describe(said)}; expected a dict such as {{'prediction': values}}.")
    columns = {}
    for name, values in said.items():
        listed = values.tolist() if hasattr(values, "tolist") else values
        if not isinstance(listed, Sequence) or isinstance(listed, (str, bytes)):
            raise TypeError(f"{hook} returned {describe(values)} as {name!r}; expected a value for each example, (b,).")
        if len(listed) != size:
            raise ValueError(f"{hook} returned {len(listed)} values as {name!r} for a batch of {size} examples.")
        columns[name] = listed
    return columns
