"""Targets with their most helpful and most harmful training examples, as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import zip_longest
from typing import Any

import numpy as np

from lightning_trak.results.attribution import Attribution
from lightning_trak.results.numbers import terminal_number
from lightning_trak.results.terminal import cell_text, table


def target_texts(attribution: Attribution, columns: Iterable[int], k: int = 5) -> Iterator[str]:
    """Yield what to print of each target: what is known of it, and a table with a row for each rank.

    Args:
        attribution: the scores.
        columns: the targets, by column of the scores.
        k: how many training examples on each side; fewer where fewer have a score above or below zero.

    >>> import torch
    >>> from lightning_trak.results.info import AttributionInfo
    >>> info = AttributionInfo(3, 1, ("a1b2",), "sparse", 2048, 0.3, True)
    >>> attribution = Attribution(torch.tensor([[0.5], [-1.0], [2.0]]), info)
    >>> attribution = attribution.with_columns(train={"label": ["cat", "dog", "cat"]}, targets={"id": ["x.png"]})
    >>> print(*target_texts(attribution, [0]))
    Target x.png
      helpful  id  label  harmful  id  label
        +2.00  2   cat      -1.00  1   dog
       +0.500  0   cat
    """
    known = attribution.table(k)
    for column in columns:
        first, last = np.searchsorted(known["target_row"], [column, column + 1])
        lines = _ranks(known, range(first, last), with_labels="train_label" in known)
        yield "\n".join([_target(attribution, column), *(f"  {line}" for line in lines)])


def _target(attribution: Attribution, column: int) -> str:
    """Return what is known of a target, in one line."""
    targets = attribution.targets
    facts: list[tuple[str, Any]] = [
        (name, targets.columns.get(name, {column: None})[column]) for name in ("label", "prediction")
    ]
    outputs = getattr(attribution, "outputs", None)
    facts.append(("output", None if outputs is None else outputs[column].item()))
    told = ", ".join(f"{name} {cell_text(value)}" for name, value in facts if value is not None)
    return f"Target {cell_text(targets.ids[column])}{told and ': '}{told}"


def _ranks(known: Any, rows: range, *, with_labels: bool) -> list[str]:
    """Return the lines of the table of one target, whose rows in the long table are given."""
    names = ["train_id", *["train_label"] * with_labels]
    sides: dict[str, list[list[str]]] = {"helpful": [], "harmful": []}
    for row in rows:
        cells = [
            terminal_number(float(known["score"][row]), signed=True),
            *(cell_text(known[name][row]) for name in names),
        ]
        sides[known["side"][row]].append(cells)
    if not rows:
        return ["No training example has a score other than 0."]
    empty, titles = [""] * (1 + len(names)), [name.removeprefix("train_") for name in names]
    ranks = [[*helpful, *harmful] for helpful, harmful in zip_longest(*sides.values(), fillvalue=empty)]
    return table([["helpful", *titles, "harmful", *titles], *ranks], right="helpful harmful").splitlines()
