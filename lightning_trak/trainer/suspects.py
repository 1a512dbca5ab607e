"""The function `suspects`: which training examples should someone look at, and why?"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_trak.features.sparse_matrix import SparseMatrix
from lightning_trak.influence import Estimator, GaussNewton, Sketch, TrainFeatures, findings, nearest
from lightning_trak.results.suspects import Suspects
from lightning_trak.tasks.loss_terms import LossTerms
from lightning_trak.trainer.attributing.ckpt_path import CkptPath
from lightning_trak.trainer.attributing.describing import described_examples, described_train
from lightning_trak.trainer.attributing.job import Job, prepared_job
from lightning_trak.trainer.attributing.losses import loss_grads, typical_losses
from lightning_trak.trainer.attributing.solving import at_each_checkpoint, solved_at_each
from lightning_trak.trainer.attributing.target_features import TargetFeatures, target_features
from lightning_trak.trainer.featurizing.train_features import with_own_squares
from lightning_trak.trainer.host.attachment import launched
from lightning_trak.trainer.host.framework import LightningDataModule, LightningModule, Trainer
from lightning_trak.trainer.host.progress import progress


def suspects(
    trainer: Trainer,
    model: LightningModule | LightningDataModule | None = None,
    *,
    datamodule: LightningDataModule | None = None,
    ckpt_path: CkptPath = None,
    targets: DataLoader[Any] | bool = False,
) -> Suspects:
    """Rank training examples by what is wrong with them.

    - "probably mislabelled": its loss is far above that of the others. The loss is half of the last checkpoint's, and
      half of the average over all checkpoints; the second half finds labels that are memorised by the end. Let s be its
      root, and σ the distance of the 85th percentile of s from its median, divided by 1.04 (the standard deviation of a
      normal distribution). Then s is more than 4 σ above the median.
    - "near-duplicate of ...": an earlier training example has nearly the same gradients. Their cosine c, after
      whitening by H, averaged over checkpoints, is at least 0.97, and 1 − c at most a fifth of its median over
      examples; or it is at least 0.999. Equal examples have 1.
    - "leaks target ...": the same for a target, with ``targets``.
    - "harmful on average": training on it worsened the outputs of the targets, averaged over them, with ``targets``.
      This harm is positive, and more than 6 σ above the median. An output is worse if its loss is higher.

    Where nothing stands out, nothing is named wrong, and the ranking is by the loss. The limits were measured on
    planted faults: see "Suspects" in ``tests/benchmarks/README.md``. Up to three in a hundred correct examples, the
    most difficult ones, are named as mislabelled too. So look before you delete.

    Gradients are those of the model output. For classes it depends on the label, so a copy with another label is no
    near-duplicate. All exact copies were found; of copies with noise or with some words replaced, few are. Rows
    of a table with few columns may be near-duplicates without being copies.

    Averages over checkpoints need some: save one after each epoch. The train set is read twice more, to learn labels,
    predictions and losses.

    Also a method: ``trainer.suspects(...)``. See `attribute` for the other arguments and errors.

    Args:
        trainer: with a `TRAKCallback`.
        model: the model that the trainer fitted last, by default.
        datamodule: supplies the train set, unless the model does.
        ckpt_path: None for every checkpoint of the store.
        targets: a loader of the examples to hold the train set against, e.g. the validation set; or True for those of
            `attribute`. They are featurized, which takes as long for each as a training example took.

    Returns:
        All training examples, ranked: `Suspects`. Of several processes each returns them.

    Raises:
        TypeError: if ``targets`` is neither a loader nor True or False.
    """
    if not isinstance(targets, (bool, DataLoader)):
        raise TypeError(
            f"targets must be a DataLoader, or True for the targets of attribute(), got {type(targets).__name__}."
        )
    return launched(trainer, _suspects, trainer, model, datamodule, ckpt_path, targets)


def _suspects(trainer: Trainer, model: Any, datamodule: Any, ckpt_path: CkptPath, targets: Any) -> Suspects:
    """Do what `suspects` does, in each process."""
    loader = None if isinstance(targets, bool) else targets
    with prepared_job(trainer, model, loader, datamodule, ckpt_path) as job:
        found: Suspects = trainer.strategy.broadcast(job.featurized(partial(_found, job, targets is not False)))
    return found


def _found(job: Job, with_targets: bool) -> Suspects:
    """Featurize the targets, if there are any, and compute all numbers."""
    reader, estimator = job.loop("train").reader, job.estimator()
    targets = target_features(job) if with_targets else None
    own, theirs = Sketch(reader.size), None if targets is None else Sketch(len(targets.outputs))
    influence = _compare(job, estimator, targets, own, theirs)
    loss, train = typical_losses(job, reader), described_train(job, reader)
    harm, described, near_targets = None, None, None
    rows = own.rows()
    with progress(job.trainer, "Looking for near-duplicates", reader.size) as advance:
        neighbours = nearest(rows, None, advance, estimator.device)
    if targets is not None and theirs is not None:
        with progress(job.trainer, "Looking for leaks", reader.size) as advance:
            near_targets = nearest(rows, theirs.rows(), advance, estimator.device)
        harm, described = _harm(job, estimator, targets), described_examples(job, targets.reader)[1]
    job.say_what_was_averaged()
    return Suspects(findings(loss, influence, neighbours, near_targets, harm), train, described)


def _compare(
    job: Job, estimator: Estimator, targets: TargetFeatures | None, own: Sketch, theirs: Sketch | None
) -> Tensor:
    """Return the self-influences, (n,), and add the whitened features of train set and targets to their sketches."""

    def compare(number: int, train: TrainFeatures, sums: GaussNewton | None) -> Tensor:
        scales = job.scales[number]
        train = with_own_squares(job.entries[number], train, scales)
        whiten, width = estimator.whitening(train, sums), 0
        influence = torch.zeros(job.store.n_train) if train.squares is None else estimator.self_influence(train)
        for rows, features, loss_grad, _ in train.blocks(device=estimator.device):
            whitened, width = whiten(features), features.shape[1]
            own.add(rows, whitened, number)
            if train.squares is None:
                influence[rows] = (loss_grad.square() * whitened.square().sum(1)).cpu()
        if targets is not None and theirs is not None:
            phi = targets.features[number]
            phi = phi if isinstance(phi, Tensor) else _shortened(phi, width, scales)
            theirs.add(slice(0, len(phi)), whiten(phi), number)
        return influence

    return torch.stack(at_each_checkpoint(job, estimator, "Comparing", compare)).mean(0)


def _shortened(targets: SparseMatrix, width: int, scales: Tensor | None) -> SparseMatrix:
    """Return as many entries of each target as are stored of a training example: the largest ones before scaling."""
    if scales is None:
        return targets.largest(width)
    return targets.scaled(1 / scales).largest(width).scaled(scales)


def _harm(job: Job, estimator: Estimator, targets: TargetFeatures) -> Tensor:
    """Return how much training on each example worsened the outputs of the targets, on average, (n,).

    An output is better where its loss is lower, in the direction of the sign of Q. Where the loss is no function of the
    output, a higher output is better.
    """
    signs, last = torch.ones(len(targets.outputs)), job.entries[-1]
    if not LossTerms(job.model).loss_needs_model:
        signs = loss_grads(targets.reader, last.weights(), targets.outputs).sign()
    solved = solved_at_each(job, estimator, targets.features)
    harm = torch.zeros(job.store.n_train)
    with progress(job.trainer, "Scoring", len(harm)) as advance:
        for rows in estimator.trains[0].slices(len(signs)):
            scores = estimator.scores(solved, spread=False, rows=range(rows.start, rows.stop)).mean
            harm[rows] = -(scores @ signs) / len(signs)
            advance(len(scores))
    return harm
