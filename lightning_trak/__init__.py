"""TRAK data attribution for PyTorch Lightning: which training examples made my model say this?

The rooms, in the order of the data. Each may import those above it::

    isolation     a module, and random states, left as they were
    data          examples by row, batches of any structure, the identity of a data set, what it tells of its examples
    tasks         what a module tells: model output f, loss L(f), Q = −∂L/∂f, w = ∂²L/∂f²; ready mixins
    gradients     per-sample gradients of f: engines, a rule for each type of layer, what selects engine and batch size
    projection    random projections, listed by name in its __init__
    curvature     Kronecker factors of the loss's curvature, and gradients whitened by them
    features      gradients, projected as they appear
    store         checkpoints on disk: weights, features, sums over the train set
    influence     the estimator: features in, scores out
    results       what the user gets back
    trainer       the only room that sees a Trainer: TRAKCallback, attribute, the featurization loop, TRAKCLI
    evaluation    do scores predict retraining?
    commands      what ``python -m lightning_trak`` does with a store

``metrics`` has the linear datamodeling score, ``precision`` how exactly matrices are multiplied. All rooms above
``trainer`` are usable without Lightning.

Importing the package registers ``Trainer.attribute``, ``Trainer.attribute_self`` and ``Trainer.suspects`` of
``lightning``. Those of ``pytorch_lightning`` are registered when a `TRAKCallback` is made, if that package is imported
by then.
"""

from __future__ import annotations

from typing import Any

from lightning_trak.evaluation.calibration import calibrate
from lightning_trak.evaluation.counterfactuals import Counterfactuals, counterfactuals
from lightning_trak.evaluation.ground_truth import GroundTruth, evaluate
from lightning_trak.evaluation.retraining import retrain_subsets
from lightning_trak.gradients import LayerCall, layer_rule
from lightning_trak.projection import Projector
from lightning_trak.results.attribution import Attribution
from lightning_trak.results.suspects import Suspects
from lightning_trak.store.store import FeatureStore
from lightning_trak.tasks import (
    ClassificationMixin,
    ContrastiveMixin,
    DiffusionMixin,
    LanguageModelingMixin,
    MultilabelMixin,
    RegressionMixin,
    SegmentationMixin,
    log_odds,
)
from lightning_trak.tasks.base import TRAKMixin
from lightning_trak.trainer.attribute import attribute, attribute_self
from lightning_trak.trainer.callback import TRAKCallback
from lightning_trak.trainer.host.framework import register as _register
from lightning_trak.trainer.suspects import suspects

__version__ = "0.1.0"

__all__ = [
    "TRAKCLI",
    "Attribution",
    "ClassificationMixin",
    "ContrastiveMixin",
    "Counterfactuals",
    "DiffusionMixin",
    "FeatureStore",
    "GroundTruth",
    "LanguageModelingMixin",
    "LayerCall",
    "MultilabelMixin",
    "Projector",
    "RegressionMixin",
    "SegmentationMixin",
    "Suspects",
    "TRAKCallback",
    "TRAKMixin",
    "attribute",
    "attribute_self",
    "calibrate",
    "counterfactuals",
    "evaluate",
    "layer_rule",
    "log_odds",
    "retrain_subsets",
    "suspects",
]

_register(attribute, attribute_self, suspects)


def __getattr__(name: str) -> Any:
    """Import `TRAKCLI` when it is asked for, since few programs are command lines."""
    if name == "TRAKCLI":
        from lightning_trak.trainer.cli import TRAKCLI

        return TRAKCLI
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
