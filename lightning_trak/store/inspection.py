"""What is in a store, and whether it is whole. Nothing is changed, and a damaged part does not hide the others."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from lightning_trak.store.arrays import verified_place
from lightning_trak.store.checkpoint import FORMER, META, WEIGHTS, WHITENING, CheckpointEntry
from lightning_trak.store.files import PARTIAL, Damaged
from lightning_trak.store.known import EXAMPLES, read_examples
from lightning_trak.store.locks import is_held
from lightning_trak.store.remote import writable
from lightning_trak.store.store import FeatureStore
from lightning_trak.store.weights import load_weights

UNFINISHED = re.compile(rf".+\.[0-9a-f]{{32}}{re.escape(PARTIAL)}")  # what a killed process leaves of what it wrote
REMOVED = re.compile(r"removed-[0-9a-f]{32}")  # what `FeatureStore.remove` leaves, if it is killed
CHUNK_LOCK = re.compile(r"\d{10}\.lock")
FOLDERS = ("checkpoints", "scores", "targets")
_OF_STORE = {"manifest.json", "manifest.lock", *FOLDERS}
_OF_CHECKPOINT = {META, WEIGHTS, "meta.lock", "whitening.lock", WHITENING, "train", FORMER}
NO_COPY = "Put back a copy of the file, or delete the checkpoint; trainer.attribute(ckpt_path=[...]) adds it again."
_TRAIN_AGAIN = "trainer.attribute(...) with a train set computes it again."
_TARGETS_AGAIN = "Delete it: trainer.attribute(...) with these targets computes it again."
_OF_BROKEN = "it belongs to whitening.safetensors, which is damaged or missing"
Advance = Callable[[Path], object]  # is told each file that was read


@dataclass(frozen=True)
class Problem:
    """A damaged file.

    Attributes:
        path: of the file.
        why: what is wrong with it.
        remedy: how to mend it.
        check: raises `Damaged` as long as the file is damaged; None if the file cannot be computed again.
    """

    path: Path
    why: str
    remedy: str
    check: Callable[[], object] | None = None


@dataclass
class CheckpointState:
    """What was found at a checkpoint.

    Attributes:
        path: its folder.
        weights: whether the weights are whole.
        whitening: whether the curvature is whole; None if there is none.
        sums: the number of whole files of sums over the train set.
        rows: the number of training examples whose features are whole.
        problems: the damaged files.
    """

    path: Path
    weights: bool = False
    whitening: bool | None = None
    sums: int = 0
    rows: int = 0
    problems: list[Problem] = field(default_factory=list)

    def is_whole(self, path: Path, check: Callable[[], object], remedy: str, *, again: bool = True) -> bool:
        """Say whether a file is whole; note it among the problems if not.

        ``check`` raises `Damaged` if it is not; ``again`` says whether it can be computed again.
        """
        try:
            check()
        except Damaged as error:
            self.problems.append(Problem(writable(error.path), error.why, remedy, check if again else None))
        except FileNotFoundError:
            return False  # another process has deleted it
        except OSError as error:
            self.problems.append(Problem(path, f"it cannot be read: {error.strerror or error}", remedy))
        else:
            return True
        return False


def checkpoints_of(store: FeatureStore) -> dict[str, CheckpointEntry | Damaged]:
    """Return the checkpoints by digest, in the order in which they were added. Of a damaged one it is the error."""
    found: dict[str, tuple[int, CheckpointEntry | Damaged]] = {}
    for path in listed(store.root / "checkpoints"):
        if path.is_dir() and not UNFINISHED.fullmatch(path.name):
            try:
                entry = store[path.name]
                found[path.name] = entry.meta["created"], entry
            except (KeyError, Damaged) as error:
                if isinstance(error, Damaged) and path.is_dir():  # else it was deleted in the meantime
                    found[path.name] = 2**63, error
    return {digest: found[digest][1] for digest in sorted(found, key=lambda digest: (found[digest][0], digest))}


def inspect_checkpoint(
    store: FeatureStore, digest: str, entry: CheckpointEntry | Damaged, advance: Advance = lambda _: None
) -> CheckpointState:
    """Read every file of a checkpoint; ``entry`` is what `checkpoints_of` returned for it."""
    path = store.root / "checkpoints" / digest
    state = CheckpointState(path)
    if isinstance(entry, Damaged):  # without its metadata and weights, nothing can be said of the other files
        state.problems.append(Problem(writable(entry.path), entry.why, NO_COPY))
        return state
    advance(path / META)
    load = partial(load_weights, path / WEIGHTS, entry.digest)
    state.weights = state.is_whole(path / WEIGHTS, load, NO_COPY, again=False)
    advance(path / WEIGHTS)
    if store.manifest.get("preconditioner"):
        _inspect_whitening(state, entry, advance)
    _inspect_train(state, entry, advance)
    for sums in entry.sums_paths:
        check = partial(entry.check_sums, sums)
        state.sums += state.whitening is not False and state.is_whole(sums, check, _TRAIN_AGAIN)
        advance(sums)
    if not path.is_dir():
        state.problems.clear()  # another process has deleted the checkpoint
    return state


def _inspect_whitening(state: CheckpointState, entry: CheckpointEntry, advance: Advance) -> None:
    """Read the curvature, which must be there if features are."""
    path = writable(entry.whitening_path)
    if path.exists() or entry.chunk_paths:
        state.whitening = state.is_whole(path, entry.read_whitening, _TRAIN_AGAIN)
        advance(path)


def _inspect_train(state: CheckpointState, entry: CheckpointEntry, advance: Advance) -> None:
    """Read the features of the train set."""
    for rows, path in entry.chunk_paths.items():
        check = partial(_read_chunk, entry, rows)
        if state.whitening is False:
            state.problems.append(Problem(path, _OF_BROKEN, _TRAIN_AGAIN, check))
        elif state.is_whole(path, check, _TRAIN_AGAIN):
            state.rows += len(rows)
        advance(path)


def _read_chunk(entry: CheckpointEntry, rows: range) -> None:
    """Read a chunk of features; raise `Damaged` if it is damaged, or not of the curvature that is there now."""
    entry.train.read(rows)


def inspect_targets(
    store: FeatureStore, states: Sequence[CheckpointState], advance: Advance = lambda _: None
) -> tuple[int, list[Problem]]:
    """Read what is stored of targets, features and scores; return the number of whole files, and the damaged ones."""
    state, whole = CheckpointState(store.root / "targets"), 0
    broken = {one.path.name for one in states if one.whitening is False}
    for path in _files_below(state.path):
        if path.suffix == ".safetensors":
            check: Callable[[], object] = partial(_check_target, store, path)
            if path.name == EXAMPLES:
                check = partial(read_examples, store, path.parent.name)
            if path.parent.name in broken:
                state.problems.append(Problem(path, _OF_BROKEN, _TARGETS_AGAIN, check))
            else:
                whole += state.is_whole(path, check, _TARGETS_AGAIN)
            advance(path)
    return whole, state.problems


def _check_target(store: FeatureStore, path: Path) -> None:
    """Verify features or scores of targets; only a call with the same targets knows whether they are theirs."""
    place, folder = verified_place(path), path.parent
    of, _, rows = place.rpartition("|rows ")
    of_scores = of == f"{folder.parent.name}|{folder.name}"
    if not (of_scores or _is_of_checkpoint(store, folder, of)) or not rows.startswith(f"{int(path.stem)} to "):
        raise Damaged(path, "it belongs elsewhere")


def _is_of_checkpoint(store: FeatureStore, folder: Path, of: str) -> bool:
    """Say whether features of targets are those of the checkpoint that their folder is named for."""
    try:
        return any(of == f"{entry.place}|targets {folder.parent.name}" for entry in store.entries([folder.name]))
    except Damaged:
        return True  # the checkpoint is, which is told elsewhere


def unexpected(store: FeatureStore) -> list[Path]:
    """Return files and folders of which the store knows nothing: they do no harm, and nobody deletes them."""
    found = [path for path in listed(store.root) if path.name not in _OF_STORE and not REMOVED.fullmatch(path.name)]
    found += [path for path in listed(store.root / "checkpoints") if not path.is_dir()]
    for entry in checkpoints_of(store).values():
        if isinstance(entry, CheckpointEntry):
            known = {*entry.sums_paths, *entry.chunk_paths.values()}
            own = [path for path in listed(writable(entry.path)) if path.name not in _OF_CHECKPOINT]
            train = [path for path in listed(writable(entry.path) / "train") if not CHUNK_LOCK.fullmatch(path.name)]
            found += [path for path in own + train if path not in known]
    return [path for path in found if not UNFINISHED.fullmatch(path.name)]


def claimed(store: FeatureStore) -> dict[Path, bool | None]:
    """Return the locks under which living processes compute features or curvature now, of checkpoints and targets.

    The value is None where it cannot be told whether the lock is held.
    """
    locks = [path for name in ("checkpoints", "targets") for path in _files_below(store.root / name)]
    held = {path: is_held(path) for path in locks if CHUNK_LOCK.fullmatch(path.name) or path.name == "whitening.lock"}
    return {path: value for path, value in held.items() if value is not False}


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder. Symbolic links are not followed."""
    if path.is_symlink() or not path.is_dir():
        return _bytes(path)
    return sum(_bytes(file) for file in _files_below(path))


def listed(folder: Path) -> list[Path]:
    """Return what is in a folder, sorted by name; nothing if it is no folder, or was deleted in the meantime."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder and in the folders in it. Symbolic links to folders are not followed."""
    for path in listed(folder):
        if path.is_dir() and not path.is_symlink():
            yield from _files_below(path)
        else:
            yield path


def _bytes(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0
