"""Damages one file of a store, of saved scores or of retraining runs: nothing wrong may come of it unsaid."""

from __future__ import annotations

import random
import re
import shutil
import traceback
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lightning_trak import Attribution, GroundTruth, TRAKCallback
from tests.conftest import make_trainer
from tests.faults.comparing import differences
from tests.faults.forking import Ended, folder_for, in_a_fork
from tests.faults.scenarios import TRAININGS, Data, Net, Outcome, Targets, attribute_files, retraining
from tests.faults.trials import Found, shared

KINDS = {  # of files, by the end of their paths
    "manifest": r"store/manifest\.json",
    "meta": r"meta\.json",
    "weights": r"weights\.safetensors",
    "whitening": r"whitening\.safetensors",
    "sums": r"sums-\w+\.safetensors",
    "chunk": r"train/\d+\.safetensors",
    "lock": r"\.lock",
    "index of scores": r"attribution\.json",
    "array of scores": r"\.npy",
    "retraining manifest": r"retraining/(manifest|asked)\.json",
    "run": r"runs/subset.*\.safetensors",
    "ground truth": r"truth\.safetensors",
    "targets": r"targets/\w+/\w+/\d+\.safetensors",
    "score chunk": r"targets/\w+/scores-\w+/\d+\.safetensors",
}
STORES = ("plain", "plain, half", "every", "every, half")
Operation = Callable[[Path], Outcome]
_OURS = ("ValueError", "FileNotFoundError", "MisconfigurationException", "Damaged")
_REMEDY = re.compile(
    r"\b([Dd]elete|[Uu]se|[Cc]omputes?|[Rr]estore|[Cc]all|[Mm]ake (them|it)|[Pp]ass|runs it again|Save)\b"
)
_TOLD = re.compile("damaged|that retrain_subsets was asked for")
_CURE = re.compile(r"[Dd]elete (?:the folder )?'([^']+)'")


def flip(path: Path, other: Path, drawn: random.Random) -> None:
    """Flip one bit."""
    content = bytearray(path.read_bytes())
    if content:
        content[drawn.randrange(len(content))] ^= 1 << drawn.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, other: Path, drawn: random.Random) -> None:
    """Cut off the end."""
    content = path.read_bytes()
    path.write_bytes(content[: drawn.randrange(max(1, len(content)))])


def zero(path: Path, other: Path, drawn: random.Random) -> None:
    """Put zeros in place of a block."""
    content = bytearray(path.read_bytes())
    start = drawn.randrange(max(1, len(content)))
    stop = min(len(content), start + 512)
    content[start:stop] = bytes(stop - start)
    path.write_bytes(content)


def delete(path: Path, other: Path, drawn: random.Random) -> None:
    """Delete the file."""
    path.unlink()


def swap(path: Path, other: Path, drawn: random.Random) -> None:
    """Exchange the contents of two files of a kind."""
    one, two = path.read_bytes(), other.read_bytes()
    path.write_bytes(two)
    other.write_bytes(one)


def append(path: Path, other: Path, drawn: random.Random) -> None:
    """Add a byte."""
    path.write_bytes(path.read_bytes() + bytes([drawn.randrange(256)]))


def empty(path: Path, other: Path, drawn: random.Random) -> None:
    """Leave nothing."""
    path.write_bytes(b"")


DAMAGES = (flip, truncate, zero, delete, swap, append, empty)


class Answer(NamedTuple):
    """What an operation came to.

    Attributes:
        outcome: what it returned; None after an error.
        told: what it warned of, or the error.
        error: the name of the error; "" for none.
        end: the end of the traceback.
    """

    outcome: Outcome | None
    told: str
    error: str = ""
    end: str = ""


def attribute(folder: Path, data: Callable[[], Any] = Data) -> Outcome:
    """Ask a store all there is to ask."""
    trainer = make_trainer(folder, TRAKCallback(folder / "store"))
    found = trainer.attribute(Net(), datamodule=data())
    influence = trainer.attribute_self(Net(), datamodule=data())
    return {"scores": found.scores.numpy(), "without": found.without([0, 1]).numpy(), "self": influence.numpy()}


def attribute_targets(folder: Path) -> Outcome:
    """Attribute without the train set."""
    trainer = make_trainer(folder, TRAKCallback(folder / "store"))
    found = trainer.attribute(Net(), datamodule=Targets())
    return {"scores": found.scores.numpy(), "without": found.without([0, 1]).numpy()}


def resume(folder: Path) -> Outcome:
    """Train again from the checkpoint of the first epoch, and attribute."""
    for path in sorted((folder / "files").glob("*.ckpt"))[1:]:
        path.unlink()
    trainer = TRAININGS[(folder / "training").read_text()].fit(folder)
    return {"scores": trainer.attribute().scores.numpy()}


def load(folder: Path) -> Outcome:
    """Read saved scores."""
    few = Attribution.load(folder / "store" / "scores" / "few").top(2)
    return {
        "saved": Attribution.load(folder / "store" / "scores" / "scores").scores.numpy(),
        "few": few.values.numpy(),
        "of": few.indices.numpy(),
    }


def read_runs(folder: Path) -> Outcome:
    """Read retraining runs without running any."""
    return of_truth(GroundTruth.load(folder / "retraining"))


def read_truth(folder: Path) -> Outcome:
    """Read a saved ground truth."""
    return of_truth(GroundTruth.load(folder / "truth.safetensors"))


def of_truth(truth: GroundTruth) -> Outcome:
    """Return masks and outputs."""
    return {"masks": truth.masks.numpy(), "outputs": truth.repeats.numpy()}


def operations_for(kind: str, store: str) -> tuple[Operation, ...]:
    """Return what reads a file of a kind in a store; what is half-filled can do nothing without the train set."""
    if kind in ("run", "retraining manifest"):
        return read_runs, retraining
    if kind == "ground truth":
        return (read_truth,)
    if "scores" in kind:
        return (load,)
    return (attribute, resume) if store.endswith("half") else (attribute, attribute_targets, resume)


def answer(operation: Operation, folder: Path) -> Answer:
    """Do an operation in a fork."""

    def work() -> Answer:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                outcome, error = operation(folder), None
            except Exception as raised:
                outcome, error = None, raised
                end = " ⏎ ".join(line.strip() for line in traceback.format_tb(raised.__traceback__)[-3:])
        told = " ⏎ ".join(str(one.message) for one in caught if _TOLD.search(str(one.message)))
        return Answer(outcome, told) if error is None else Answer(None, str(error), type(error).__name__, end)

    ended: Ended = in_a_fork(work, folder)
    return Answer(None, ended.end, f"signal {-ended.status}") if ended.status else ended.value


class Damages:
    """Finished stores to copy, with the right answers.

    Args:
        root: a folder for them.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: dict[tuple[str, Operation], Outcome] = {}
        for training in ("plain", "every"):
            self._make(root / training, training)
        never = set(KINDS).difference(*(files_by_kind(root / name) for name in STORES))
        if never:
            raise ValueError(f"No store has files of the kinds {', '.join(sorted(never))}.")

    def _make(self, folder: Path, training: str) -> None:
        """Make a finished store, and one in which half of the chunks are missing."""

        def work() -> None:
            trainer = TRAININGS[training].fit(folder)
            trainer.attribute(name="scores")
            trainer.attribute(name="few", top_k=2)
            retraining(folder)
            GroundTruth.load(folder / "retraining").save(folder / "truth.safetensors")

        in_a_fork(work, folder).succeeded()
        (folder / "training").write_text(training)
        half = folder.with_name(f"{training}, half")
        shutil.copytree(folder, half)
        chunks = sorted((half / "store" / "checkpoints").glob("*/train/*.safetensors"))
        for path in random.Random(0).sample(chunks, len(chunks) // 2):
            path.unlink()

    def _right(self, name: str, operation: Operation) -> Outcome:
        """Return what an operation should come to: what it does where nothing is damaged."""
        finished = name.removesuffix(", half")  # the train set may be needed otherwise
        if (finished, operation) not in self._known:
            with folder_for("right") as folder:
                shutil.copytree(self._root / finished, folder, dirs_exist_ok=True)
                self._known[finished, operation] = in_a_fork(partial(operation, folder), folder).succeeded()
        return self._known[finished, operation]

    def trial(self, seed: int) -> Found:
        """Damage a file that a seed chooses, and see what comes of it."""
        drawn = random.Random(seed)
        name, damage = drawn.choice(STORES), drawn.choice(DAMAGES)
        with folder_for("damage") as folder:
            shutil.copytree(self._root / name, folder, dirs_exist_ok=True)
            kind, paths = drawn.choice(list(files_by_kind(folder).items()))
            path = drawn.choice(paths)
            others = [other for other in paths if other != path]
            damage = flip if damage is swap and not others else damage
            other = drawn.choice(others) if damage is swap else path
            damage(path, other, drawn)
            if kind != "score chunk":  # else scores are read, and not what they are computed from
                for stored in folder.glob("store/targets/*/scores-*"):
                    shutil.rmtree(stored)
            operation = drawn.choice(operations_for(kind, name))
            result, told = self._judged(name, operation, folder, (path, other))
            what = f"seed {seed}, store '{name}': {damage.__name__} {path.relative_to(folder)}"
            return Found("damages", kind, result, f"{what}, then {operation.__name__}: {told.replace(str(folder), '')}")

    def _judged(self, name: str, operation: Operation, folder: Path, paths: tuple[Path, Path]) -> tuple[str, str]:
        """Do an operation in a damaged folder; return the result, and what happened."""
        found = answer(operation, folder)
        if found.error:
            return self._judged_error(found, name, operation, folder, paths)
        wrong = differences(found.outcome, self._right(name, operation))
        if wrong:  # of runs that are gone, the others are read
            fewer = operation is read_runs and "that retrain_subsets was asked for" in found.told
            return "told" if fewer else "wrong", "; ".join([*wrong, found.told])
        if not found.told:
            return "harmless", ""
        again = answer(operation, folder)
        if again.error or again.told or differences(again.outcome, found.outcome):
            return "failed", f"{found.told}. Mended, but the next time: {again.error} {again.told}"
        return "mended", found.told

    def _judged_error(
        self, found: Answer, name: str, operation: Operation, folder: Path, paths: tuple[Path, Path]
    ) -> tuple[str, str]:
        """Judge an error: it must name the file or a folder of it, and a remedy, which must help."""
        story = f"{found.error}: {found.told} [{found.end}]"
        named = any(
            f"'{place}" in found.told for path in paths for place in (path, *path.parents) if folder in place.parents
        )
        if found.error not in _OURS or not named or not _REMEDY.search(found.told):
            missing = operation is attribute_targets and "train" in found.told  # the remedy is the train set
            return ("refused" if missing and found.error in _OURS else "unclear"), story
        cured = self._cured(found, name, folder) if operation in (attribute, attribute_targets) else ""
        return ("failed", f"{story} {cured}") if cured else ("refused", story)

    def _cured(self, found: Answer, name: str, folder: Path) -> str:
        """Delete the folders that errors say are to be deleted, and featurize anew; return what does not help."""
        deleted = False
        while (cure := _CURE.search(found.told)) and folder in Path(cure[1]).parents and Path(cure[1]).exists():
            shutil.rmtree(cure[1])
            found, deleted = answer(attribute_files, folder), True
        if not deleted or not (found.error or differences(found.outcome, self._right(name, attribute_files))):
            return ""
        return f"The remedy did not help: {found}"


def files_by_kind(folder: Path) -> dict[str, list[Path]]:
    """Return the files that may be damaged, by their kind."""
    found: dict[str, list[Path]] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        for kind, end in KINDS.items():
            if re.search(f"{end}$", str(path)):
                found.setdefault(kind, []).append(path)
    return found


def damage_all(count: int, jobs: int, seed: int) -> Iterable[Found]:
    """Damage ``count`` files, one at a time."""
    with folder_for("stores") as root:
        yield from shared(Damages(root).trial, range(seed * count, (seed + 1) * count), jobs)
