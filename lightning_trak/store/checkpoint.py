"""CheckpointEntry: one checkpoint of the feature store."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from math import inf
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from filelock import FileLock

from lightning_trak.features.stored import dense
from lightning_trak.store.arrays import Array, read_arrays, read_with_notes, verified_place, write_arrays
from lightning_trak.store.chunks import Chunks
from lightning_trak.store.files import Damaged, check_own, explained_os_errors, read_json, write_json
from lightning_trak.store.remote import AnyPath, RemotePath, local_folder, writable
from lightning_trak.store.weights import Weights, load_weights

META = "meta.json"
WEIGHTS = "weights.safetensors"
WHITENING = "whitening.safetensors"
FORMER = "former"  # these names are also in `inspection`, which tells what is not of the store
_TYPES = {  # of the values in meta.json; all but the first may be None or not there, which is unknown
    "created": (int,),
    "run": (str,),
    "epoch": (int,),
    "global_step": (int,),
    "file": (str,),
    "path": (str,),
    "training_time": (dict,),
    "n_trainable": (int,),
    "logistic": (bool,),
    "loss_explained": (int, float),
}
_TRAINING_TYPES = {"time": (int, float), "steps": (int,), "weight_decay": (int, float)}  # of a `TrainingTime`


class CheckpointEntry:
    """One checkpoint of a `FeatureStore`: its weights, and the train set's features in chunks of rows.

    Args:
        path: the folder of the checkpoint.
        store: the identity of the store: what is of another store is damaged here.
        n_train: n.
        chunk_rows: the number of rows in a chunk.

    Attributes:
        weights_path: the weights file.
        whitening_path: the curvature's file, which is there only if gradients are whitened.
        remedy: what to do where a file of this checkpoint is damaged that cannot be computed again.

    Raises:
        Damaged: if a file is missing that every checkpoint has, or ``meta.json`` is damaged.
    """

    def __init__(self, path: AnyPath, store: str, n_train: int, chunk_rows: int) -> None:
        self.path, self.digest, self.n_train = path, path.name, n_train
        self._store, self._chunk_rows = store, chunk_rows
        self._root, self._train_folder = path.parent.parent, path / "train"
        self.weights_path, self.whitening_path = path / WEIGHTS, path / WHITENING
        self._whitening_place = f"{store}|{self.digest}|whitening"
        self.remedy = (
            f"Delete the folder '{path}': the checkpoint is left out, or featurized again with"
            " trainer.attribute(ckpt_path=[...])."
        )
        if path.is_symlink():
            raise Damaged(path, "it is a symbolic link", "Put the folder itself there.")
        self.created: int = self.meta["created"]  # damaged metadata are an error now
        if not self.weights_path.is_file():
            raise Damaged(self.weights_path, "it is missing", self.remedy)

    @property
    def meta(self) -> dict[str, Any]:
        """Where the checkpoint comes from, read anew each time: another process may add to it."""
        meta = read_json(self.path / META, self.remedy)
        if (meta.get("digest"), meta.get("store")) != (self.digest, self._store):
            raise Damaged(self.path / META, "it is of another checkpoint or of another store", self.remedy)
        wrong = _of_other_types(meta)
        if wrong:
            raise Damaged(self.path / META, f"no such values can be of {', '.join(wrong)}", self.remedy)
        return meta

    def weights(self) -> Weights:
        """Read the weights; see `load_weights`."""
        return load_weights(self.weights_path, self.digest)

    @property
    def sums_paths(self) -> list[Path]:
        """The paths of all sums over the train set."""
        return sorted(writable(self.path).glob("sums-*.safetensors"))

    @property
    def chunk_paths(self) -> dict[range, Path]:
        """The files of the train set's features, by their rows. Nothing is read, also no curvature."""
        named = Chunks(self._train_folder, "", self.n_train, self._chunk_rows)
        return {rows: writable(named.path(rows.start)) for rows in named.present()}

    @property
    def train(self) -> Chunks:
        """The train set's features, Q, w and f, in chunks."""
        return Chunks(self._train_folder, f"{self.place}|train", self.n_train, self._chunk_rows)

    def targets(self, digest: str, n: int, chunk_rows: int) -> Chunks:
        """Return the features and outputs of n targets; ``digest`` is that of the whole set."""
        return Chunks(targets_folder(self._root, digest) / self.digest, f"{self.place}|targets {digest}", n, chunk_rows)

    def set_aside(self) -> None:
        """Put the last chunk of the train set aside, if it is not full: it will be longer when examples are added."""
        last = self.train.all()[-1]
        path = writable(self.train.path(last.start))
        if len(last) < self._chunk_rows and path.exists():
            former = writable(self.path) / FORMER / str(self.n_train)
            former.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # another process has found it damaged
                os.replace(path, former / path.name)

    def former(self) -> list[Chunks]:
        """Return the chunks that were last when the train set was smaller; only their last chunk may be there."""
        folders = [path for path in (self.path / FORMER).glob("*") if path.name.isdecimal()]
        sizes = sorted({int(path.name) for path in folders} - {0})
        place = f"{self.place}|train"
        return [Chunks(self.path / FORMER / str(n), place, n, self._chunk_rows) for n in sizes if n < self.n_train]

    def forget_former(self) -> None:
        """Delete what `set_aside` put aside, whose rows are in longer chunks by now."""
        if (self.path / FORMER).is_dir():
            shutil.rmtree(writable(self.path) / FORMER, ignore_errors=True)

    @property
    def complete(self) -> bool:
        """Whether the features of all training examples are there."""
        return self.train.complete

    @property
    def features(self) -> Any:
        """Φ, (n, k); of whitened gradients, a mapping with the largest entries by name, see `largest_entries`."""
        train = self._complete()
        (whole,) = train.blocks(None, self.n_train)
        arrays = {name: array for name, array in whole.items() if name not in ("loss_grad", "curvature", "outputs")}
        return dense(arrays).numpy() if "features" in arrays else arrays

    @property
    def loss_grad(self) -> Array:
        """Q, (n,)."""
        return self._complete().column("loss_grad")

    @property
    def curvature(self) -> Array:
        """w, (n,)."""
        return self._complete().column("curvature")

    def supplement(self, meta: Mapping[str, Any]) -> None:
        """Add to ``meta`` what was unknown when the checkpoint was added; known values stay."""
        known = self.meta
        if all(value is None or known.get(name) is not None for name, value in meta.items()):
            return
        path = writable(self.path / META)
        with self.locked("meta"), explained_os_errors(self.path):
            known = self.meta  # another process may have added something
            new = {name: value for name, value in meta.items() if value is not None and known.get(name) is None}
            if new:
                write_json(path, {**known, **new})

    @contextmanager
    def locked(self, what: str) -> Iterator[None]:
        """Let one process at a time do something at this checkpoint; others wait."""
        lock = FileLock(writable(self.path) / f"{what}.lock", thread_local=False)
        if not self.path.is_dir():  # the lock would make it anew
            raise Damaged(self.path, "it was deleted in the meantime")
        with explained_os_errors(self.path):
            held = lock.acquire()
        with held:
            yield

    def read_whitening(self) -> dict[str, Array]:
        """Return the curvature that gradients are whitened by.

        Raises:
            Damaged: if it is missing or damaged.
        """
        try:
            arrays = read_arrays(self.whitening_path, self._whitening_place)
        except FileNotFoundError as error:
            raise Damaged(self.whitening_path, "it is missing") from error
        del arrays["id"]
        return arrays

    def write_whitening(self, arrays: Mapping[str, Array], notes: Mapping[str, Any]) -> None:
        """Store the curvature that gradients are whitened by. Features belong to it: they are of this one or none."""
        own, path = np.frombuffer(uuid4().bytes, np.uint8), writable(self.whitening_path)
        with explained_os_errors(self.path):
            write_arrays(path, {**arrays, "id": own}, self._whitening_place, notes)

    @property
    def whitening_notes(self) -> dict[str, Any]:
        """The notes of `write_whitening`; empty if there is no curvature."""
        return self._whitening[1]

    def read_sums(self, key: Mapping[str, Any]) -> dict[str, Array] | None:
        """Return what `write_sums` wrote for these features and this key; None if it is missing or damaged.

        Args:
            key: all that the sums depend on, apart from the features.
        """
        name, place = self._sums(key)
        for folder in dict.fromkeys([self.derived, self.path]):
            with suppress(FileNotFoundError, Damaged):
                return read_arrays(folder / name, place)
        return None

    def write_sums(self, key: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
        """Store sums over the train set; see `read_sums`."""
        name, place = self._sums(key)
        with explained_os_errors(self.derived):
            if self.derived != self.path:  # a checkpoint that was deleted is not made anew
                self.derived.mkdir(parents=True, exist_ok=True)
            write_arrays(self.derived / name, arrays, place)

    def check_sums(self, path: Path) -> None:
        """Verify a file of `write_sums`, whatever its key.

        Raises:
            Damaged: if it is damaged, or of other features.
        """
        place = verified_place(path)
        if path.name != _sums_name(place) or not place.startswith(f"{self.place}|sums|"):
            raise Damaged(path, "it belongs elsewhere")

    def check_writable(self) -> None:
        """Raise `ReadOnly` if features cannot be added, since the store is in an object store."""
        writable(self.path)

    def computes(self, path: AnyPath) -> bool:
        """Say whether a file of this checkpoint can be computed again; not in an object store."""
        own = path == self.whitening_path or path.parent == self._train_folder
        return isinstance(path, Path) and (own or self._is_of_targets(path))

    def delete_damaged(self, known: AnyPath) -> list[Path]:
        """Delete damaged files that can be computed again; return them.

        Args:
            known: a damaged file. If it is of targets, their features at this checkpoint are deleted, and no others.
        """
        if self._is_of_targets(known):
            return Chunks.delete(writable(known.parent))
        check_own(self.path)
        deleted = []
        try:
            if self.whitening_path.exists():
                self.read_whitening()
        except Damaged as error:
            path = writable(error.path)
            path.unlink(missing_ok=True)
            deleted.append(path)
        # Those of a curvature that is gone are no use either.
        return deleted + self.train.delete_damaged() + self._delete_targets_of_another_curvature()

    def _delete_targets_of_another_curvature(self) -> list[Path]:
        """Delete features of targets, here, that are not of the curvature that is here now; return their files."""
        deleted = []
        for folder in targets_folder(self._root, "").glob(f"*/{self.digest}"):
            with suppress(FileNotFoundError, Damaged):  # whoever reads it will tell
                first = next(iter(sorted(folder.glob("*.safetensors"))), None)
                if first is not None and not verified_place(first).startswith(f"{self.place}|targets "):
                    deleted += Chunks.delete(folder)
        return deleted

    def _sums(self, key: Mapping[str, Any]) -> tuple[str, str]:
        """Return the name of the file of sums, and their place."""
        place = f"{self.place}|sums|{json.dumps(key, sort_keys=True)}"
        return _sums_name(place), place

    def _is_of_targets(self, path: AnyPath) -> bool:
        if not isinstance(path, Path) or path.parent.name != self.digest:
            return False
        return targets_folder(self._root, path.parents[1].name) == path.parents[1]

    @property
    def derived(self) -> Path:
        """The folder of what is computed from the features; of those in an object store it is a local one."""
        train = self._train_folder
        return train.derived if isinstance(train, RemotePath) else train.parent

    @property
    def _whitening(self) -> tuple[str, dict[str, Any]]:
        """Return the identity of the curvature, and the notes on it."""
        try:
            arrays, notes = read_with_notes(self.whitening_path, self._whitening_place, ["id"])
        except FileNotFoundError:
            return "", {}
        return arrays["id"].tobytes().hex(), notes

    @property
    def place(self) -> str:
        """What features belong to: the store, the weights and the curvature."""
        return f"{self._store}|{self.digest}|{self._whitening[0]}"

    def _complete(self) -> Chunks:
        train, missing = self.train, self.train.missing()
        if missing:
            raise ValueError(
                f"Checkpoint {self.digest} has features of {self.n_train - sum(map(len, missing))} of {self.n_train}"
                " training examples. trainer.attribute(...) with a train set computes the rest."
            )
        return train


def targets_folder(root: AnyPath, digest: str) -> Path:
    """Return the folder of targets of the store ``root``, with a folder for each checkpoint; it is a local one."""
    return local_folder(root) / "targets" / digest


def _sums_name(place: str) -> str:
    """Return the name of the file of sums: a digest of all that they depend on."""
    return f"sums-{hashlib.blake2b(place.encode(), digest_size=8).hexdigest()}.safetensors"


def _of_other_types(meta: Mapping[str, Any]) -> list[str]:
    """Return the names of values in ``meta.json`` that are of another type than their readers expect."""
    known = {name: value for name, value in meta.items() if value is not None and name in _TYPES}
    wrong = [name for name, value in {"created": None, **known}.items() if type(value) not in _TYPES[name]]
    training = known.get("training_time", {}) if "training_time" not in wrong else {}
    wrong += [name for name, value in training.items() if type(value) not in _TRAINING_TYPES.get(name, ())]
    numbers = {**known, **training}
    signed = [name for name in ("time", "steps", "epoch", "global_step", "n_trainable") if name not in wrong]
    return wrong + [name for name in signed if name in numbers and not 0 <= numbers[name] < inf]
