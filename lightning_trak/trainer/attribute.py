"""The functions `attribute` and `attribute_self`: from checkpoints to scores."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_trak.influence import Damping, Estimator, GaussNewton, TrainFeatures
from lightning_trak.results.attribution import Attribution
from lightning_trak.results.info import AttributionInfo
from lightning_trak.results.saved import check_free
from lightning_trak.store.store import folder_name
from lightning_trak.trainer.arguments import positive_or_none
from lightning_trak.trainer.attributing.ckpt_path import CkptPath
from lightning_trak.trainer.attributing.describing import described_examples
from lightning_trak.trainer.attributing.job import Job, prepared_job
from lightning_trak.trainer.attributing.kept import KeptFeatures
from lightning_trak.trainer.attributing.scoring import Scoring
from lightning_trak.trainer.attributing.solving import at_each_checkpoint, solved_at_each
from lightning_trak.trainer.attributing.target_features import target_features
from lightning_trak.trainer.callback import find_callback
from lightning_trak.trainer.featurizing.train_features import with_own_squares
from lightning_trak.trainer.forecast import forecast
from lightning_trak.trainer.host.attachment import launched
from lightning_trak.trainer.host.framework import (
    LightningDataModule,
    LightningModule,
    Trainer,
    rank_zero_info,
    rank_zero_warn,
)


def attribute(
    trainer: Trainer,
    model: LightningModule | LightningDataModule | None = None,
    dataloaders: DataLoader[Any] | LightningDataModule | None = None,
    datamodule: LightningDataModule | None = None,
    ckpt_path: CkptPath = None,
    *,
    name: str | None = None,
    top_k: int | None = None,
    dry_run: bool = False,
) -> Any:
    """Score how much every training example raised the model output on every target.

    Also a method: ``trainer.attribute(...)``. Model, trainer, callbacks and random states are left as they were.

    A score predicts how much training on the example raises the target's output, by one Newton step on the linearised
    model. A positive score means that the example is helpful. For a convex model at its optimum and ``damping=0``, the
    score is the change of the output when the example is left out. Damping makes scores smaller. If one output stands
    for many parts (pixels, tokens, labels), the sizes of scores are less exact than their ranks.

    Row i is example i of the train dataset, and column j is example j of the target dataset. The datasets are read in
    order, even if the loaders shuffle, and nothing is dropped. If the train loader augments at random, define
    ``featurize_dataloader()``, which returns the same examples without augmentation. If ``setup(stage)`` splits the
    data at random, fix its seed.

    The store keeps features of targets and scores, in parts that processes share. The same call later reads them.

    Args:
        trainer: a Trainer, of ``lightning`` or of ``pytorch_lightning``, with one `TRAKCallback`. Model and datamodule
            must be of the same package.
        model: None for the model that the trainer fitted last. Weights are read from the checkpoints, not from it. A
            datamodule may stand here: ``trainer.attribute(datamodule)``.
        dataloaders: the targets. By default ``attribute_dataloader()``, ``predict_dataloader()`` or
            ``test_dataloader()``, the first that the datamodule defines, or else the model.
        datamodule: supplies the targets, and the train set from ``featurize_dataloader()`` or ``train_dataloader()``.
            The train set is needed only if checkpoints are not featurized yet.
        ckpt_path: None for every checkpoint in the store; ``"best"`` or ``"last"``; or a path or list of paths of
            Lightning ``.ckpt`` or state-dict files. Checkpoints without features are featurized first.
        name: also saves the result in the store, in ``scores/<name>``, for `Attribution.load`.
        top_k: keep only the highest and lowest ``top_k`` scores of each target, not all n × m.
        dry_run: compute nothing, but say what would be: print the returned `Forecast` for a table of the time, disk and
            memory of each stage, from one measured batch. It says what would fail for want of space.

    Returns:
        The scores, (n, m), averaged over the checkpoints. Of several processes each returns them; those that a launcher
        of Lightning starts for this call alone (``ddp_spawn``, ``ddp_notebook``) return them to the caller. For
        `Attribution.without`, `Attribution.parts` and `calibrate` the result also keeps model, trainer and loaders, and
        the targets' features: 4 m k bytes for each checkpoint, or 24 KB a target where gradients are whitened.
        `Attribution.save` leaves all that out. `Attribution.train` and `Attribution.targets` have ids and labels where
        the data sets tell them without reading examples; targets also have what `TRAKMixin.describe` says, such as
        the prediction.

    Raises:
        MisconfigurationException: if trainer, model, loaders and store do not fit together; the remedy is named.
        ValueError: if data, weights or stored features are invalid.
    """
    positive_or_none("top_k", top_k)
    if name is not None:
        folder_name(name)
    if dry_run:
        return launched(trainer, forecast, trainer, model, dataloaders, datamodule, ckpt_path)
    return launched(trainer, _attribute, trainer, model, dataloaders, datamodule, ckpt_path, name, top_k)


def _attribute(
    trainer: Trainer,
    model: Any,
    dataloaders: Any,
    datamodule: Any,
    ckpt_path: CkptPath,
    name: str | None,
    top_k: int | None,
) -> Attribution:
    """Do what `attribute` does, in each process."""
    with prepared_job(trainer, model, dataloaders, datamodule, ckpt_path) as job:
        if name is not None:
            check_free(job.store.scores_dir(name))
        attribution = job.featurized(partial(_scored, job, top_k))
    if name is not None and trainer.is_global_zero:
        try:
            attribution.save(job.store.scores_dir(name))
        except (OSError, ValueError) as error:  # of a full disk, for example: nothing that was computed is lost
            rank_zero_warn(
                f"The scores are returned, but could not be saved as {name!r}: {str(error).rstrip('.')}. Save them"
                " elsewhere with attribution.save(path)."
            )
    return attribution


def _scored(job: Job, top_k: int | None) -> Attribution:
    """Featurize the targets and score."""
    targets = target_features(job)
    estimator = job.estimator()
    scoring = Scoring(job, estimator, targets, partial(solved_at_each, job, estimator, targets.features))
    scores, spread = scoring.scores() if top_k is None else (scoring.extremes(top_k), None)
    examples, described = described_examples(job, targets.reader)
    attribution = Attribution(
        scores,
        _info(job, estimator, scoring.dampings, len(targets.outputs)),
        spread,
        outputs=targets.outputs,
        kept=KeptFeatures(job, estimator, targets),
        train=examples,
        targets=described,
    )
    rank_zero_info(f"TRAKCallback: {attribution.status}.")
    return attribution


def _info(job: Job, estimator: Estimator, dampings: Sequence[Damping], n_targets: int) -> AttributionInfo:
    """Describe how the scores were computed."""
    options, metas = estimator.options, [entry.meta for entry in job.entries]
    return AttributionInfo(
        n_train=job.store.n_train,
        n_targets=n_targets,
        checkpoints=tuple(entry.digest for entry in job.entries),
        projector=job.plan.identity["projection"]["projector"],
        proj_dim=job.plan.proj_dim,
        damping=options.damping,
        curvature=options.curvature,
        estimator=options.estimator,
        dampings=tuple(damping.value for damping in dampings),
        damping_rules=tuple(damping.rule for damping in dampings),
        temperature=estimator.temperature,
        preconditioner=None if job.plan.preconditioner is None else "kronecker",
        runs=job.runs,
        n_attributed=job.plan.n_params,
        n_params=job.n_params,
        gradients=job.plan.engine,
        loss_explained=tuple(meta["loss_explained"] for meta in metas if "loss_explained" in meta),
        warnings=tuple(find_callback(job.trainer).reports.warned),
    )


def attribute_self(
    trainer: Trainer,
    model: LightningModule | LightningDataModule | None = None,
    *,
    datamodule: LightningDataModule | None = None,
    ckpt_path: CkptPath = None,
) -> Tensor:
    """Return how much training on each example lowered its own loss: its self-influence, never negative.

    It is high for memorised examples, which nothing else in the train set supports: mislabelled and unusual ones
    (Feldman and Zhang, "What neural networks memorize and why", NeurIPS 2020, arXiv 2008.03703). In
    regression, labels that are too high and too low count alike. To look for mislabels, call `suspects`, which finds
    more of them.

    It is ∇Lᵀ H⁻¹ ∇L = qᵢ² φ(zᵢ)ᵀ H⁻¹ φ(zᵢ), averaged over checkpoints. At one checkpoint this is qᵢ times the score of
    `attribute` for the example as its own target. No n × n matrix is made.

    Also a method: ``trainer.attribute_self(...)``. See `attribute` for arguments and errors.

    Returns:
        Self-influences in units of the loss, (n,), float32.
    """
    return launched(trainer, _attribute_self, trainer, model, datamodule, ckpt_path)


def _attribute_self(trainer: Trainer, model: Any, datamodule: Any, ckpt_path: CkptPath) -> Tensor:
    """Do what `attribute_self` does, in each process."""
    with prepared_job(trainer, model, None, datamodule, ckpt_path) as job:
        return job.featurized(partial(_self_influence, job))


def _self_influence(job: Job) -> Tensor:
    """Return the self-influences of the train set, averaged over checkpoints."""
    estimator = job.estimator()

    def influence(number: int, train: TrainFeatures, sums: GaussNewton | None) -> Tensor:
        return estimator.self_influence(with_own_squares(job.entries[number], train, job.scales[number]), sums)

    found = at_each_checkpoint(job, estimator, "Scoring", influence)
    job.say_what_was_averaged()
    return torch.stack(found).mean(0)
