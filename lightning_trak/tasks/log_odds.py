"""The log-odds of an example, from its loss."""

from __future__ import annotations

import torch
from torch import Tensor


def log_odds(loss: Tensor) -> Tensor:
    """Return f with softplus(−f) = L: the log-odds log(p / (1 − p)) of the probability p = exp(−L).

    Whatever L sums or averages, it is a function of f alone, and ∇L = −(1 − p) ∇f exactly. So a ``model_output`` may
    return the log-odds of any loss of an example; then it needs no ``output_to_loss``.

    Args:
        loss: L ≥ 0, any shape; f is NaN where L is negative.

    >>> loss = torch.tensor([0.1, 3.0, 200.0])
    >>> torch.allclose(torch.nn.functional.softplus(-log_odds(loss)), loss)
    True
    """
    loss = torch.where(loss == 0, torch.finfo(loss.dtype).tiny, loss)  # a loss of zero has no logarithm
    return -loss - torch.log(-torch.expm1(-loss))
