"""Saved scores in a store, by their index: the arrays are not read."""

from __future__ import annotations

from pathlib import Path

from lightning_trak.results.saved import INDEX, PART, parts_of
from lightning_trak.store.files import Damaged, read_json
from lightning_trak.store.inspection import UNFINISHED, listed
from lightning_trak.store.store import FeatureStore


def score_folders(store: FeatureStore) -> list[Path]:
    """Return the folders of saved scores; not those in which nothing is but unfinished files."""
    folders = [folder for folder in listed(store.root / "scores") if folder.is_dir()]
    return [folder for folder in folders if not all(UNFINISHED.fullmatch(path.name) for path in listed(folder))]


def arrays_without_index(folder: Path) -> list[Path]:
    """Return the arrays of a process that was killed while it saved: no index names them.

    None are returned if the index is damaged, since nobody knows which of them it names.
    """
    known: set[str] = set()
    if (folder / INDEX).exists():
        try:
            known = parts_of(read_json(folder / INDEX))
        except (Damaged, KeyError, TypeError, AttributeError):
            return []
    return [path for path in listed(folder) if PART.fullmatch(path.name) and path.name not in known]
