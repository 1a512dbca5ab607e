"""Choosing among the saved scores of a store."""

from __future__ import annotations

from pathlib import Path

from lightning_trak.commands.opening import open_store
from lightning_trak.commands.scores import score_folders
from lightning_trak.results.attribution import Attribution
from lightning_trak.results.saved import INDEX
from lightning_trak.results.terminal import printable

_LISTED = 10  # names in a message


def chosen_scores(path: Path, name: str | None) -> Attribution:
    """Return saved scores.

    Args:
        path: of a store; or of the scores themselves, where `Attribution.save` wrote them.
        name: of the scores in the store; None if there is but one.

    Raises:
        FileNotFoundError: if there is neither a store nor scores.
        ValueError: if the store has no such scores, or ``name`` is missing, or they are damaged.
    """
    if not (path / INDEX).is_file():
        path = _folder(path, name)
    elif name is not None:
        raise ValueError(f"'{path}' has the scores themselves, not a store of several. Leave --name out.")
    return Attribution.load(path)


def _folder(path: Path, name: str | None) -> Path:
    """Return the folder of scores in a store."""
    found = {folder.name: folder for folder in score_folders(open_store(path))}
    if not found:
        raise ValueError(
            f"The store '{path}' has no saved scores. trainer.attribute(..., name='NAME') saves them there, and so does"
            " 'attribute --name NAME' of TRAKCLI."
        )
    if name is None and len(found) == 1:
        return next(iter(found.values()))
    if name in found:
        return found[name]
    listed = ", ".join(map(printable, list(found)[:_LISTED])) + ", ..." * (len(found) > _LISTED)
    what = f"has no scores named {name!r}" if name is not None else f"has {len(found)} saved scores"
    raise ValueError(f"The store '{path}' {what}. Choose one with --name: {listed}.")
