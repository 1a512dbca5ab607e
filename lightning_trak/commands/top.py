"""``top``: the most helpful and most harmful training examples of each target, from saved scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_trak.commands.choosing import chosen_scores
from lightning_trak.results.examples import Examples
from lightning_trak.results.ranking import target_texts
from lightning_trak.results.terminal import cell_text


def top(path: Path, *, name: str | None = None, k: int = 5, target: Sequence[str] | None = None) -> int:
    """Print targets with their most helpful and most harmful training examples; return the exit status, 0."""
    attribution = chosen_scores(path, name)
    targets = attribution.targets
    columns = range(len(targets)) if target is None else [place for one in target for place in _places(targets, one)]
    print(attribution)
    for text in target_texts(attribution, columns, k):
        print(f"\n{text}")
    return 0


def _places(targets: Examples, given: str) -> list[int]:
    """Return the columns of the targets that have an id: as it is, or as it is printed.

    Raises:
        ValueError: if there are none.
    """
    places = [place for place, one in enumerate(targets.ids) if given in (str(one), cell_text(one))]
    if not places:
        known = ", ".join(map(cell_text, targets.ids[:3])) + ", ..." * (len(targets) > 3)
        raise ValueError(f"No target has the id {given!r}. Ids of the {len(targets)} targets are {known}.")
    return places
