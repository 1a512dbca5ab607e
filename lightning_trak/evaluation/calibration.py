"""Scores of the right size: calibrated on a few models that were retrained on subsets."""

from __future__ import annotations

from lightning_trak.evaluation.ground_truth import GroundTruth
from lightning_trak.results.attribution import Attribution


def calibrate(attribution: Attribution, truth: GroundTruth) -> Attribution:
    """Weight scores so that their sums predict how outputs change; 10 to 20 retrained subsets are enough.

    Scores rank training examples well, but may be too large or too small by a factor. This fits the factor. If
    ``attribution`` comes from ``trainer.attribute(...)``, it also fits how much each checkpoint counts, and for each
    checkpoint the damping, or the weight of each layer where gradients are whitened. Weights are shrunk towards the
    usual ones, by a strength that cross-validation over subsets chooses. So they stay as they are where the subsets
    say too little.

    Args:
        attribution: scores with or without their features; not with ``top_k``.
        truth: from `retrain_subsets`, of the same train set and targets; at least 4 subsets. Do not evaluate the
            result on the same subsets.

    Returns:
        The calibrated scores. The sum of the scores of a set predicts by how much outputs fall without it.

    Raises:
        ValueError: if the numbers of training examples or targets do not fit together, there are too few subsets, or
            the scores do not predict the outputs at all.

    >>> import torch
    >>> from lightning_trak.results.info import AttributionInfo
    >>> effects, masks = torch.randn(50, 3), torch.rand(12, 50) < 0.5
    >>> truth = GroundTruth(masks, (masks.float() @ effects)[:, None])
    >>> too_large = Attribution(5 * effects, AttributionInfo(50, 3, ("a1b2",), "sparse", 2048, 0.3, True))
    >>> calibrate(too_large, truth).info.calibrated_on
    12
    """
    n, m = attribution.info.n_train, attribution.info.n_targets
    if truth.masks.shape[1] != n or truth.repeats.shape[2] != m:
        raise ValueError(
            f"The scores are of {n} training examples and {m} targets, the ground truth of {truth.masks.shape[1]} and"
            f" {truth.repeats.shape[2]}. Both must be of the same train set and targets."
        )
    return attribution.calibrated(truth.masks, truth.outputs)
