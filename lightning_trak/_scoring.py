"""From the stored features of the checkpoints to scores: of targets, or of the training examples for themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_trak._checkpoints import featurize_targets, naming
from lightning_trak._plan import Plan
from lightning_trak.damping import (
    CANDIDATES,
    EXAMPLES,
    LEAST_DAMPING,
    between,
    choose_damping,
    distance_to_optimum,
    training_damping,
)
from lightning_trak.progress import progress
from lightning_trak.scores import (
    Extremes,
    Scores,
    TrainFeatures,
    extreme_scores,
    moments,
    n_blocks,
    precondition,
    scores,
    self_influence,
    with_mean_loss_grad,
)
from lightning_trak.store import FeatureStore
from lightning_trak.tempering import TEMPERATURE, tempered
from lightning_trak.training_time import TrainingTime
from lightning_trak.weights import load_weights


class Damping(NamedTuple):
    """λ, and how it was chosen."""

    value: float
    rule: str


class Scored(NamedTuple):
    """Scores of targets, and what the estimator came to.

    Attributes:
        scores: of all training examples, or of the extreme ones.
        n_targets: m.
        dampings: at every checkpoint.
        temperature: by which outputs were divided in Q and w.
    """

    scores: Scores | Extremes
    n_targets: int
    dampings: list[Damping]
    temperature: float


@dataclass(frozen=True)
class Scoring:
    """The estimator, over some checkpoints of a store that are featurized.

    Attributes:
        trainer: supplies device and progress bar.
        model: featurizes the targets.
        store: has the train features.
        plan: how targets are featurized.
        digests: of the checkpoints to average over.
        damping: λ, or ``"auto"``.
        temperature: of the outputs in Q and w, or ``"auto"``.
        curvature: whether H is weighted; see `TRAKCallback`.
        estimator: ``"gauss_newton"`` or ``"trak"``.
    """

    trainer: Any
    model: Any
    store: FeatureStore
    plan: Plan
    digests: list[str]
    damping: float | str
    temperature: float | str
    curvature: bool
    estimator: str

    def targets(self, loader: DataLoader[Any], top_k: int | None) -> Scored:
        """Featurize targets, solve with the kernel of every checkpoint, and score."""
        trains, temperature = self._trains()
        dampings = self._dampings(trains)
        solved = self._solve(loader, trains, [damping.value for damping in dampings])
        n_train, n_targets, device = self.store.n_train, len(solved[0]), self._device
        result: Scores | Extremes
        with progress(self.trainer, "Scoring", n_blocks(n_train, n_targets)) as advance:
            if top_k is None:
                result = scores(trains, solved, lambda: advance(1), device)
            else:
                result = extreme_scores(trains, solved, min(top_k, n_train), lambda: advance(1), device)
        return Scored(result, n_targets, dampings, temperature)

    def self_influence(self) -> Tensor:
        """Return how much every training example lowers its own loss, (n,)."""
        total, (trains, _) = torch.zeros(self.store.n_train), self._trains()
        with progress(self.trainer, "Scoring", len(self.digests)) as advance:
            for digest, train, damping in zip(self.digests, trains, self._dampings(trains), strict=True):
                with naming(self.store[digest]):
                    total += self_influence(train, damping=damping.value, curvature=self.curvature, device=self._device)
                advance(1)
        return total / len(self.digests)

    def _solve(self, loader: DataLoader[Any], trains: list[TrainFeatures], dampings: list[float]) -> list[Tensor]:
        """Featurize the targets at every checkpoint and solve with its kernel."""
        loop, solved, total = self.plan.loop(self.trainer, self.model, loader, "target"), [], len(self.digests)
        last = self.digests[-1]
        loop.label_targets(lambda: load_weights(self.store[last].weights_path, last))
        for number, (digest, train, damping) in enumerate(zip(self.digests, trains, dampings, strict=True), 1):
            entry = self.store[digest]
            if number == 1:
                loop.preflight(load_weights(entry.weights_path, digest), digest)
            targets = featurize_targets(loop, entry, f"{number}/{total}").to(self._device)
            with naming(entry):
                x = precondition(train, targets, damping=damping, curvature=self.curvature)
            solved.append(x.cpu())  # those of all checkpoints would fill the device
        return solved

    def _dampings(self, trains: list[TrainFeatures]) -> list[Damping]:
        """Return λ at every checkpoint, and how it was chosen."""
        if not isinstance(self.damping, str):
            return [Damping(self.damping, "as given")] * len(trains)
        found = [self.store[digest].meta.get("training_time") for digest in self.digests]
        known = [TrainingTime(**training) for training in found if training is not None and training["time"] > 0]
        dampings = []
        for digest, train, training in zip(self.digests, trains, found, strict=True):
            with naming(self.store[digest]):
                dampings.append(self._damping(train, known if training is not None else []))
        return dampings

    def _damping(self, train: TrainFeatures, trainings: list[TrainingTime]) -> Damping:
        """Choose λ at one checkpoint: by a rule, and less than that the nearer training has come to its optimum."""
        sums, (n, k) = moments(train, curvature=self.curvature, device=self._device), train.features.shape
        if trainings and sums.weighted_scale > 0:
            value, rule = training_damping(trainings, n, sums.weighted_scale), "from the training time"
            least, at_optimum = (LEAST_DAMPING, "least, as at an optimum") if n > k else (value, rule)
        else:
            features, loss_grad, w = train.sample(EXAMPLES, self._device)
            value = choose_damping(features, loss_grad, w if self.curvature else torch.ones_like(w), sums.scale)
            rule = "by cross-validation"
            least, at_optimum = (LEAST_DAMPING, "least") if n > k else (CANDIDATES[0], "little")
            at_optimum += ", as at an optimum"
        distance = distance_to_optimum(sums.gradient, sums.squares)
        if distance == 0:
            return Damping(least, at_optimum)
        return Damping(between(least, value, distance), rule if distance == 1 else f"{rule}, less near an optimum")

    def _trains(self) -> tuple[list[TrainFeatures], float]:
        """Return the train set's verified features at every checkpoint, and the temperature of their Q and w."""
        trains = []
        for digest in self.digests:
            entry = self.store[digest]
            entry.verify()
            trains.append(TrainFeatures(entry.features, entry.loss_grad, entry.curvature))
        temperature = self._temperature()
        if temperature != 1:
            trains = [tempered(train, temperature) for train in trains]
        return (with_mean_loss_grad(trains) if self.estimator == "trak" else trains), temperature

    def _temperature(self) -> float:
        """Choose T by what was noted when the checkpoints were featurized; the model may be frozen since."""
        metas = [self.store[digest].meta for digest in self.digests]
        logistic = all(meta.get("logistic", False) for meta in metas)
        if isinstance(self.temperature, str):
            fits_all = all(meta.get("n_trainable", 0) >= self.store.n_train for meta in metas)
            return TEMPERATURE if self.damping == "auto" and logistic and fits_all else 1.0
        if self.temperature != 1 and not logistic:
            raise ValueError(
                f"TRAKCallback(temperature={self.temperature}) needs the loss softplus(−f), as that of"
                " ClassificationMixin is: Q and w in the store are of another one. Use temperature='auto' or 1."
            )
        return float(self.temperature)

    @property
    def _device(self) -> torch.device:
        device = self.trainer.strategy.root_device
        return device if device.type == "cuda" else torch.device("cpu")  # others lack float64
