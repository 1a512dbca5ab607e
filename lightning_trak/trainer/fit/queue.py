"""The checkpoints that a run saves: which are to be featurized, and what becomes of one whose file is deleted."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from lightning_trak.influence.training_time import CHECKPOINT_KEY, TrainingTime
from lightning_trak.isolation.module_state import ModuleChanged
from lightning_trak.results.terminal import count
from lightning_trak.store.checkpoint import CheckpointEntry
from lightning_trak.store.store import FeatureStore
from lightning_trak.store.weights import Weights, copy_of_weights, tensors_in, weights_digest, weights_in
from lightning_trak.trainer.featurizing.checkpoints import featurize_checkpoint
from lightning_trak.trainer.featurizing.featurization import FeaturizationLoop
from lightning_trak.trainer.fit.checkpoint_files import checkpoint_files, whole_path
from lightning_trak.trainer.fit.pace import Pace
from lightning_trak.trainer.host.framework import LightningModule, Trainer
from lightning_trak.trainer.host.reports import Reports, time_text

_FINISH_LATER = "trainer.attribute(...) computes what is missing, once the cause is fixed."


class CheckpointQueue:
    """Puts the weights of saved checkpoints into the store, and featurizes them in turn.

    A failure is a warning: features can be computed later, training cannot.

    Args:
        store: takes weights and features.
        loop: featurizes the train set.
        run: the identity of this training.
        reports: takes messages to the user.

    Attributes:
        store: as given.
        last_saved: the digest of the weights that were saved last; None before.
        anything_saved: whether a checkpoint file was written.
        featurized: the number of checkpoints that were featurized.
    """

    def __init__(self, store: FeatureStore, loop: FeaturizationLoop, run: str, reports: Reports) -> None:
        self.store, self._loop, self._run, self._reports = store, loop, run, reports
        self.last_saved: str | None = None
        self.anything_saved, self.featurized, self._failed = False, 0, 0
        self._put_off: set[str] = set()  # digests that the pace did not allow when their turn came
        self._dropped = 0  # of those that were put off, how many lost their files since
        self._files: dict[str, str] = {}  # path of a checkpoint file → digest of its weights
        self._pending: dict[str, bool] = {}  # digest to featurize → whether this run has added it
        self._unshared = True

    def __len__(self) -> int:
        """Return how many checkpoints wait to be featurized."""
        return len(self._pending)

    def own(self) -> list[CheckpointEntry]:
        """Return the checkpoints of this run."""
        return [entry for entry in self.store if entry.meta.get("run") == self._run]

    def file_saved(self, path: str, checkpoint: Mapping[str, Any], training: TrainingTime | None) -> None:
        """Put the weights of a checkpoint file into the store."""
        if not {"state_dict", "epoch", "global_step"} <= checkpoint.keys():
            return  # the file is no checkpoint of Lightning
        self.anything_saved = True
        self.last_saved = self._add_file(whole_path(path), checkpoint, training)

    def file_removed(self, path: str) -> None:
        """Forget a file that was deleted or overwritten; discard its weights if they are not featurized yet."""
        digest = self._files.pop(whole_path(path), None)
        if digest is None or digest in self._files.values():
            return
        if self._pending.pop(digest, False):
            self._dropped += digest in self._put_off
            self._put_off.discard(digest)
            with self.training_goes_on("The weights of a deleted checkpoint could not be removed"):
                self.store.discard(digest)

    def saved(self) -> None:
        """Note, in every process, that the first may have written a checkpoint file."""
        self._unshared = True

    def add_weights_of(self, module: LightningModule, trainer: Trainer, training: TrainingTime | None) -> None:
        """Put the present weights of a module into the store, of a run that saved no file."""
        weights = copy_of_weights(module)
        epoch, step = trainer.current_epoch, trainer.global_step
        self._add(weights, weights_digest(weights), epoch, step, None, training)
        self.saved()

    def share(self, trainer: Trainer) -> bool:
        """Let all processes know what is to be featurized: the first alone sees files.

        Returns:
            Whether there may be work: several processes know only of checkpoints that all of them took part in saving.
        """
        new, self._unshared = self._unshared or trainer.world_size == 1, False
        if new and trainer.world_size > 1:
            digests = trainer.strategy.broadcast(list(self._pending))
            self._pending = {digest: self._pending.get(digest, False) for digest in digests}
        return new

    def featurize(self, trainer: Trainer, pace: Pace, *, limited: bool) -> Iterator[Mapping[str, float]]:
        """Featurize the train set at what waits, the oldest first; if ``limited``, until the pace allows no more.

        Yields:
            How many seconds each stage took at a checkpoint.
        """
        for digest in list(self._pending):
            if limited and pace.limited and not trainer.strategy.broadcast(pace.allows_another()):
                self._put_off |= set(self._pending)
                return
            del self._pending[digest]
            seconds: Mapping[str, float] = {}
            with self.training_goes_on("A checkpoint could not be featurized"), pace.featurizing():
                entry = self.store[digest]
                anew = not entry.train.present()
                seconds = featurize_checkpoint(self._loop, entry, str(self.featurized + 1))
                self.featurized += 1
                if anew:
                    pace.took(sum(seconds.values()))
            yield seconds

    def reconcile(self, trainer: Trainer, *, kept_alone: bool) -> None:
        """Bring the store in line with the files of a resumed run: it may have been killed between the two.

        With ``kept_alone``, only checkpoints whose files are still there are to be featurized.
        """
        own = {entry.digest: entry for entry in self.own()}
        paths = {digest: entry.meta.get("path") for digest, entry in own.items()}
        found: dict[str, str] = {}  # path of a file → digest of its weights
        for path, checkpoint in checkpoint_files(trainer, filter(None, paths.values())):
            noted = checkpoint.get(CHECKPOINT_KEY, {})
            if noted.get("run") == self._run:
                training = noted.get("training_time")
                found[path] = self._add_file(path, checkpoint, training and TrainingTime(**training))
            else:  # of another run, or a file of weights alone, which does not say
                found[path] = weights_digest(weights_in(checkpoint, path))
                if found[path] in own:
                    self._files[path] = found[path]
        for digest, entry in own.items():
            if entry.complete:
                continue
            if kept_alone and digest not in found.values() and _is_gone(paths[digest], found):
                self.store.discard(digest)
            else:
                self._pending.setdefault(digest, True)

    @contextmanager
    def training_goes_on(self, what: str) -> Iterator[None]:
        """Warn once of each kind of failure, and go on; the warning says ``what`` could not be done."""
        try:
            yield
        except Exception as error:
            if isinstance(error, ModuleChanged) and not error.restored:
                raise
            self._failed += 1
            kind = type(error).__name__
            warning = f"{what}: {kind}: {str(error).rstrip('.')}. Training goes on. {_FINISH_LATER}"
            self._reports.warn(warning, about=f"a failure of kind {kind}")

    def say_what_waited(self, pace: Pace) -> None:
        """Say what the pace put off."""
        waited, budget = len(self._put_off & self._pending.keys()), f"by budget={pace.share}"
        if waited:
            self._reports.tell(
                f"{count(waited, 'checkpoint')} waited for the end of training, {budget}. Featurizing takes about"
                f" {time_text(waited * pace.expected)}. If you stop it, trainer.attribute(...) does the rest."
            )
        if self._dropped:
            self._reports.tell(
                f"{count(self._dropped, 'checkpoint')} were deleted while they waited, {budget}, and are not averaged."
                " ModelCheckpoint(save_top_k=-1) keeps all."
            )

    def say_what_is_there(self) -> None:
        """Say how many checkpoints will be averaged over, and from how many runs."""
        total, runs = len(self.store), {entry.meta.get("run") for entry in self.store}
        known = len(runs - {None})
        sources = " and ".join([count(known, "run")] * (known > 0) + ["files"] * (None in runs))
        others = " (with those of earlier runs; TRAKCallback(overwrite=True) deletes them)" * (not runs <= {self._run})
        if total:
            self._reports.tell(
                f"{count(self.featurized, 'checkpoint')} featurized. trainer.attribute() will average over"
                f" {count(total, 'checkpoint')} in '{self.store.dirpath}', from {sources}{others}."
            )

    def say_what_failed(self) -> None:
        """Say how many checkpoints could not be featurized."""
        if self._failed:
            self._reports.tell(f"{count(self._failed, 'checkpoint')} could not be featurized. {_FINISH_LATER}")

    def _add_file(self, path: str, checkpoint: Mapping[str, Any], training: TrainingTime | None) -> str:
        """Put the weights of a file into the store; return their digest."""
        weights = tensors_in(checkpoint["state_dict"])
        digest = weights_digest(weights)
        if self._files.get(path) != digest:
            self.file_removed(path)
            self._files[path] = digest
            self._add(weights, digest, checkpoint["epoch"], checkpoint["global_step"], path, training)
        return digest

    def _add(
        self, weights: Weights, digest: str, epoch: int, step: int, path: str | None, training: TrainingTime | None
    ) -> None:
        """Put weights into the store, to be featurized."""
        file = "none was saved" if path is None else os.path.basename(path)
        with self.training_goes_on(f"The checkpoint '{file}' of step {step} could not be put into the feature store"):
            if digest in self.store and self.store[digest].complete:
                return
            added = digest not in self.store or self.store[digest].meta.get("run") == self._run
            meta = {"epoch": epoch, "global_step": step, "file": file, "path": path, "run": self._run}
            meta["training_time"] = training and asdict(training)
            meta["n_trainable"] = self._loop.reader.n_trainable
            self.store.add(digest, meta, weights)
            self._pending.setdefault(digest, added)


def _is_gone(path: str | None, found: Mapping[str, str]) -> bool:
    """Say whether the file of a checkpoint is known to be deleted, or overwritten by other weights.

    None of the files that were ``found`` has the weights of the checkpoint.
    """
    return path is not None and "://" not in path and (path in found or not os.path.exists(path))
