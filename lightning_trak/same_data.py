"""Where two data sets differ, told from a few characters for each example that was looked at. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

_SAMPLED = 1024
ROW_CHARACTERS = (
    4  # of a hexadecimal digest: enough to name a row; the digest of all says whether the data are the same
)


def sampled_rows(n: int) -> list[int]:
    """Return the rows that stand for a data set of n examples: up to 1024, evenly spaced, the first and the last.

    >>> sampled_rows(3), len(sampled_rows(5000)), sampled_rows(5000)[-1]
    ([0, 1, 2], 1024, 4999)
    """
    return sorted({round(row) for row in np.linspace(0, n - 1, min(n, _SAMPLED))})


def difference(former: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say how two data sets differ: in their length, in their content, and where that begins.

    Args:
        former: ``"n_train"``, and ``"data_rows"``: `ROW_CHARACTERS` for each of the `sampled_rows`; one of old may lack
            them.
        now: the same of the other.

    >>> difference({"n_train": 3, "data_rows": "000011112222"}, {"n_train": 3, "data_rows": "0000aaaa2222"})
    'as many examples as here, 3, with other content: 1 of 3 rows that were compared, the first of them row 1'
    """
    sizes = former["n_train"], now["n_train"]
    equal = sizes[0] == sizes[1]
    length = f"as many examples as here, {sizes[0]}" if equal else f"{sizes[0]} examples, here {sizes[1]}"
    one, other = _by_row(former), _by_row(now)
    common = [row for row in one if row in other]
    places = [place for place, row in enumerate(common) if one[row] != other[row]]
    if not common or (equal and not places):
        return f"{length}, with other content" if equal else length
    if not places:
        return f"{length}; all {len(common)} rows that were compared are the same"
    first = common[places[0]]
    least = common[places[0] - 1] + 1 if places[0] else 0
    where = f"row {first}" if least == first else f"one of the rows {least} to {first}"
    return (
        f"{length}, with other content: {len(places)} of {len(common)} rows that were compared, the first of them"
        f" {where}"
    )


def _by_row(data: Mapping[str, Any]) -> dict[int, str]:
    digits = data.get("data_rows", "")
    found = [digits[first : first + ROW_CHARACTERS] for first in range(0, len(digits), ROW_CHARACTERS)]
    return dict(zip(sampled_rows(data["n_train"]), found, strict=bool(found)))
