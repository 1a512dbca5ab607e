"""Kills a run before each of its changes of files, or at a random time; a rerun must come to the same."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import NamedTuple

from tests.faults.comparing import Expected
from tests.faults.forking import LIMIT, folder_for
from tests.faults.running import Undisturbed, prepare, run
from tests.faults.trials import Found, shared

_AT_RANDOM_TIMES, _TWICE = 10, 4  # one kill in so many


class Kill(NamedTuple):
    """Where a run is killed.

    Attributes:
        name: of the scenario.
        event: before which it is killed; 0 for none.
        seconds: after which it is killed.
        again: the event before which the rerun is killed too; 0 for none.
    """

    name: str
    event: int = 0
    seconds: float = LIMIT
    again: int = 0


def plan(runs: dict[str, Undisturbed], count: int, seed: int) -> list[Kill]:
    """Spread kills over the events of all scenarios; some are at random times, some reruns are killed too."""
    drawn, total = random.Random(seed), sum(len(run.entries) for run in runs.values())
    kills = [Kill(name, event) for name, run in runs.items() for event in last_added(run)]
    for name, (_, entries, seconds) in runs.items():
        events = len(entries)
        share = max(1, round(count * events / total))
        for number in range(share):
            again = drawn.randint(1, events) if number % _TWICE == 1 else 0
            if number % _AT_RANDOM_TIMES == _AT_RANDOM_TIMES - 1:
                kills.append(Kill(name, seconds=drawn.uniform(0, seconds), again=again))
            else:
                place = number + (drawn.random() if share < events else 0)  # of enough kills, each event has one
                kills.append(Kill(name, 1 + int(place * events / share), again=again))
    return kills


def last_added(run: Undisturbed) -> list[int]:
    """Return before which event the last checkpoint is in its file, but not in the store; nothing if there is none."""
    adding = [
        number
        for number, entry in enumerate(run.entries, 1)
        if entry.kind == "mkdir" and entry.path[:2] == ("store", "checkpoints") and entry.path[-1].endswith(".partial")
    ]
    return adding[-1:]


def trial(kill: Kill, expected: Expected) -> Found:
    """Kill a run, run it again, and compare."""
    with folder_for("kill") as folder:
        prepare(kill.name, folder)
        first = run(kill.name, folder, event=kill.event, seconds=kill.seconds)
        story = f"{first.end if kill.event else f'killed after {kill.seconds:.2f} s'}."
        if kill.again:
            second = run(kill.name, folder, event=kill.again)
            story += f" Then {second.end}." if second.killed else " The rerun had fewer events."
            if second.status and not second.killed:
                return Found("kills", kill.name, "failed", f"{story} The rerun failed: {second.end}")
        last = run(kill.name, folder)
        if last.status:
            return Found("kills", kill.name, "failed", f"{story} The rerun failed: {last.end}")
        wrong = expected.wrong(kill.name, folder, last.value)
        return Found("kills", kill.name, "wrong" if wrong else "right", f"{story} {'; '.join(wrong)}")


def kill_all(runs: dict[str, Undisturbed], count: int, jobs: int, seed: int) -> Iterable[Found]:
    """Kill runs of all scenarios, ``count`` times."""
    expected = Expected(runs)
    yield from shared(lambda kill: trial(kill, expected), plan(runs, count, seed), jobs)
