"""What a trial found, the workers that share trials, and the table."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

T = TypeVar("T")
GOOD = ("right", "harmless", "mended", "told", "refused")


@dataclass(frozen=True)
class Found:
    """What a trial found.

    Attributes:
        part: "kills", "damages", "processes" or "power".
        case: the scenario, or the kind of damage.
        result: "right", "harmless", "mended", "told" (less is there, and a warning says so) or "refused" are good;
            "wrong", "unclear" and "failed" are not.
        story: what was done, and what happened.
    """

    part: str
    case: str
    result: str
    story: str = ""

    @property
    def good(self) -> bool:
        """Whether it is as it should be."""
        return self.result in GOOD


def shared(trial: Callable[[T], Found], trials: Sequence[T], jobs: int) -> Iterable[Found]:
    """Yield what each trial found; forks of this process share the trials."""
    if jobs == 1:
        yield from map(trial, trials)
        return
    with multiprocessing.get_context("fork").Pool(jobs, initializer=partial(_remember, trial)) as pool:
        yield from pool.imap_unordered(_try_one, trials)


def _remember(trial: Callable[[T], Found]) -> None:
    """Keep what cannot be pickled: workers inherit it."""
    _remembered.append(trial)


def _try_one(argument: object) -> Found:
    return _remembered[-1](argument)


_remembered: list[Callable[..., Found]] = []


def table(found: Sequence[Found]) -> str:
    """Return a Markdown table: how often each case came to each result."""
    results = [*GOOD, "wrong", "unclear", "failed"]
    lines = [f"| part | case | {' | '.join(results)} |", "|---" * (2 + len(results)) + "|"]
    for part, case in dict.fromkeys((one.part, one.case) for one in sorted(found, key=lambda one: one.part)):
        counts = Counter(one.result for one in found if (one.part, one.case) == (part, case))
        lines.append(f"| {part} | {case} | {' | '.join(str(counts[result] or '') for result in results)} |")
    return "\n".join(lines)


def stories(found: Sequence[Found], most: int = 3) -> str:
    """Return what happened in trials that are not good, at most some of each case and result."""
    told: Counter[tuple[str, str, str]] = Counter()
    lines = []
    for one in (one for one in found if not one.good):
        key = (one.part, one.case, one.result)
        told[key] += 1
        if told[key] <= most:
            lines.append(f"- {one.part}, {one.case}: {one.result}. {one.story}")
    return "\n".join(lines)
