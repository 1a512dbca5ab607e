"""TRAK data attribution for PyTorch Lightning: which training examples made my model say this?

The way of the data, and the module that is each stage::

    checkpoint → per-sample gradients → projection → store → gram → scores → attribution

    module, tasks     what a module tells: model output f, loss L(f), Q = −∂L/∂f, w = ∂²L/∂f²; ready mixins
    callback          from Lightning's checkpoint saving to the stages
    framework         which Lightning it is, lightning or pytorch_lightning
    checkpoint_io     watches checkpoint files, whoever writes them
    loss_check        is what is trained on what scores are about?
    attribute         the stages in order
    _scoring          the last of them, from stored features to scores
    _loop, _plan      the featurization loop inside Lightning, and what it is to compute
    _outputs          what a model gives as it stands: its outputs
    module_state      a module before and after: put back, and compared
    generators        random generators, global ones and those that modules and datasets hold
    _checkpoints      what is done with one checkpoint of the store
    data, sampling    examples by row; which of them a sampler never reads
    same_data         where two data sets differ
    weights           checkpoints by digest
    gradients         per-sample gradients of f: engines, and a rule for each type of layer (gradients/rules)
    projection        random projections
    featurize         gradients, projected as they appear
    loss_projection   Q of losses that are no function of the output
    checks            what a model output must be
    adaptation        which engine, and how many examples at a time
    memory            how much there is, and how much a computation takes
    store, entry      FeatureStore, the directory of checkpoints, and each checkpoint's features
    gram, damping     the kernel, and how much to damp it
    training_time     what that follows from, where it is known
    tempering         Q and w of temperature-scaled outputs
    scores            scores
    attribution, plot what the user gets back
    metrics           the linear datamodeling score
    retrain           the user's training, repeated on parts of the train set
    ground_truth      what that gave, and scores measured against it
    counterfactual    what became of targets without their most helpful examples
    progress          progress bars

Only framework imports Lightning. Only tasks, callback, checkpoint_io, loss_check, attribute and _loop import framework;
every other stage is usable without it.

Importing the package registers ``Trainer.attribute`` and ``.attribute_self``: at once for ``lightning``, and for
``pytorch_lightning`` as soon as both it is imported and a `TRAKCallback` is made.
"""

from __future__ import annotations

from lightning_trak.attribute import attribute, attribute_self
from lightning_trak.attribution import Attribution
from lightning_trak.callback import TRAKCallback
from lightning_trak.counterfactual import Counterfactuals, counterfactuals
from lightning_trak.framework import register as _register
from lightning_trak.gradients import LayerCall, layer_rule
from lightning_trak.ground_truth import GroundTruth, evaluate
from lightning_trak.module import TRAKMixin
from lightning_trak.projection import Projector
from lightning_trak.retrain import retrain_subsets
from lightning_trak.store import FeatureStore
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

__version__ = "0.1.0"

__all__ = [
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
    "TRAKCallback",
    "TRAKMixin",
    "attribute",
    "attribute_self",
    "counterfactuals",
    "evaluate",
    "layer_rule",
    "log_odds",
    "retrain_subsets",
]

_register(attribute, attribute_self)
