"""The score of one training example for one target, split by layer and by parts; see `Attribution.parts`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lightning_trak.data.batch import with_more
from lightning_trak.features.sparse_matrix import SparseMatrix
from lightning_trak.gradients import Engine, ModelFunction
from lightning_trak.gradients.engine import run_prepared
from lightning_trak.influence import Estimator, score_products, stack
from lightning_trak.projection import Projector
from lightning_trak.results.score_parts import SplitScore
from lightning_trak.store.weights import Weights
from lightning_trak.tasks.base import has_parts
from lightning_trak.trainer.attributing.job import Job
from lightning_trak.trainer.featurizing.checkpoints import naming
from lightning_trak.trainer.featurizing.curvature import whitening_at
from lightning_trak.trainer.featurizing.featurization import FeaturizationLoop
from lightning_trak.trainer.featurizing.plan import layer_of
from lightning_trak.trainer.featurizing.train_features import sums_of

_PAIRS = 2**26
_TOLERANCE = 0.05  # relative to all parts: what is stored was rounded to float16


class _Example(NamedTuple):
    """An example at a checkpoint.

    Attributes:
        loop: reads it.
        row: in its data set.
        digest: of the checkpoint.
        weights: of the checkpoint.
        projector: projects its gradients, if it is not that of the loop.
        features: φ, (1, k), as scores are computed from it; of whitened ones, the largest entries.
        scales: with which whitened entries were multiplied, (p,); None for 1.
    """

    loop: FeaturizationLoop
    row: int
    digest: str
    weights: Weights
    projector: Projector | None
    features: Any
    scales: Tensor | None


def split_score(job: Job, estimator: Estimator, targets: Sequence[Any], i: int, j: int) -> SplitScore:
    """Split the score of training example i for target j, averaged over checkpoints.

    Args:
        job: the checkpoints, the model and the data.
        estimator: computed the scores.
        targets: φ(z) of all targets at each checkpoint, (m, k).
        i: row of the train set.
        j: row of the targets.
    """
    loops, parted = (job.loop("train"), job.target_loop()), has_parts(job.model)
    by_layer, by_parts = torch.zeros(len(job.plan.layers)), []
    shapes: list[torch.Size] = []  # of the parts, the same at every checkpoint
    for entry, train, phi, scales in zip(job.entries, estimator.trains, targets, job.scales, strict=True):
        with naming(entry, can_leave_out=False):
            weights = entry.weights()
            at = (entry.digest, weights, whitening_at(loops[0], entry, weights))
            one = _Example(loops[0], i, *at, train.rows(torch.tensor([i])), scales)
            other = _Example(loops[1], j, *at, phi[torch.tensor([j])], scales)
            if parted and not shapes:
                shapes = [_shape_of_parts(example) for example in (one, other)]
                _check_pairs(shapes)
            split = bool(shapes) and all(shapes)
            own, others = [_by_layer(one, job.plan.layers)], [other.features]
            if split:
                own.append(_by_parts(one, shapes[0]))
                others.append(_by_parts(other, shapes[1]))
            solved = estimator.solve(train, stack(others), sums_of(entry, estimator, train))
            q = train.loss_grad[i] * (1.0 if solved.factor is None else solved.factor[i].item())
            rows = stack(own)
            products = score_products(rows, torch.full((len(rows),), float(q)), solved.vectors, estimator.device).cpu()
            by_layer += products[: len(by_layer), 0] / len(job.entries)
            if split:
                by_parts.append(products[len(by_layer) :, 1:].reshape(*shapes[0], *shapes[1]))
    parts = torch.stack(by_parts).mean(0) if by_parts else None
    score = by_layer.sum().item()
    if parts is not None and not abs(parts.sum().item() - score) <= _TOLERANCE * parts.abs().sum().item():
        raise ValueError(
            f"The parts of the examples {i} and {j} add up to {parts.sum().item():.3g}, their score is {score:.3g}: the"
            " data or model_output have changed since they were featurized, or one of them is random."
        )
    return SplitScore(score, dict(zip(job.plan.layers, by_layer.tolist(), strict=True)), parts)


def _by_layer(example: _Example, layers: dict[str, slice]) -> Any:
    """Return what each layer adds to the features, a row for each; whitened entries belong to a layer each."""
    if isinstance(example.features, SparseMatrix):
        starts = torch.tensor([layer.start for layer in layers.values()])
        return stack([example.features.scaled_in_ranges(starts, one) for one in torch.eye(len(layers))])
    found: dict[str, Tensor] = {}

    def work(function: ModelFunction, engine: Engine, _: Sequence[int], batch: Any) -> None:
        found.update(example.loop.featurizer(function, engine, example.digest).by_parameter(batch, 1))

    example.loop.each_batch(example.weights, example.digest, [example.row], work, "Splitting by layer")
    rows = torch.zeros(len(layers), example.features.shape[1])
    places = {layer: place for place, layer in enumerate(layers)}
    for name, features in found.items():
        rows[places[layer_of(name)]] += features[0].cpu()
    return rows


def _shape_of_parts(example: _Example) -> torch.Size:
    """Return the shape of the parts of an example; an empty one if it has a single number."""
    shapes: list[torch.Size] = []

    def work(function: ModelFunction, _: Engine, __: Sequence[int], batch: Any) -> None:
        with torch.no_grad():
            shapes.append(function.call(function.module.all_part_losses, batch).shape[1:])

    example.loop.each_batch(example.weights, example.digest, [example.row], work, "Counting parts")
    return shapes[0]


def _check_pairs(shapes: Sequence[torch.Size]) -> None:
    one, other = (shape.numel() for shape in shapes)
    if one * other > _PAIRS:
        raise ValueError(
            f"The training example has {one} parts and the target {other}: these are too many pairs to split a score by"
            f" (at most {_PAIRS}). Attribute smaller examples, e.g. crops."
        )


def _by_parts(example: _Example, shape: torch.Size) -> Any:
    """Return what each part adds to the features, a row for each; of whitened ones, in the entries that are kept."""
    found: list[Tensor] = []
    count = shape.numel()

    def work(function: ModelFunction, engine: Engine, rows: Sequence[int], batch: Any) -> None:
        start, size = sum(len(part) for part in found), len(rows)
        featurizer = example.loop.featurizer(function, engine, example.digest, example.projector)
        featurizer = featurizer.of("share_of_parts", engine)
        own = torch.arange(start, start + size, device=example.loop.reader.device)
        which = one_hot(own, count).float().reshape(size, *shape)
        chosen = with_more(batch, which)
        result = run_prepared(engine, featurizer.function, chosen, size, lambda: featurizer(chosen, size))
        features = result.features
        if isinstance(example.features, SparseMatrix):
            features = features[:, example.features.columns[0].to(features.device)]
        found.append(features.cpu())

    example.loop.each_batch(example.weights, example.digest, [example.row] * count, work, "Splitting by parts")
    rows = torch.cat(found)
    if not isinstance(example.features, SparseMatrix):
        return rows
    return SparseMatrix(example.features.columns.expand(count, -1), rows).scaled(example.scales)
