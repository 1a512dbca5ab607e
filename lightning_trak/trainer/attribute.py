"""attribute: the stages in order, from checkpoints to scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_trak.influence import Estimator, Solved, n_blocks
from lightning_trak.results.attribution import Attribution, AttributionInfo
from lightning_trak.trainer.checkpoints import (
    naming,
    sums_of,
)
from lightning_trak.trainer.framework import (
    LightningDataModule,
    LightningModule,
    Trainer,
    rank_zero_info,
)
from lightning_trak.trainer.job import CkptPath, Job, featurized
from lightning_trak.trainer.progress import progress


def attribute(
    trainer: Trainer,
    model: LightningModule | LightningDataModule | None = None,
    dataloaders: DataLoader[Any] | LightningDataModule | None = None,
    datamodule: LightningDataModule | None = None,
    ckpt_path: CkptPath = None,
    *,
    name: str | None = None,
    top_k: int | None = None,
) -> Attribution:
    """Score how much every training example raised the model output on every target.

    Also a method: ``trainer.attribute(...)``. Model, trainer, callbacks and random states are left as they were.

    A score predicts how much training on the example raises the target's output, by one Newton step on the linearised
    model. A positive score means that the example is helpful. For a convex model at its optimum and ``damping=0``, the
    score is the change of the output when the example is left out; damping makes scores smaller. Where one output
    stands for many parts (pixels, tokens, labels), the sizes of scores are less exact than their ranks.

    Row i is example i of the train dataset, and column j is example j of the target dataset, however the loaders
    shuffle. The datasets are read in order and nothing is dropped. If the loader of the train set augments at random,
    define ``featurize_dataloader()``, which returns the same examples without augmentation. If ``setup(stage)`` splits
    the data at random, let it use a seed, so that the split is always the same.

    Args:
        trainer: a Trainer, of ``lightning`` or of ``pytorch_lightning``, with one `TRAKCallback`. Model and datamodule
            are of the same package.
        model: None for the model that the trainer fitted last. Its weights do not matter, those of the checkpoints do.
            A datamodule in this place is the datamodule: ``trainer.attribute(datamodule)``.
        dataloaders: the targets, in the order of their dataset; else ``datamodule.attribute_dataloader()``,
            ``predict_dataloader()`` or ``test_dataloader()``, whichever is defined first, else those of the model.
        datamodule: also supplies the train set, from ``featurize_dataloader()`` or ``train_dataloader()``, where
            checkpoints are still to be featurized. Otherwise the store alone is enough.
        ckpt_path: None for every checkpoint in the store; ``"best"`` or ``"last"``; or a path or list of paths of
            Lightning ``.ckpt`` or state-dict files. What is not featurized yet is featurized first.
        name: saves the result in the store too, in ``scores/<name>``, for `Attribution.load`.
        top_k: keep only the highest and lowest ``top_k`` scores of each target, not all n × m.

    Returns:
        The scores, (n, m), averaged over the checkpoints.

    Raises:
        MisconfigurationException: if trainer, model, loaders and store do not fit together; the remedy is named.
        ValueError: if data, weights or stored features are not what they should be.
    """
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k must be a positive integer or None, got {top_k!r}.")
    with featurized(trainer, model, dataloaders, datamodule, ckpt_path) as job:
        targets = job.target_features()
        estimator, solved = job.estimator(), []
        for entry, train, phi in zip(job.entries, estimator.trains, targets, strict=True):
            with naming(entry):
                solved.append(estimator.solve(train, phi, sums_of(entry, estimator, train)))
        n_train, n_targets = job.store.n_train, len(targets[0])
        with progress(trainer, "Scoring", n_blocks(n_train, n_targets)) as advance:
            if top_k is None:
                whole = estimator.scores(solved, lambda: advance(1))
            else:
                extremes = estimator.extremes(solved, top_k, lambda: advance(1))
    info = _info(job, estimator, solved, n_targets)
    attribution = Attribution(extremes, info) if top_k is not None else Attribution(whole.mean, info, whole.spread)
    if name is not None:
        attribution.save(job.store.scores_dir(name))
    return attribution


def _info(job: Job, estimator: Estimator, solved: Sequence[Solved], n_targets: int) -> AttributionInfo:
    """Say how scores came about, and tell the damping."""
    dampings = [one.damping for one in solved]
    values = " to ".join(f"{value:.2g}" for value in sorted({min(dampings).value, max(dampings).value}))
    rank_zero_info(f"TRAKCallback: damping {values}, {' or '.join(sorted({damping.rule for damping in dampings}))}.")
    options, metas = estimator.options, [entry.meta for entry in job.entries]
    return AttributionInfo(
        n_train=job.store.n_train,
        n_targets=n_targets,
        checkpoints=tuple(entry.digest for entry in job.entries),
        projector=job.plan.projector.name,
        proj_dim=job.plan.proj_dim,
        damping=options.damping,
        curvature=options.curvature,
        estimator=options.estimator,
        dampings=tuple(damping.value for damping in dampings),
        damping_rules=tuple(damping.rule for damping in dampings),
        temperature=estimator.temperature,
        loss_explained=tuple(meta["loss_explained"] for meta in metas if "loss_explained" in meta),
    )


def attribute_self(
    trainer: Trainer,
    model: LightningModule | LightningDataModule | None = None,
    *,
    datamodule: LightningDataModule | None = None,
    ckpt_path: CkptPath = None,
) -> Tensor:
    """Return how much training on each example lowered its own loss: its self-influence, never negative.

    It is high for examples that were memorised since nothing else in the train set supports them: mislabelled and
    unusual ones (Feldman and Zhang, "What neural networks memorize and why", NeurIPS 2020, arXiv 2008.03703). Those
    most likely to be wrong come first in ``attribute_self().argsort(descending=True)``, for every task: a label that is
    too high counts like one that is too low.

    At each checkpoint it is ∇Lᵀ H⁻¹ ∇L = qᵢ² φ(zᵢ)ᵀ H⁻¹ φ(zᵢ), of the loss, not of the model output; averaged over
    checkpoints. It is qᵢ times what `attribute` would give for an example with itself as target. No n × n matrix is
    made.

    Also a method: ``trainer.attribute_self(...)``. See `attribute` for arguments and errors.

    Returns:
        Self-influences in units of the loss, (n,), float32.
    """
    with featurized(trainer, model, None, datamodule, ckpt_path) as job:
        estimator, total = job.estimator(), torch.zeros(job.store.n_train)
        with progress(trainer, "Scoring", len(job.entries)) as advance:
            for entry, train in zip(job.entries, estimator.trains, strict=True):
                with naming(entry):
                    total += estimator.self_influence(train, sums_of(entry, estimator, train))
                advance(1)
    return total / len(job.entries)
