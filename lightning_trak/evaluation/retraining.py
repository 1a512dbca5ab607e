"""Ground truth: the user's own model, retrained by their trainer on subsets of their train set."""

from __future__ import annotations

import copy
import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from lightning_trak.data.identity import difference, fingerprint
from lightning_trak.data.loaders import check_loader, subset_loader
from lightning_trak.evaluation.ground_truth import (
    GroundTruth,
    check_targets,
    note_asked,
    read_run,
    run_name,
    write_run,
)
from lightning_trak.evaluation.outputs import model_outputs
from lightning_trak.isolation.random_states import kept_generators, kept_random_states, seed_all
from lightning_trak.store.files import Damaged, read_json, write_json

_OTHERWISE = "Use another dirpath, or delete it: the runs there stay, and are taken for these."  # than what is damaged


def retrain_subsets(
    make_module: Callable[[], Any],
    datamodule: Any,
    make_trainer: Callable[[], Any],
    n_subsets: int = 100,
    fraction: float = 0.5,
    repeats: int = 1,
    seed: int = 0,
    dirpath: str | os.PathLike[str] = "retraining",
    *,
    dataloaders: DataLoader[Any] | None = None,
) -> GroundTruth:
    """Train on random subsets of the train set, and record the model outputs of the targets.

    Every run is stored in ``dirpath`` as it ends. A repeated call runs what is missing, also for more subsets or
    repeats. It returns the subsets and repeats of its arguments, whatever else is there. A warning names a damaged
    file, and its run is repeated. Several processes may share the directory; then they share the work.

    Args:
        make_module: returns a new LightningModule with ``model_output``; called under the run's own seed.
        datamodule: supplies the train set, and the targets as for ``trainer.attribute``. Training examples are numbered
            in the order of the dataset of ``train_dataloader()``, as in the scores.
        make_trainer: returns a new Trainer with the settings of the original training, without output:
            ``L.Trainer(..., logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False)``.
        n_subsets: s.
        fraction: the part of the train set in each subset.
        repeats: r, the number of trainings on each subset; 2 or more show the noise of training.
        seed: determines the subsets, and the seed of every training.
        dirpath: where the runs are stored. Modules and Trainers are not compared: use another directory for others.
        dataloaders: the targets, if not those of the datamodule.

    Returns:
        Which examples are in each subset, (s, n), and the outputs, (s, r, m).

    Raises:
        ValueError: if an argument is out of range, or the directory has runs with other data or settings.
    """
    if n_subsets < 1 or repeats < 1 or not 0 < fraction < 1:
        raise ValueError(
            "n_subsets and repeats must be positive integers and fraction between 0 and 1, got"
            f" {n_subsets!r}, {repeats!r} and {fraction!r}."
        )
    runs = Runs(make_module, datamodule, make_trainer, dirpath, dataloaders, {"fraction": fraction, "seed": seed})
    note_asked(Path(dirpath), n_subsets, repeats)
    masks = [draw_subset(runs.n_train, fraction, seed, subset) for subset in range(n_subsets)]
    jobs = [
        (run_name(subset, repeat), mask, f"{seed}:{subset}:{repeat}")
        for repeat in range(repeats)
        for subset, mask in enumerate(masks)
    ]
    outputs = runs.complete(jobs, "Retraining on subsets")
    of_subsets = [
        torch.stack([outputs[run_name(subset, repeat)] for repeat in range(repeats)]) for subset in range(n_subsets)
    ]
    return GroundTruth(torch.stack(masks), torch.stack(of_subsets))


def draw_subset(n: int, fraction: float, seed: int, subset: int) -> Tensor:
    """Draw round(n · fraction) of n examples: a mask (n,), which depends on seed and subset number alone."""
    return _draw(n, max(1, round(n * fraction)), f"{seed}:subset:{subset}")


def draw_removed(n: int, k: int, seed: int, repeat: int) -> Tensor:
    """Draw k of n examples to remove, and return the mask of the others, (n,)."""
    return ~_draw(n, k, f"{seed}:removed:{k}:{repeat}")


def _draw(n: int, k: int, seed: str) -> Tensor:
    """Draw k of n examples without replacement: a mask (n,)."""
    mask = torch.zeros(n, dtype=torch.bool)
    mask[torch.randperm(n, generator=torch.Generator().manual_seed(_number(seed)))[:k]] = True
    return mask


class Runs:
    """Trainings on subsets of the train set, one file for each in ``dirpath/runs``. Processes may share the work.

    Args:
        make_module: returns a new LightningModule.
        datamodule: supplies train set and targets.
        make_trainer: returns a new Trainer.
        dirpath: where the files are.
        dataloaders: the targets, if not those of the datamodule.
        settings: other settings that all runs of the directory share.
    """

    def __init__(
        self,
        make_module: Callable[[], Any],
        datamodule: Any,
        make_trainer: Callable[[], Any],
        dirpath: str | os.PathLike[str],
        dataloaders: DataLoader[Any] | None,
        settings: dict[str, Any],
    ) -> None:
        self._make_module, self._make_trainer = make_module, make_trainer
        self._datamodule, self._dataloaders = datamodule, dataloaders
        self._folder = Path(dirpath) / "runs"
        self._locks = Path(dirpath) / "locks"
        for folder in (self._folder, self._locks):
            folder.mkdir(parents=True, exist_ok=True)
        with seeded(0), kept_generators(datamodule, dataloaders):
            view = copy.copy(datamodule)
            view.prepare_data()
            view.setup("fit")
            data = fingerprint(check_loader(view.train_dataloader(), "train_dataloader", "").dataset)
        self.n_train = int(data["n_train"])
        _agree(Path(dirpath) / "manifest.json", {**data, **settings})

    def complete(self, jobs: Sequence[tuple[str, Tensor, str]], description: str) -> dict[str, Tensor]:
        """Return the outputs of all runs; train where a file is missing or damaged.

        Args:
            jobs: for each run its name, the mask of its training examples (n,), and its seed.
            description: the text of the progress bar.

        Returns:
            The outputs of the targets, (m,), by the name of the run.
        """
        outputs: dict[str, Tensor] = {}
        with tqdm(total=len(jobs), desc=description, disable=None, dynamic_ncols=True) as bar:
            for wait in (False, True):  # the second round is for those that another process had
                for job in [one for one in jobs if one[0] not in outputs]:
                    found = self._try(job, wait=wait)
                    if found is not None:
                        outputs[job[0]] = found
                        bar.update()
        check_targets(outputs, self._folder.parent)
        return outputs

    def _try(self, job: tuple[str, Tensor, str], *, wait: bool) -> Tensor | None:
        """Return the outputs of a run, trained now if needed; None if another process trains it, unless ``wait``."""
        name, mask, seed = job
        path = self._folder / f"{name}.safetensors"
        with suppress(FileNotFoundError, Damaged):
            return read_run(path, mask)[1]
        try:
            lock = FileLock(self._locks / f"{name}.lock", blocking=wait).acquire()  # released when the process dies
        except Timeout:
            return None
        with lock:
            if path.exists():  # another process has trained it in the meantime, or the file is damaged
                try:
                    return read_run(path, mask)[1]
                except Damaged as error:
                    warnings.warn(f"{error} It is run again.", stacklevel=4)
            outputs = self._train(mask, seed)
            write_run(path, mask, outputs)
            return outputs

    def _train(self, mask: Tensor, seed: str) -> Tensor:
        """Train a new model on the examples of ``mask``; return its outputs for the targets, (m,)."""
        with seeded(_number(seed)), kept_generators(self._datamodule, self._dataloaders):
            module, trainer = self._make_module(), self._make_trainer()
            view = copy.copy(self._datamodule)
            whole = view.train_dataloader
            rows = mask.nonzero()[:, 0].tolist()
            view.train_dataloader = lambda: subset_loader(
                check_loader(whole(), "train_dataloader", ""), rows, len(mask)
            )
            trainer.fit(module, datamodule=view)
            if trainer.state.status != "finished":
                raise RuntimeError(
                    f"A training on a subset ended as '{trainer.state.status}', and is not stored. Call again to repeat"
                    " it."
                )
            outputs = model_outputs(trainer, module, view, self._dataloaders)
        if not bool(torch.isfinite(outputs).all()):
            raise ValueError(
                f"After training on {len(rows)} examples (seed {seed}) model_output is NaN or infinite for"
                f" {int((~outputs.isfinite()).sum())} targets: the training diverged. Lower the learning rate."
            )
        return outputs


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run under a seed; at the end, restore the random states, also those of devices."""
    with kept_random_states():
        seed_all(seed)
        yield


def _number(text: str) -> int:
    """Hash to 32 bits, the size of a NumPy seed; equal in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")


def _agree(path: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest; if there is one, raise a ValueError where it differs."""
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            write_json(path, manifest)
        stored = read_json(path, _OTHERWISE)
    if "n_train" not in stored:
        raise ValueError(f"'{path}' is damaged: it names no train set. {_OTHERWISE}")
    if (stored.get("n_train"), stored.get("data")) != (manifest["n_train"], manifest["data"]):
        raise ValueError(
            f"'{path.parent}' holds runs on another train set: {difference(stored, manifest)}. Use another dirpath."
        )
    for name, value in manifest.items():
        if name != "data_rows" and stored.get(name) != value:
            raise ValueError(
                f"'{path.parent}' holds runs with {name}={stored.get(name)!r}, not {value!r}. Use another dirpath."
            )
