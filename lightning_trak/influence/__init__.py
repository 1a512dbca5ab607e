"""The estimator: features of the train set and of targets in, scores out; pure torch.

May import nothing of the package but `precision`. `Estimator` works on features from anywhere.
"""

from lightning_trak.influence.calibration import Kinds, fit_weights
from lightning_trak.influence.damping import Damping, whitening_damping
from lightning_trak.influence.estimator import Estimator, Options, Solved
from lightning_trak.influence.gauss_newton import SUMS_VERSION, GaussNewton
from lightning_trak.influence.neighbours import Sketch, nearest
from lightning_trak.influence.outliers import outliers
from lightning_trak.influence.output_curvature import OutputCurvature
from lightning_trak.influence.scores import (
    Extremes,
    Ranked,
    Spread,
    extremes_of,
    merged_extremes,
    rank,
    rows_of_sample,
    score_products,
)
from lightning_trak.influence.suspicion import Findings, findings
from lightning_trak.influence.temperature import is_logistic
from lightning_trak.influence.train_features import TrainFeatures, stack
from lightning_trak.influence.training_time import TrainingTime

__all__ = [
    "SUMS_VERSION",
    "Damping",
    "Estimator",
    "Extremes",
    "Findings",
    "GaussNewton",
    "Kinds",
    "Options",
    "OutputCurvature",
    "Ranked",
    "Sketch",
    "Solved",
    "Spread",
    "TrainFeatures",
    "TrainingTime",
    "extremes_of",
    "findings",
    "fit_weights",
    "is_logistic",
    "merged_extremes",
    "nearest",
    "outliers",
    "rank",
    "rows_of_sample",
    "score_products",
    "stack",
    "whitening_damping",
]
