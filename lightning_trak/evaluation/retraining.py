"""Ground truth with the user's own code: their model, trained by their trainer on parts of their train set."""

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
from lightning_trak.evaluation.ground_truth import DamagedRun, GroundTruth, check_targets, read_run, run_name, write_run
from lightning_trak.evaluation.outputs import model_outputs
from lightning_trak.isolation.random_states import kept_generators, kept_random_states, seed_all
from lightning_trak.store.files import read_json, write_json


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

    Every run is kept in ``dirpath`` as it ends. A call that is repeated goes on with what is missing, also with more
    subsets or repeats, and returns those that it asks for, whatever else is there. A file that is damaged is named in a
    warning, and its run done again. Several processes may share the directory, and then share the work.

    Args:
        make_module: returns a new LightningModule, with ``model_output``; called under the run's own seed.
        datamodule: supplies the train set, and the targets as for ``trainer.attribute``. Training examples are counted
            in the order of the dataset of ``train_dataloader()``, as in the scores.
        make_trainer: returns a new Trainer with the settings of the training in question. Let it be silent:
            ``L.Trainer(..., logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False)``.
        n_subsets: s.
        fraction: of the train set, in each subset.
        repeats: trainings on each subset, r; with 2 or more the noise of training becomes known.
        seed: chooses the subsets, and the seed of every training.
        dirpath: where the runs are kept. What module and Trainer are like is not compared: take another for others.
        dataloaders: the targets, if not those of the datamodule.

    Returns:
        Which examples each subset has, (s, n), and the outputs, (s, r, m).

    Raises:
        ValueError: for arguments out of range, or if the directory holds runs of other data or settings.
    """
    if n_subsets < 1 or repeats < 1 or not 0 < fraction < 1:
        raise ValueError(
            "n_subsets and repeats must be positive integers and fraction between 0 and 1, got"
            f" {n_subsets!r}, {repeats!r} and {fraction!r}."
        )
    runs = Runs(make_module, datamodule, make_trainer, dirpath, dataloaders, {"fraction": fraction, "seed": seed})
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
    """Draw round(n · fraction) of n examples: a mask (n,), a function of seed and number alone."""
    generator = torch.Generator().manual_seed(_number(f"{seed}:subset:{subset}"))
    mask = torch.zeros(n, dtype=torch.bool)
    mask[torch.randperm(n, generator=generator)[: max(1, round(n * fraction))]] = True
    return mask


def draw_removed(n: int, k: int, seed: int, repeat: int) -> Tensor:
    """Draw a mask (n,) of all examples but k."""
    generator = torch.Generator().manual_seed(_number(f"{seed}:removed:{k}:{repeat}"))
    mask = torch.ones(n, dtype=torch.bool)
    mask[torch.randperm(n, generator=generator)[:k]] = False
    return mask


class Runs:
    """Trainings on parts of the train set, one file for each in ``dirpath/runs``; several processes may work at it.

    Args:
        make_module: returns a new LightningModule.
        datamodule: supplies train set and targets.
        make_trainer: returns a new Trainer.
        dirpath: where the files are.
        dataloaders: the targets, if not those of the datamodule.
        settings: what else all runs of the directory share.
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
        """Do all runs that nobody has done yet, and those whose file is damaged.

        Args:
            jobs: of each run, its name, the mask of its training examples (n,), and its seed.
            description: for the progress bar.

        Returns:
            The targets' outputs after each run, (m,), by its name.
        """
        outputs: dict[str, Tensor] = {}
        with tqdm(total=len(jobs), desc=description, disable=None, dynamic_ncols=True) as bar:
            for wait in (False, True):
                for job in [job for job in jobs if job[0] not in outputs]:  # then those that another process was at
                    found = self._try(job, wait=wait)
                    if found is not None:
                        outputs[job[0]] = found
                        bar.update()
        check_targets(outputs, self._folder.parent)
        return outputs

    def _try(self, job: tuple[str, Tensor, str], *, wait: bool) -> Tensor | None:
        """Return the outputs of a run, done now unless it was; None if another process is at it, and not ``wait``."""
        name, mask, _ = job
        with suppress(FileNotFoundError, DamagedRun):
            return read_run(self._path(name), mask)[1]
        try:
            lock = FileLock(self._locks / f"{name}.lock", blocking=wait).acquire()  # let go when the process dies
        except Timeout:
            return None
        with lock:
            return self._do(job)

    def _do(self, job: tuple[str, Tensor, str]) -> Tensor:
        """Do a run, unless another process has done it by now."""
        name, mask, seed = job
        path = self._path(name)
        try:
            return read_run(path, mask)[1]
        except FileNotFoundError:
            pass
        except DamagedRun as error:
            warnings.warn(f"{error} It is done again.", stacklevel=5)
        outputs = self._train(mask, seed)
        write_run(path, mask, outputs)
        return outputs

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.npz"

    def _train(self, mask: Tensor, seed: str) -> Tensor:
        """Train anew on the examples of ``mask``; return the model outputs of the targets, (m,)."""
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
                raise RuntimeError(f"A training on a subset ended as '{trainer.state.status}'; it is not recorded.")
            outputs = model_outputs(trainer, module, view, self._dataloaders)
        if not bool(torch.isfinite(outputs).all()):
            raise ValueError(
                f"After training on {len(rows)} examples (seed {seed}) model_output is NaN or infinite for"
                f" {int((~outputs.isfinite()).sum())} targets: the training diverged. Lower the learning rate."
            )
        return outputs


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run under a seed, and restore the random states, those of devices too."""
    with kept_random_states():
        seed_all(seed)
        yield


def _number(text: str) -> int:
    """Hash to 32 bits, as many as NumPy takes for a seed; equal in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")


def _agree(path: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, or see that the one that is there says the same."""
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            write_json(path, manifest)
        stored = read_json(path)
    if (stored.get("n_train"), stored.get("data")) != (manifest["n_train"], manifest["data"]):
        raise ValueError(
            f"'{path.parent}' holds runs on another train set: {difference(stored, manifest)}. Use another dirpath."
        )
    for name, value in manifest.items():
        if name != "data_rows" and stored.get(name) != value:
            raise ValueError(
                f"'{path.parent}' holds runs with {name}={stored.get(name)!r}, not {value!r}. Use another dirpath."
            )
