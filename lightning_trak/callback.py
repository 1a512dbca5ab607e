"""TRAKCallback: bridges Lightning's checkpoint saving to the stages. There is no mathematics in it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any, TypeGuard

import lightning.pytorch as pl
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from lightning_trak._checkpoints import add_checkpoint, featurize_checkpoint
from lightning_trak._loop import FeaturizationLoop, attached, undisturbed
from lightning_trak._outputs import training_loss
from lightning_trak._plan import Plan
from lightning_trak.data import check_loader
from lightning_trak.gradients import ENGINES
from lightning_trak.projection import Projector, check_projector
from lightning_trak.store import FeatureStore
from lightning_trak.training_time import CHECKPOINT_KEY, TrainingTime
from lightning_trak.weights import tensors_in, weights_digest

_LOSS_TOLERANCE = 0.1  # Dropout may draw otherwise

TRAIN_REMEDY = "Or define featurize_dataloader() in the LightningDataModule or LightningModule."


class TRAKCallback(pl.Callback):
    """Featurizes the train set at the checkpoints of a run, so that ``trainer.attribute(...)`` can explain outputs.

    Training is bit-identical with and without it. Weights are taken as the checkpoint file holds them (averaged
    weights too), right after the file is written; their features are computed between two training steps
    (``featurize_on="save"``) or after the last (``"fit_end"``). Saves before the first training step, such as those of
    the learning rate finder, are none of the run's checkpoints.

    Args:
        dirpath: the feature store; default ``<trainer.default_root_dir>/trak``. Several runs may share it: that is how
            ensembles are made.
        proj_dim: k, the number of features.
        projector: ``"factored"`` (of layers' inputs and output gradients), ``"sparse"``, ``"rademacher"`` (dense),
            ``"fast_jl"`` (dense, by the library of that name), ``"identity"`` (k = p) or a `Projector`; ``"auto"`` is
            ``"identity"`` for models of at most ``proj_dim`` parameters, else ``"factored"``.
        gradients: ``"hooks"`` (one backward pass for the whole batch), ``"vmap"``, ``"loop"``, or ``"auto"``: the first
            of them that suits the model; which, and why, is reported.
        featurize_on: ``"save"``: every distinct set of weights as it is saved, also those that are deleted later;
            ``"fit_end"``: once per run, the checkpoints that the run kept.
        parameters: the attributed parameters: None for all trainable ones, else names or glob patterns.
        damping: λ, added to H relative to its mean diagonal; ``"auto"``: from learning rate and steps where the
            optimizer is SGD, so that a Newton step goes as far as training did, on the mean of ``output_to_loss`` over
            the batch; else chosen at every checkpoint by leave-one-out cross-validation on the linearised model.
        temperature: for classification, divides the outputs f in Q and w, which stand for models that were not trained
            on all of the examples and are less certain; ``"auto"``: 1.3 with ``damping="auto"`` and no fewer
            trainable parameters than examples, else 1.
        curvature: True: H = Φᵀ diag(w) Φ, a Newton step. False: H = Φᵀ Φ; with ``damping=0`` this is the estimator of
            the TRAK paper (without its soft thresholding) and, up to a factor for each checkpoint, of its reference
            implementation; they average Q over checkpoints apart from H⁻¹, and so is it done then.
        seed: chooses the projections.
        batch_size: for featurization; None for that of the loader, or fewer where the memory would not be enough.

    Raises:
        ValueError, TypeError: for arguments out of range.

    >>> TRAKCallback("attributions", proj_dim=512, featurize_on="fit_end").proj_dim
    512
    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        *,
        proj_dim: int = 2048,
        projector: str | Projector = "auto",
        gradients: str = "auto",
        featurize_on: str = "save",
        parameters: str | Sequence[str] | None = None,
        damping: float | str = "auto",
        temperature: float | str = "auto",
        curvature: bool = True,
        seed: int = 0,
        batch_size: int | None = None,
    ) -> None:
        Projector.check_proj_dim(proj_dim)
        check_projector(projector, proj_dim)
        _check_choice("gradients", gradients, ("auto", *ENGINES))
        _check_choice("featurize_on", featurize_on, ("save", "fit_end"))
        if damping != "auto" and (not _is_finite(damping) or damping < 0):
            raise ValueError(f"damping must be 'auto' or a finite number of at least 0, got {damping!r}.")
        if temperature != "auto" and (not _is_finite(temperature) or temperature <= 0):
            raise ValueError(f"temperature must be 'auto' or a finite number above 0, got {temperature!r}.")
        if not isinstance(curvature, bool):
            raise TypeError(f"curvature must be True or False, got {curvature!r}.")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed must be an integer, got {seed!r}.")
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            raise ValueError(f"batch_size must be a positive integer or None, got {batch_size!r}.")
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.proj_dim = proj_dim
        self.projector = projector
        self.gradients = gradients
        self.featurize_on = featurize_on
        self.parameters = parameters
        self.damping = damping
        self.temperature = temperature
        self.curvature = curvature
        self.seed = seed
        self.batch_size = batch_size
        self.train_loader: DataLoader[Any] | None = None
        self.last_saved: str | None = None
        self._store: FeatureStore | None = None
        self._loop: FeaturizationLoop | None = None
        self._files: dict[str, str] = {}  # path of a checkpoint file → digest of its weights
        self._pending: dict[str, bool] = {}  # digest to featurize → whether this run added it
        self._featurized = 0
        self._training: TrainingTime | None = None
        self._expected_loss: float | None = None
        self._tried_losses = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the wiring, and start to watch checkpoint files."""
        find_callback(trainer)
        if stage != "fit":
            return
        check_supported(trainer, pl_module)
        self._store = self._loop = self.train_loader = self.last_saved = None
        self._files, self._pending, self._featurized = {}, {}, 0
        self._expected_loss, self._tried_losses = None, 0
        watched = trainer.strategy.checkpoint_io
        inner = watched.inner if isinstance(watched, _WatchedCheckpointIO) else watched
        trainer.strategy.checkpoint_io = _WatchedCheckpointIO(inner, self)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Try the first batch and open the store, so that what cannot work fails before training."""
        with undisturbed(trainer, pl_module):
            loader = self._find_train_loader(trainer, pl_module)
            _check_limit(trainer, loader)
            plan = Plan(self, pl_module)
            loop = plan.loop(trainer, pl_module, loader, "train")
            loop.preflight(tensors_in(pl_module.state_dict()))
            if trainer.fast_dev_run:
                return  # nothing will be saved
            self._store = FeatureStore.create(self.store_path(trainer), plan.manifest(loader))
        self.train_loader, self._loop = loader, loop
        if trainer.global_step == 0:
            self._training = TrainingTime()
        elif self._training is not None and self._training.steps != trainer.global_step:
            self._training = None  # of another run, while this one goes on from a file that does not say

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Featurize what was saved since the last training step; of an epoch's first batch, find its loss."""
        if self.featurize_on == "save":
            self._featurize_pending()
        if batch_idx == 0 and self._tried_losses < 2:  # again when training has come somewhere: at first any labels do
            self._expected_loss = _expected_loss(trainer, pl_module, batch)
            self._tried_losses += 1

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        """Compare the loss of the first batch of the first two epochs."""
        expected, self._expected_loss = self._expected_loss, None
        if expected is not None and isinstance(outputs, Mapping) and "loss" in outputs:
            _compare_losses(pl_module, outputs["loss"].item() * trainer.accumulate_grad_batches, expected)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Note how far the step goes; that of a clipped gradient, or of one among several optimizers, is unknown."""
        known = len(trainer.optimizers) == 1 and not trainer.gradient_clip_val
        self._training = self._training.after_step(optimizer) if self._training is not None and known else None

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Say in a checkpoint how long training went on; not as a callback's state, for which Lightning would ask."""
        checkpoint[CHECKPOINT_KEY] = {"training_time": self._training and asdict(self._training)}

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Go on from a checkpoint that training is resumed from."""
        if trainer.state.fn == TrainerFn.FITTING:
            known = checkpoint.get(CHECKPOINT_KEY, {}).get("training_time")
            self._training = TrainingTime(**known) if known else None

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Featurize what is left, or with ``featurize_on="fit_end"`` all that the run kept."""
        if self._pending:
            with attached(trainer, pl_module, trainer.datamodule):
                self._featurize_pending()
        if self._store is not None:
            rank_zero_info(f"TRAKCallback: {self._featurized} checkpoints featurized in '{self._store.dirpath}'.")

    def store_path(self, trainer: pl.Trainer) -> Path:
        """Return the directory of the feature store."""
        return Path(trainer.default_root_dir) / "trak" if self.dirpath is None else self.dirpath

    def file_saved(self, path: str, checkpoint: dict[str, Any]) -> None:
        """Note the weights that a checkpoint file was written with, and put them into the store."""
        if self._store is None:
            return
        weights = tensors_in(checkpoint["state_dict"])
        digest = self.last_saved = weights_digest(weights)
        if self._files.get(path) == digest:
            return
        self.file_removed(path)
        self._files[path] = digest
        if digest in self._store and self._store[digest].complete:
            return
        added = digest not in self._store
        meta = {"epoch": checkpoint["epoch"], "global_step": checkpoint["global_step"], "file": os.path.basename(path)}
        meta["training_time"] = self._training and asdict(self._training)
        add_checkpoint(self._store, digest, weights, meta)
        self._pending.setdefault(digest, added)

    def file_removed(self, path: str) -> None:
        """Forget a checkpoint file that was deleted or overwritten, and its weights if they are not featurized yet."""
        digest = self._files.pop(path, None)
        if digest is None or digest in self._files.values() or self._store is None:
            return
        if self._pending.pop(digest, False):
            self._store.discard(digest)

    def _featurize_pending(self) -> None:
        if self._store is None or self._loop is None:
            return
        for digest in list(self._pending):
            featurize_checkpoint(self._loop, self._store[digest], str(self._featurized + 1))
            del self._pending[digest]
            self._featurized += 1

    def _find_train_loader(self, trainer: pl.Trainer, module: pl.LightningModule) -> DataLoader[Any]:
        for owner in (trainer.datamodule, module):
            hook: Any = getattr(owner, "featurize_dataloader", None)
            if hook is not None:
                return check_loader(hook(), "featurize_dataloader", "")
        return check_loader(trainer.train_dataloader, "train_dataloader", TRAIN_REMEDY)


class _WatchedCheckpointIO(CheckpointIO):
    """Tells a `TRAKCallback` of every checkpoint file written or deleted, whoever does it and with whatever options.

    The callback hook ``on_save_checkpoint`` would not do: it runs before other callbacks and the module have put
    averaged weights in, knows no path, and is not called with ``save_weights_only=True``.
    """

    def __init__(self, inner: CheckpointIO, callback: TRAKCallback) -> None:
        self.inner = inner
        self._callback = callback

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        self.inner.save_checkpoint(checkpoint, path, storage_options=storage_options)
        self._callback.file_saved(os.fspath(path), checkpoint)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self.inner.load_checkpoint(path, *args, **kwargs)

    def remove_checkpoint(self, path: Any) -> None:
        self.inner.remove_checkpoint(path)
        self._callback.file_removed(os.fspath(path))

    def teardown(self) -> None:
        self.inner.teardown()


def find_callback(trainer: Any) -> TRAKCallback:
    """Return the one TRAKCallback of a `lightning.pytorch.Trainer`.

    Raises:
        TypeError: for another kind of trainer.
        MisconfigurationException: if it has none, or several.
    """
    if not isinstance(trainer, pl.Trainer):
        kind = f"{type(trainer).__module__}.{type(trainer).__qualname__}"
        raise TypeError(
            f"lightning_trak works with lightning.pytorch.Trainer, got {kind}. Import with 'import lightning as L' and"
            " use L.Trainer, L.LightningModule and L.LightningDataModule throughout; 'pytorch_lightning' is another"
            " package with classes of its own."
        )
    found = [callback for callback in trainer.callbacks if isinstance(callback, TRAKCallback)]
    if len(found) != 1:
        raise MisconfigurationException(
            f"The Trainer has {len(found) or 'no'} TRAKCallback{'s' if len(found) > 1 else ''}, expected one:"
            " Trainer(callbacks=[TRAKCallback('attributions')])."
        )
    return found[0]


def check_supported(trainer: pl.Trainer, module: Any) -> None:
    """Raise unless trainer and module are of a kind that can be featurized."""
    if not callable(getattr(module, "model_output", None)):
        raise MisconfigurationException(
            f"{type(module).__name__} does not define model_output(self, batch), the number to attribute for every"
            " example of a batch. Mix ClassificationMixin or RegressionMixin into it, or define it with TRAKMixin."
        )
    if trainer.world_size > 1 or not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise MisconfigurationException(
            f"TRAKCallback featurizes in one process, got {type(trainer.strategy).__name__} with"
            f" world_size={trainer.world_size}. Train without the callback, then attribute the checkpoint files on one"
            " device: L.Trainer(devices=1, callbacks=[TRAKCallback(...)]).attribute(model, datamodule=dm,"
            " ckpt_path=[...])."
        )


def _expected_loss(trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> float | None:
    """Return the loss of the first batch that scores are about; None if it cannot be told of batches of training."""
    try:
        return training_loss(trainer, module, batch)
    except Exception as error:  # features are of the examples alone: it is no reason not to train
        rank_zero_warn(
            f"The loss of the first batch cannot be compared with that of {type(module).__name__}'s own methods:"
            f" {type(error).__name__}: {error} If training augments or combines batches, ignore this."
        )
        return None


def _compare_losses(module: pl.LightningModule, trained: float, expected: float) -> None:
    """Warn if what is trained on is not the loss that scores are about."""
    if abs(trained - expected) > _LOSS_TOLERANCE * max(abs(trained), abs(expected)) + 1e-3:
        rank_zero_warn(
            f"On the first batch {type(module).__name__}.training_step returned a loss of {trained:.4g}, while"
            f" output_to_loss(model_output(batch), batch), or per_sample_loss(batch), is {expected:.4g} on average."
            " Scores are about the second: define it as what training minimises, an average over the batch (see"
            " reduce_losses for others). If training_step adds something that is no loss of an example, or augments the"
            " batch, ignore this."
        )


def _check_limit(trainer: pl.Trainer, loader: DataLoader[Any]) -> None:
    if not trainer.fast_dev_run:
        check_limit("limit_train_batches", trainer.limit_train_batches, loader)


def check_limit(name: str, limit: float, loader: DataLoader[Any]) -> None:
    """Raise if a ``limit_*_batches`` of the Trainer leaves some examples of ``loader`` out."""
    if limit < 1.0 if isinstance(limit, float) else limit < len(loader):
        raise MisconfigurationException(
            f"Trainer({name}={limit}) leaves examples out, while attribution covers all {len(loader)} batches. Remove"
            " the limit (overfit_batches sets one too), or give the loader a torch.utils.data.Subset of the examples"
            " that count."
        )


def _is_finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")
