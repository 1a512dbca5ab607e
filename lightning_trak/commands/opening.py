"""Opening the store that a command is about."""

from __future__ import annotations

import shlex
from pathlib import Path

from lightning_trak.store.store import FeatureStore

DIGITS = 12  # of a digest, which are shown


def open_store(path: Path) -> FeatureStore:
    """Open a store.

    Raises:
        FileNotFoundError: if there is none; the message says where one may be.
        ValueError: if its manifest is damaged, or of another format version.
    """
    if not (path / "manifest.json").is_file():
        inside = sorted(manifest.parent for manifest in path.glob("*/manifest.json"))
        found = [folder for folder in inside if (folder / "checkpoints").is_dir()]
        near = f" Did you mean '{found[0]}'?" if found else " Pass the dirpath of TRAKCallback."
        what = "is no directory" if not path.is_dir() else "has no manifest.json, so it is no feature store"
        raise FileNotFoundError(f"'{path}' {what}.{near}")
    if (path / "runs").is_dir() and not (path / "checkpoints").is_dir():
        raise ValueError(f"'{path}' has the runs of retrain_subsets. Pass the directory of a feature store.")
    return FeatureStore(path)


def command(name: str, store: FeatureStore, more: str = "") -> str:
    """Return what to type for another command."""
    return f"'python -m lightning_trak {name} {shlex.quote(str(store.dirpath))}{more}'"


def find_checkpoint(store: FeatureStore, digits: str) -> str:
    """Return the digest of the checkpoint that begins with some digits.

    Raises:
        ValueError: if there is none, or more than one.
    """
    folder = store.dirpath / "checkpoints"
    known = sorted(path.name for path in folder.iterdir() if path.is_dir() and "." not in path.name)
    found = [digest for digest in known if digits and digest.startswith(digits)]
    if digits in known:
        return digits
    if len(found) != 1:
        which = f"{len(found)} checkpoints begin with {digits!r}" if found else f"no checkpoint is named {digits!r}"
        raise ValueError(f"In '{store.dirpath}' {which}. {command('info', store)} lists them.")
    return found[0]
