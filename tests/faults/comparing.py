"""Compares what a disturbed run has come to with what it should have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tests.faults.forking import in_a_fork
from tests.faults.running import Undisturbed
from tests.faults.scenarios import TRAININGS, Outcome, attribute_files, kept_digests

_SCORES, _FEATURES = 1e-4, 2e-3  # relative to the largest entry; the second is rounding to 16 bits


def differences(found: Outcome, right: Outcome) -> list[str]:
    """Say in what an outcome differs from the right one; nothing if they are the same up to rounding."""
    lost, more = sorted(right.keys() - found.keys()), sorted(found.keys() - right.keys())
    told = [f"lost: {', '.join(lost)}"] * bool(lost) + [f"too much: {', '.join(more)}"] * bool(more)
    for name in sorted(found.keys() & right.keys()):
        one, other = found[name].astype(float), right[name].astype(float)
        if one.shape != other.shape:
            told.append(f"{name} has the shape {one.shape}, not {other.shape}")
            continue
        apart = np.abs(one - other).max() / max(np.abs(other).max(), 1e-30)
        if not apart <= (_FEATURES if "features" in name else _SCORES):
            told.append(f"{name} is {apart:.1e} of its size apart")
    return told


def digests_in(outcome: Outcome) -> set[str]:
    """Return the digests of the checkpoints of an outcome."""
    return {name.split()[0] for name in outcome if name.endswith("features")}


class Expected:
    """The right outcomes of scenarios; of a run that keeps some checkpoints alone, those of the files it kept.

    Args:
        runs: undisturbed ones, by the name of the scenario.
    """

    def __init__(self, runs: dict[str, Undisturbed]) -> None:
        self._undisturbed = {name: run.outcome for name, run in runs.items()}
        self._of_files: dict[frozenset[str], Outcome] = {}

    def wrong(self, name: str, folder: Path, found: Outcome) -> list[str]:
        """Say what is wrong with an outcome of a scenario in a folder."""
        training = TRAININGS.get(name)
        if training is None or not training.kept:
            return differences(found, self._undisturbed[name])
        kept = kept_digests(folder)
        if digests_in(found) != kept:
            averaged, lost = sorted(digests_in(found) - kept), sorted(kept - digests_in(found))
            return [f"averaged, but Lightning deleted the file: {averaged}; kept, but not averaged: {lost}"]
        return differences(found, self._attributed(folder, kept))

    def _attributed(self, folder: Path, digests: Sequence[str]) -> Outcome:
        """Return the outcome of attributing the files that a run kept in a store of its own."""
        key = frozenset(digests)
        if key == digests_in(self._undisturbed["fit_end"]):
            return self._undisturbed["fit_end"]
        if key not in self._of_files:
            files, apart = sorted((folder / "files").glob("*.ckpt")), folder / "apart"
            self._of_files[key] = in_a_fork(lambda: attribute_files(apart, files), folder).succeeded()
        return self._of_files[key]
