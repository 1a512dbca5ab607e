"""TRAKCallback: connects Lightning's hooks to the stages. There is no mathematics in it."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any
from uuid import uuid4

from torch.utils.data import DataLoader

from lightning_trak.features.stored import DTYPES
from lightning_trak.gradients import ENGINES
from lightning_trak.influence.training_time import CHECKPOINT_KEY, TrainingTime
from lightning_trak.isolation.random_states import kept_generators
from lightning_trak.projection import Projector, check_projector
from lightning_trak.results.terminal import count
from lightning_trak.store.files import check_space
from lightning_trak.store.remote import AnyPath, path_of, writable
from lightning_trak.store.store import FeatureStore
from lightning_trak.store.weights import copy_of_weights
from lightning_trak.trainer import arguments
from lightning_trak.trainer.featurizing.opening import fitting_store
from lightning_trak.trainer.featurizing.plan import DTYPE, PROJ_DIM, SEED, Plan, Settings, parameters_to_be
from lightning_trak.trainer.featurizing.preflight import preflight
from lightning_trak.trainer.fit.checkpoint_io import watch
from lightning_trak.trainer.fit.logs import log_largest, log_numbers
from lightning_trak.trainer.fit.loss_check import LossCheck
from lightning_trak.trainer.fit.pace import Coming, Pace, measured_seconds, synchronize
from lightning_trak.trainer.fit.queue import CheckpointQueue
from lightning_trak.trainer.host.attachment import attached, undisturbed
from lightning_trak.trainer.host.framework import (
    Callback,
    LightningModule,
    Trainer,
    check_supported,
    extend_loaded,
    framework_of,
)
from lightning_trak.trainer.host.loaders import train_loader_of_fit
from lightning_trak.trainer.host.reports import Reports

_LOOK_AGAIN = 50  # steps, where the Trainer logs nothing


class TRAKCallback(Callback):
    """Featurizes the train set at the checkpoints of a run, so that ``trainer.attribute(...)`` can explain outputs.

    Training is bit-identical with and without it. Weights are those of the checkpoint file, averaged or not. Features
    are computed between two training steps (``featurize_on="save"``) or after the last (``"fit_end"``). Saves before
    the first training step, such as those of the learning rate finder, are ignored.

    Args:
        dirpath: the feature store; default ``<trainer.default_root_dir>/trak``. Several runs may share it: their
            checkpoints form an ensemble. By a URL such as ``"s3://bucket/store"``, ``trainer.attribute(...)`` reads a
            finished store that was copied there; see `FeatureStore`. Training needs a local one.
        proj_dim: k, the number of features. Take fewer than there are training examples.
        projector: ``"factored"`` (of layers' inputs and output gradients), ``"sparse"``, ``"rademacher"`` (dense),
            ``"fast_jl"`` (dense, by the library of that name), ``"identity"`` (k = p) or a `Projector`. ``"auto"`` is
            ``"identity"`` for models of at most ``proj_dim`` parameters, else ``"factored"``.
        gradients: ``"hooks"`` (one backward pass for the whole batch), ``"vmap"`` or ``"loop"``. ``"auto"`` takes the
            first that suits the model, and reports which and why.
        featurize_on: ``"save"``: all distinct weights as they are saved, also those of files that are deleted later.
            ``"fit_end"``: only the checkpoints that the run kept.
        parameters: names or glob patterns of the attributed parameters, e.g. ``"*lora*"`` or ``["head.*"]``. The others
            are neither differentiated nor projected. None: those that are trainable when training begins; all with a
            callback for finetuning, which unfreezes some later.
        damping: λ, added to H relative to its mean diagonal. ``"auto"`` with SGD: from learning rate and steps, so that
            a Newton step goes as far as training did on the mean of ``output_to_loss`` over the batch. ``"auto"``
            otherwise: from 0.3 to 10 at each checkpoint, by leave-one-out cross-validation on the linearised model.
            Both are smaller near an optimum. For whitened gradients see below.
        temperature: for classification, Q and w are those of temperature-scaled outputs, f / temperature, since models
            that were not trained on all examples are less confident. ``"auto"``: 1.3 with ``damping="auto"`` and no
            fewer trainable parameters than examples, else 1.
        curvature: True: H = Φᵀ diag(w) Φ, a Newton step. False: H = Φᵀ Φ.
        estimator: ``"gauss_newton"``: φ(z)ᵀ H⁻¹ φ(zᵢ) qᵢ of each checkpoint, averaged over checkpoints. ``"trak"``: the
            TRAK paper's, without soft thresholding: H = Φᵀ Φ, λ = 0 unless ``damping`` is given, no temperature, and Q
            averaged apart from H⁻¹. It is that of the reference implementation up to a factor for each checkpoint.
        preconditioner: ``"kronecker"``: whiten gradients by the curvature of each parameter (EK-FAC) before they are
            compressed, and store the largest entries of each example: ``proj_dim / 8``, or ``proj_dim / 2`` for
            classification. This needs a mixin that draws labels from the predictions: language modelling, segmentation,
            multilabel, classification into three classes or more, regression of several numbers, contrastive, and
            diffusion. ``"none"``: project gradients, and put the curvature of the outputs into H. For a ResNet-9 it
            takes a third of the time. ``"auto"``: that of the store, if there is one. Else it is ``"kronecker"`` for
            the first four, if their output and loss are not overridden, and projector, damping, curvature and estimator
            are defaults.
        seed: chooses the projections.
        feature_dtype: ``"float32"``; or ``"float16"``: projected gradients take half the space, relative to the largest
            number of each example. Scores change by about a thousandth, more where λ is 0, which magnifies rounding
            errors. Whitened gradients always are ``"float16"``.
        batch_size: of featurization. None: that of the loader, or less where memory is short.
        budget: the share of the training time that featurizing may take while training goes on, e.g. 0.2. Checkpoints
            that would exceed it wait. They are featurized after the last training step, if their files still exist.
            Validation and saving count as training. A resumed run starts to count anew. None: each checkpoint is
            featurized as it is saved.
        memory_limit: scores that take more bytes stay in the store, and `Attribution.scores` reads parts of them.
        overwrite: True: delete what earlier runs left in the store when training begins, unless it is resumed. False:
            pool the checkpoints of several runs; ``trainer.attribute()`` averages over all.

    Every example counts once, however often a sampler draws it. Weights in the loss count: see ``output_to_loss``.

    The defaults predict retraining best. Their scores reflect the whole class or cluster of a target. To find
    near-duplicates of a target, such as leaks, damp less, with ``preconditioner="kronecker", damping=0.1``: then what
    sets an example apart from its class counts more.

    Where gradients are whitened, λ of each parameter is ``damping`` times the mean eigenvalue of its curvature, 1 times
    for ``"auto"``; there is no H. For classification, the curvature of the output is in H besides, see
    `OutputCurvature`, and λ of ``"auto"`` follows from the training time, where that is known; `Attribution.info` then
    has λ itself. See `Preconditioner`.

    A checkpoint takes ``4 · n · proj_dim`` bytes for its features, beside its weights. Whitened gradients take a fifth
    of that, or three quarters for classification, and their curvature up to three times the size of the weights. An
    interrupted run goes on with the rows that are missing; about a minute's work is lost. Several processes, of one
    trainer or of several programs, share the work at each checkpoint. ``damping`` and ``temperature`` may change
    without featurizing again, and ``curvature`` and ``estimator`` where gradients are not whitened. Of whitened
    gradients, the entries are kept that were the largest with the first damping, so a very different one needs a store
    of its own. The other settings belong to the store: to change one, use another ``dirpath``. `Attribution.info` has
    the values that ``"auto"`` chose.

    Before stored features are used, a few are computed again. Data, parameters and settings are compared with those of
    the store, and a difference is an error. Of a large train set only 1024 examples are compared, so give a run on
    corrected data its own ``dirpath``.

    The training time of SGD is recorded in the store and in checkpoint files. For files of runs without the callback it
    is the learning rate times the steps, if there was no schedule. A learning rate that was changed by hand cannot be
    seen. With clipped gradients the time is unknown.

    Raises:
        ValueError, TypeError: for arguments out of range.

    >>> TRAKCallback("attributions", proj_dim=512, featurize_on="fit_end").proj_dim
    512
    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        *,
        proj_dim: int = PROJ_DIM,
        projector: str | Projector = "auto",
        gradients: str = "auto",
        featurize_on: str = "save",
        parameters: str | Sequence[str] | None = None,
        damping: float | str = "auto",
        temperature: float | str = "auto",
        curvature: bool = True,
        estimator: str = "gauss_newton",
        preconditioner: str = "auto",
        seed: int = SEED,
        feature_dtype: str = DTYPE,
        batch_size: int | None = None,
        memory_limit: float = 4e9,
        budget: float | None = None,
        overwrite: bool = False,
    ) -> None:
        extend_loaded()
        Projector.check_proj_dim(proj_dim)
        check_projector(projector, proj_dim)
        self.temperature = arguments.number_or_auto("temperature", temperature, 0, itself=False)
        self.damping = arguments.number_or_auto("damping", damping, 0, itself=True)
        self.curvature = arguments.flag("curvature", curvature)
        self.estimator = arguments.choice("estimator", estimator, ("gauss_newton", "trak"))
        if estimator == "trak":
            if temperature not in ("auto", 1):
                raise ValueError(f"estimator='trak' has no temperature, got temperature={temperature!r}. Leave it out.")
            self.curvature, self.temperature, self.damping = False, 1.0, 0.0 if damping == "auto" else damping
        self.preconditioner = arguments.choice("preconditioner", preconditioner, ("auto", "kronecker", "none"))
        self._projects_by_default = (projector, curvature, estimator) == ("auto", True, "gauss_newton")
        if preconditioner == "kronecker":
            arguments.left_out(
                "preconditioner='kronecker' whitens gradients before they are stored",
                projector=(projector, "auto"),
                curvature=(curvature, True),
                estimator=(estimator, "gauss_newton"),
            )
        self.dirpath = None if dirpath is None else path_of(dirpath)
        self.proj_dim, self.projector = proj_dim, projector
        self.gradients = arguments.choice("gradients", gradients, ("auto", *ENGINES))
        self.featurize_on = arguments.choice("featurize_on", featurize_on, ("save", "fit_end"))
        self.parameters = arguments.names(parameters)
        self.overwrite = arguments.flag("overwrite", overwrite)
        self.seed = arguments.seed(seed)
        self.feature_dtype = arguments.choice("feature_dtype", feature_dtype, DTYPES)
        self.batch_size = arguments.positive_or_none("batch_size", batch_size)
        self.memory_limit = arguments.number("memory_limit", memory_limit, 0)
        self.budget = None if budget is None else arguments.number("budget", budget, 0)
        if featurize_on == "fit_end":
            arguments.left_out("featurize_on='fit_end' featurizes nothing during training", budget=(budget, None))
        self._training: TrainingTime | None = None
        self._start_anew()

    def _start_anew(self) -> None:
        """Forget an earlier ``fit``, except its training time: another ``fit`` may go on from there."""
        self.train_loader: DataLoader[Any] | None = None
        self.reports = Reports()
        self._queue: CheckpointQueue | None = None  # of checkpoints; None before training
        self._loss_check = LossCheck(self.reports)
        self._run: str | None = None  # the identity of this training, kept when it is resumed
        self._attributed: set[str] = set()
        self._pace: Pace | None = None
        self._coming: Coming | None = None

    @property
    def last_saved(self) -> str | None:
        """The digest of the weights that the last ``fit`` saved last."""
        return None if self._queue is None else self._queue.last_saved

    @property
    def settings(self) -> Settings:
        """The settings on which features depend."""
        own = {name: getattr(self, name) for name in Settings.__dataclass_fields__ if name != "projects_by_default"}
        return Settings(**own, projects_by_default=self._projects_by_default)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the wiring, and start to watch checkpoint files."""
        extend_loaded()  # pytorch_lightning may be imported by now
        find_callback(trainer)
        if stage != "fit":
            return
        check_supported(trainer, pl_module)
        writable(self.store_path(trainer))
        self._start_anew()
        watch(trainer, self)
        # First in the list, to see a batch before another callback's on_train_batch_start changes it.
        trainer.callbacks = [self, *(callback for callback in trainer.callbacks if callback is not self)]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Try the first batch and open the store, so that errors come before training."""
        with undisturbed(trainer, pl_module):
            loader = train_loader_of_fit(trainer, pl_module)
            parameters = parameters_to_be(self.settings, trainer, pl_module)
            anew, path = self.overwrite and trainer.global_step == 0, self.store_path(trainer)
            manifest = None if anew or not (path / "manifest.json").exists() else FeatureStore(path).manifest
            plan = Plan.choose(self.settings, self.reports, trainer, pl_module, loader, parameters, manifest)
            loop = plan.loop(trainer, pl_module, loader, lambda: loader, "train")
            seconds = preflight(loop, copy_of_weights(pl_module), thorough=True)
            seconds = measured_seconds(loop, partial(copy_of_weights, pl_module)) or seconds
            self.train_loader = loader
            if trainer.fast_dev_run:
                return  # it saves no checkpoint
            if anew and trainer.is_global_zero:
                FeatureStore.remove(path)
            trainer.strategy.barrier()
            with kept_generators(loader.dataset):
                store = fitting_store(path, plan, loader, seconds)
            self._coming = Coming.of(loop, trainer, seconds)
            check_space(store.dirpath, self._coming.bytes)
            self.reports.tell(self._coming.text(store))
        self._run = trainer.strategy.broadcast(self._run or uuid4().hex)
        self._queue, self._attributed = CheckpointQueue(store, loop, self._run, self.reports), set(plan.parameters)
        if not trainer.checkpoint_callbacks:
            self.reports.tell(
                "this Trainer has no ModelCheckpoint. If no checkpoint is saved by hand, the final weights are"
                " featurized when fit ends."
            )
        if trainer.global_step == 0:
            self._training = TrainingTime()
        elif self._training is not None and self._training.steps != trainer.global_step:
            self._training = None  # resumed without a recorded time: discard the old one
        if trainer.global_step and trainer.is_global_zero:
            with self._queue.training_goes_on(
                "The checkpoints of the resumed run could not be compared with its files"
            ):
                self._queue.reconcile(trainer, kept_alone=self.featurize_on == "fit_end")
        self._pace = Pace(self.budget, self._coming.seconds, partial(synchronize, loop.reader.device))

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Featurize what was saved since the last training step; compute the loss of an epoch's first batch."""
        if self._queue is not None and self.featurize_on == "save":
            if self.budget is not None and batch_idx % (trainer.log_every_n_steps or _LOOK_AGAIN) == 0:
                self._queue.saved()  # what waits may have its turn now, in all processes
            if self._queue.share(trainer):
                self._featurize(trainer, self._queue, limited=True)
        self._loss_check.watch(batch)
        if batch_idx == 0 and self.train_loader is not None:
            self._check_trained(pl_module)
            self._loss_check.before_step(trainer, pl_module, batch, self.train_loader)
        if self._pace is not None:
            self._pace.step_began()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        """Check that the batch is unchanged; compare the loss of the first batch of the first two epochs."""
        epoch = None if self._pace is None else self._pace.step_ended(trainer.num_training_batches)
        if epoch is not None and self._coming is not None and 0 < epoch < math.inf:
            self.reports.tell(self._coming.beside(epoch))
        self._loss_check.after_step(trainer, pl_module, batch, outputs)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Add the step to the training time, which is unknown for clipped gradients and several optimizers."""
        known = len(trainer.optimizers) == 1 and not trainer.gradient_clip_val
        self._training = self._training.after_step(optimizer) if self._training is not None and known else None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Store run and training time under our own key: Lightning warns about missing callback states."""
        checkpoint[CHECKPOINT_KEY] = {"run": self._run, "training_time": self._training and asdict(self._training)}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Read run and training time from the checkpoint that training resumes from."""
        if trainer.state.fn == framework_of(trainer).TrainerFn.FITTING:
            noted = checkpoint.get(CHECKPOINT_KEY, {})
            self._run, known = noted.get("run"), noted.get("training_time")
            self._training = TrainingTime(**known) if known else None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Featurize what is left; with ``featurize_on="fit_end"``, all that the run kept."""
        if self._queue is None and trainer.global_step and not trainer.fast_dev_run:  # resumed after the last step
            with attached(trainer, pl_module, trainer.datamodule):
                self.on_train_start(trainer, pl_module)
        if self._queue is None:
            return
        queue = self._queue
        self._check_trained(pl_module)
        if not trainer.strategy.broadcast(queue.anything_saved) and trainer.global_step:
            queue.add_weights_of(pl_module, trainer, self._training)
        queue.saved()  # in all processes: the first may have discarded some since
        queue.share(trainer)
        if self._pace is not None:
            queue.say_what_waited(self._pace)
        if len(queue):
            with attached(trainer, pl_module, trainer.datamodule):
                self._featurize(trainer, queue, limited=False)
        with queue.training_goes_on("The feature store could not be read"):
            own = [entry for entry in queue.own() if entry.complete]
            if own and self.train_loader is not None:
                log_largest(trainer, self.reports, own, self.train_loader.dataset)
            queue.say_what_is_there()
        queue.say_what_failed()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say what waits to be featurized when training is stopped."""
        if self._queue is not None and len(self._queue):
            waited = count(len(self._queue), "checkpoint")
            self.reports.tell(
                f"{waited} of this run waited to be featurized. trainer.attribute(...) or a resumed fit does it."
            )

    def _featurize(self, trainer: Trainer, queue: CheckpointQueue, *, limited: bool) -> None:
        """Featurize what was saved, and log how far that is."""
        assert self._pace is not None
        for seconds in queue.featurize(trainer, self._pace, limited=limited):
            far = {
                "checkpoints_featurized": queue.featurized,
                "checkpoints_waiting": len(queue),
                "share_of_training_time": self._pace.spent,
            }
            log_numbers(trainer, self.reports, {**seconds, **far})

    def store_path(self, trainer: Trainer) -> AnyPath:
        """Return the directory of the feature store."""
        return path_of(trainer.default_root_dir) / "trak" if self.dirpath is None else path_of(self.dirpath)

    def file_saved(self, path: str, checkpoint: dict[str, Any]) -> None:
        """Put the weights of a checkpoint file into the store."""
        if self._queue is not None:
            self._queue.file_saved(path, checkpoint, self._training)

    def file_removed(self, path: str) -> None:
        """Discard the weights of a file that was deleted, if they are not featurized yet."""
        if self._queue is not None:
            self._queue.file_removed(path)

    def saved(self) -> None:
        """Note, in every process, that the first may have written a checkpoint file."""
        if self._queue is not None:
            self._queue.saved()

    def _check_trained(self, module: LightningModule) -> None:
        """Warn once of parameters that are trained but not attributed."""
        if self.parameters is not None or not self._attributed:
            return
        trained = [name for name, value in module.named_parameters() if value.requires_grad]
        others = [name for name in trained if name not in self._attributed]
        if others:
            self.reports.warn(
                f"{len(others)} parameters are trained by now that were frozen when training began, e.g. {others[0]}."
                " They are not attributed at any checkpoint, nor are any that are unfrozen later. To attribute them,"
                " train again with TRAKCallback(parameters='*', overwrite=True), or name them in place of '*'.",
                about="parameters that were frozen",
            )


def find_callback(trainer: Any) -> TRAKCallback:
    """Return the one TRAKCallback of a Trainer.

    Raises:
        TypeError: if it is no Trainer of Lightning.
        MisconfigurationException: if it has none, or several.
    """
    framework = framework_of(trainer)
    found = [callback for callback in trainer.callbacks if isinstance(callback, TRAKCallback)]
    if len(found) != 1:
        raise framework.MisconfigurationException(
            f"The Trainer has {len(found) or 'no'} TRAKCallback{'s' if len(found) > 1 else ''}, expected one:"
            " Trainer(callbacks=[TRAKCallback('attributions')])."
        )
    return found[0]
