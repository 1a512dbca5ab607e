"""Losses of several parts as the loss of one output: the log-odds of all parts together."""

from __future__ import annotations

import torch
from torch import Tensor


def log_odds(loss: Tensor) -> Tensor:
    """Return f with softplus(−f) = L: the log-odds log(p / (1 − p)) of the probability p = exp(−L).

    Whatever is summed or averaged in L, it is a function of f alone, and ∇L = −(1 − p) ∇f exactly: so a
    ``model_output`` that returns it, of any loss of an example, needs no ``output_to_loss``.

    Args:
        loss: L ≥ 0, any shape; of a negative one f is NaN.

    >>> loss = torch.tensor([0.1, 3.0, 200.0])
    >>> torch.allclose(torch.nn.functional.softplus(-log_odds(loss)), loss)
    True
    """
    loss = torch.where(loss == 0, torch.finfo(loss.dtype).tiny, loss)  # a loss of zero has no logarithm
    return -loss - torch.log(-torch.expm1(-loss))
