"""Data sets that a user passes to see their examples: checked, and read by row."""

from __future__ import annotations

from typing import Any


def check_data_set(name: str, data: Any, expected: int) -> None:
    """Raise an error if ``data`` is no sequence of as many examples as were attributed."""
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise TypeError(
            f"{name} must be a sequence of examples, with len({name}) and {name}[i]; got {type(data).__name__}. Pass"
            " the data set, not its loader."
        )
    if len(data) != expected:
        raise ValueError(
            f"{name} must have {expected} examples, as many as were attributed, in the same order; got {len(data)}."
        )


def read(data: Any, row: int) -> Any:
    """Return an example of a data set; of a data frame, a row by the names of its columns.

    >>> read(["a", "b"], 1)
    'b'
    """
    if not hasattr(data, "iloc"):
        return data[row]
    return {name: data[name].iloc[row] for name in data.columns}  # each of its own type; a row has one for all
