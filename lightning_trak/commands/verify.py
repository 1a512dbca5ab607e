"""``verify``: whether every file of a store is what was written."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from lightning_trak.commands.opening import DIGITS, command, open_store
from lightning_trak.commands.scores import score_folders
from lightning_trak.results.attribution import Attribution
from lightning_trak.results.terminal import count, printable, short, size_text, table
from lightning_trak.store.checkpoint import META
from lightning_trak.store.files import Damaged
from lightning_trak.store.inspection import (
    FOLDERS,
    NO_COPY,
    Advance,
    CheckpointState,
    Problem,
    checkpoints_of,
    inspect_checkpoint,
    inspect_targets,
    size_of,
    unexpected,
)
from lightning_trak.store.store import FeatureStore

_WIDTH = 100
_SHOWN = 20  # unexpected files that are named


def verify(path: Path) -> int:
    """Read every file of a store, and print what state it is in.

    Returns:
        The exit status: 1 if a file is damaged, otherwise 0, also if rows are missing.
    """
    try:
        store = open_store(path)
    except Damaged as error:
        print(f"{error}\nNothing else can be verified without it.")
        return 1
    with reading(store) as advance:
        states = [inspect_checkpoint(store, *item, advance) for item in checkpoints_of(store).items()]
        whole, problems = inspect_targets(store, states, advance)
        scores = {folder: scores_problem(folder, advance) for folder in score_folders(store)}
    if states:
        print(table([_TITLES, *(_row(store, state) for state in states)], right="rows") + "\n")
    files = [("file", "state"), ("manifest.json", "ok")]
    files += [(f"scores/{short(folder.name, 80)}", "damaged" if one else "ok") for folder, one in scores.items()]
    if whole or problems:
        files.append(("targets", f"{whole} of {count(whole + len(problems), 'file')} ok"))
    print(table(files))
    found = [problem for state in states for problem in state.problems]
    found += [*problems, *(one for one in scores.values() if one is not None)]
    _print_problems(store, found)
    _print_unexpected(store)
    print("\n" + _summary(store, states, found))
    return 1 if found else 0


@contextmanager
def reading(store: FeatureStore) -> Iterator[Advance]:
    """Show a progress bar on stderr, if that is a terminal; yield what it is to be told of every file that is read."""
    total = sum(size_of(store.root / name) for name in FOLDERS)
    bar = tqdm(total=total, desc="Reading", unit="B", unit_scale=True, disable=None, leave=False, dynamic_ncols=True)
    with bar:
        yield lambda path: bar.update(size_of(path))


def scores_problem(folder: Path, advance: Advance) -> Problem | None:
    """Read saved scores; return what is wrong with them."""
    remedy = f"Compute them again with trainer.attribute(..., name={folder.name!r})."
    try:
        for stored in Attribution.load(folder).on_disk.values():
            for _ in stored.blocks():
                pass
    except FileNotFoundError:
        return Problem(folder, "saving them did not end, or attribution.json was deleted", remedy)
    except (OSError, ValueError) as error:
        cause = error.__cause__ or error
        why = cause.why if isinstance(cause, Damaged) else str(cause) or type(cause).__name__
        return Problem(folder, why, remedy)
    finally:
        advance(folder)
    return None


_TITLES = ("checkpoint", "metadata", "weights", "curvature", "sums", "rows", "state")


def _row(store: FeatureStore, state: CheckpointState) -> Sequence[str]:
    """Return the line of a checkpoint."""
    damaged = {problem.path for problem in state.problems}
    name = state.path.name[:DIGITS]
    if state.path / META in damaged:
        return name, "damaged", "?", "?", "?", "?", "damaged"
    sums = sum(path.name.startswith("sums-") for path in damaged) + state.sums
    curvature = {None: "-", True: "ok", False: "damaged"}[state.whitening]
    missing = store.n_train - state.rows
    verdict = "damaged" if damaged else f"{count(missing, 'row')} missing" if missing else "ok"
    rows = f"{state.rows} of {store.n_train}"
    summed = f"{state.sums} of {sums} ok" if sums else "-"
    return name, "ok", "ok" if state.weights else "damaged", curvature, summed, rows, verdict


def _print_problems(store: FeatureStore, problems: Sequence[Problem]) -> None:
    """Print what is wrong and how to mend it; files of one folder with the same fault together."""
    groups: dict[tuple[Path, str, str], list[Path]] = {}
    for problem in problems:
        groups.setdefault((problem.path.parent, problem.why, problem.remedy), []).append(problem.path)
    for (_, why, remedy), paths in groups.items():
        first = paths[0].relative_to(store.root)
        more = f" and {count(len(paths) - 1, 'file')} more in its folder" if paths[1:] else ""
        print(f"\nDamaged: {printable(str(first))}{more}")
        for line in (why[:1].upper() + why[1:].rstrip(".") + ".", remedy):
            lines = textwrap.wrap(printable(line), _WIDTH - 2, break_on_hyphens=False)
            print(textwrap.indent("\n".join(lines), "  "))


def _print_unexpected(store: FeatureStore) -> None:
    """Print files of which the store knows nothing."""
    paths = unexpected(store)
    if paths:
        print("\nNot of the store, and of no harm:")
        for path in paths[:_SHOWN]:
            print(f"  {printable(str(path.relative_to(store.root)))}")
        if paths[_SHOWN:]:
            print(f"  and {len(paths) - _SHOWN} more")


def _summary(store: FeatureStore, states: Sequence[CheckpointState], problems: Sequence[Problem]) -> str:
    """Return the last lines."""
    incomplete = [state for state in states if state.rows < store.n_train and not state.problems]
    lines = []
    if problems:
        lines.append(f"{count(len(problems), 'file')} damaged.")
    else:
        lines.append(f"Nothing is damaged ({size_text(sum(size_of(store.root / name) for name in FOLDERS))} read).")
    if incomplete:
        at = count(len(incomplete), "checkpoint")
        lines.append(f"Rows are missing at {at}: trainer.attribute(...) with a train set computes them.")
    again = sum(problem.check is not None for problem in problems)
    if again:
        lines.append(f"{count(again, 'damaged file')} can be computed again: {command('clean', store)} deletes them.")
    if any(problem.remedy == NO_COPY for problem in problems):
        lines.append(f"{command('clean', store, ' --checkpoint DIGEST')} deletes a checkpoint.")
    return "\n".join(lines)
