"""Temperature-scaled outputs: Q and w closer to those of a model that was not trained on the example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lightning_trak.influence.train_features import TrainFeatures

TEMPERATURE = 1.3


def is_logistic(outputs: Tensor, loss_grad: Tensor, curvature: Tensor) -> bool:
    """Say whether Q and w are those of L(f) = softplus(−f): Q = sigmoid(−f) and w = Q (1 − Q).

    It is called when examples are featurized, where outputs are known. The store keeps the result.

    Args:
        outputs: f, (b,).
        loss_grad: Q, (b,).
        curvature: w, (b,).

    >>> f = torch.tensor([0.0, 2.0])
    >>> q = torch.sigmoid(-f)
    >>> is_logistic(f, q, q * (1 - q)), is_logistic(f, q, torch.full((2,), 2.0)), is_logistic(f, 2 * q, q * (1 - q))
    (True, False, False)
    """
    expected = torch.sigmoid(-outputs.double())
    pairs = ((loss_grad, expected), (curvature, expected * (1 - expected)))
    return all(torch.allclose(own.double(), logistic, rtol=1e-2, atol=1e-4) for own, logistic in pairs)


def choose_temperature(asked: float | str, trains: Sequence[TrainFeatures], *, auto_damping: bool) -> float:
    """Return T: the given number; for ``"auto"`` 1.3 where the rule of `TRAKCallback` says so, else 1.

    Raises:
        ValueError: if a temperature other than 1 is given, and the loss is not softplus(−f).

    >>> train = TrainFeatures(*np.ones((3, 2, 1)), logistic=True, n_trainable=5)
    >>> choose_temperature("auto", [train], auto_damping=True)
    1.3
    """
    logistic = all(train.logistic for train in trains)
    if isinstance(asked, str):
        fits_all = all(train.n_trainable >= train.shape[0] for train in trains)
        return TEMPERATURE if auto_damping and logistic and fits_all else 1.0
    if asked != 1 and not logistic:
        raise ValueError(
            f"TRAKCallback(temperature={asked}) needs the loss softplus(−f), like that of ClassificationMixin. Q and w"
            " in the store are of another loss. Use temperature='auto' or 1."
        )
    return float(asked)


def tempered(train: TrainFeatures, temperature: float) -> TrainFeatures:
    """Return features with Q and w of the temperature-scaled loss L(f / T), for the logistic loss L(f).

    A model with more parameters than examples can memorise its training examples. Then their outputs are far higher
    than those of a model trained without them, and their Q is far smaller. Models trained on parts of the data are less
    confident on average. Dividing the outputs by a temperature has that effect (Guo et al., "On calibration of modern
    neural networks", ICML 2017, arXiv 1706.04599).

    Args:
        train: features with the logistic loss, see `is_logistic`.
        temperature: T > 0; above 1 the outputs are less confident.

    >>> train = tempered(TrainFeatures(np.eye(2, dtype="f4"), np.array([0.5, 0.1], "f4"), np.zeros(2, "f4")), 2.0)
    >>> train.loss_grad, train.curvature
    (array([0.25 , 0.125], dtype=float32), array([0.0625 , 0.046875], dtype=float32))
    """
    q = torch.from_numpy(np.array(train.loss_grad, dtype=np.float64))
    softened = torch.sigmoid(torch.logit(q) / temperature).numpy()
    return replace(
        train,
        loss_grad=(softened / temperature).astype(np.float32),
        curvature=(softened * (1 - softened) / temperature**2).astype(np.float32),
    )
