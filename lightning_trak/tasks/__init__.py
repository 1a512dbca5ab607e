"""Ready mixins for common tasks: each defines f, L, Q and w. A new task is a file here.

`base` says what else a module may define: how labels of targets are made, how examples are described, how labels are
drawn.
"""

from __future__ import annotations

from lightning_trak.tasks.classification import ClassificationMixin
from lightning_trak.tasks.contrastive import ContrastiveMixin
from lightning_trak.tasks.diffusion import DiffusionMixin
from lightning_trak.tasks.language import LanguageModelingMixin
from lightning_trak.tasks.log_odds import log_odds
from lightning_trak.tasks.multilabel import MultilabelMixin
from lightning_trak.tasks.regression import RegressionMixin
from lightning_trak.tasks.segmentation import SegmentationMixin

__all__ = [
    "ClassificationMixin",
    "ContrastiveMixin",
    "DiffusionMixin",
    "LanguageModelingMixin",
    "MultilabelMixin",
    "RegressionMixin",
    "SegmentationMixin",
    "log_odds",
]
