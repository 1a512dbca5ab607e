"""Several processes on one store, some of which are killed: the others must not notice."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tests.faults.comparing import Expected, differences
from tests.faults.events import Counter, Watch
from tests.faults.forking import LIMIT, Fork, folder_for, in_a_fork
from tests.faults.running import Undisturbed, prepare
from tests.faults.scenarios import TRAININGS, Outcome, attribute_files, attribute_store, stored
from tests.faults.trials import Found, shared

_KNOWN = ("has no checkpoints", "There is no feature store")  # what may be said before the first checkpoint is saved


class Fate(NamedTuple):
    """When a process is killed: before an event, or after some seconds; 0 for not at all."""

    event: int = 0
    seconds: float = 0.0


def attributing(folder: Path, fate: Fate, **tracking: str) -> Fork:
    """Start a process that attributes files on a store."""

    def work() -> Outcome:
        Watch(folder, Counter(fate.event))
        return attribute_files(folder, **tracking)

    return Fork(work, folder / "processes")


class Processes:
    """Checkpoint files, and the right scores with and without whitening.

    Args:
        root: a folder for the files.
        runs: undisturbed ones.
    """

    def __init__(self, root: Path, runs: dict[str, Undisturbed]) -> None:
        self._root, self._expected = root, Expected(runs)
        prepare("files", root)
        self._kinds = {"processes": {}, "processes, plain": {"preconditioner": "none"}}
        self._right: dict[str, Outcome] = {}
        for name, tracking in self._kinds.items():
            self._right[name] = self._alone(tracking)

    def _alone(self, tracking: dict[str, str]) -> Outcome:
        with folder_for("alone") as folder:
            shutil.copytree(self._root, folder, dirs_exist_ok=True)
            return in_a_fork(lambda: attribute_files(folder, **tracking), folder).succeeded()

    def trial(self, seed: int) -> Found:
        """Let processes share work, as a seed says."""
        drawn = random.Random(seed)
        return self._beside_fit(seed, drawn) if seed % 4 == 3 else self._together(seed, drawn)

    def _together(self, seed: int, drawn: random.Random) -> Found:
        """Attribute in three processes and kill one or two of them."""
        case = drawn.choice(list(self._kinds))
        victims = drawn.sample(range(3), drawn.randint(1, 2))
        fates = [self._fate(drawn) if number in victims else Fate() for number in range(3)]
        story = f"seed {seed}: {fates}."
        with folder_for("processes") as folder:
            shutil.copytree(self._root, folder, dirs_exist_ok=True)
            forks = [attributing(folder, fate, **self._kinds[case]) for fate in fates]
            ended = [fork.wait(fate.seconds or LIMIT) for fork, fate in zip(forks, fates, strict=True)]
            failed = [
                one.end for number, one in enumerate(ended) if one.status and not (one.killed and number in victims)
            ]
            if failed:
                return Found("processes", case, "failed", f"{story} {failed}")
            outcomes = [one.value for one in ended if not one.status] + [stored(folder)]
            right = self._right[case]
            wrong = [told for one in outcomes for told in differences(one, {name: right[name] for name in one})]
            return Found("processes", case, "wrong" if wrong else "right", f"{story} {'; '.join(wrong)}")

    @staticmethod
    def _fate(drawn: random.Random) -> Fate:
        return Fate(event=drawn.randint(1, 120)) if drawn.random() < 0.7 else Fate(seconds=drawn.uniform(0.05, 1.5))

    def _beside_fit(self, seed: int, drawn: random.Random) -> Found:
        """Attribute again and again while a run is trained on the same store."""
        name = drawn.choice([*TRAININGS])
        case, rounds, training = f"beside fit, {name}", 0, TRAININGS[name]
        with folder_for("beside") as folder:
            fit = Fork(lambda: training.fit(folder) and None, folder / "processes")
            while fit.running:
                beside, rounds = in_a_fork(lambda: attribute_store(folder), folder / "processes"), rounds + 1
                if beside.status and not any(known in beside.said for known in _KNOWN):
                    fit.kill()
                    return Found("processes", case, "failed", f"seed {seed}, round {rounds}: {beside.end}")
            trained = fit.wait()
            if trained.status or "could not be" in trained.said:
                return Found("processes", case, "failed", f"seed {seed}: fit: {trained.end}")
            found = in_a_fork(lambda: training.run(folder), folder).succeeded()
            wrong = self._expected.wrong(name, folder, found)
            return Found("processes", case, "wrong" if wrong else "right", f"seed {seed}: {'; '.join(wrong)}")


def share_all(runs: dict[str, Undisturbed], count: int, jobs: int, seed: int) -> Iterable[Found]:
    """Run ``count`` trials."""
    with folder_for("files") as root:
        yield from shared(Processes(root, runs).trial, range(seed * count, (seed + 1) * count), jobs)
