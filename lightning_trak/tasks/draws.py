"""Labels drawn from predictions, for each example by its own random numbers: the same in a batch of any size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_BELOW_ONE = 1 - 2**-20  # rounded to float32, a product with it stays below the other factor


def uniform(seeds: Sequence[int], shape: Sequence[int], like: Tensor) -> Tensor:
    """Return numbers between 0 and 1 for every example, (b, *shape), from a seed for each.

    >>> torch.equal(uniform([3, 5], [2], torch.zeros(0))[1:], uniform([5], [2], torch.zeros(0)))
    True
    """
    generator = torch.Generator()
    drawn = [torch.rand(tuple(shape), generator=generator.manual_seed(seed)) for seed in seeds]
    return torch.stack(drawn).to(like.device) if drawn else torch.zeros(0, *shape, device=like.device)


def draw_signs(seeds: Sequence[int], shape: Sequence[int], like: Tensor) -> Tensor:
    """Draw −1 or 1 for every number of every example, (b, *shape), each as often.

    With residuals of such signs, the squared error has the Gauss–Newton matrix as the mean of its gradients' outer
    products: E[(Jᵀs)(Jᵀs)ᵀ] = JᵀJ.

    >>> draw_signs([0, 1], [50], torch.zeros(0)).abs().sum()
    tensor(100.)
    """
    return torch.where(uniform(seeds, shape, like) < 0.5, -1.0, 1.0).to(like.dtype)


def draw_classes(logits: Tensor, seeds: Sequence[int]) -> Tensor:
    """Draw a class for every part of every example, (b, ..., classes) → (b, ...), with the probabilities softmax(g).

    A class is where the cumulative probability passes a uniform number.

    >>> draw_classes(torch.tensor([[0.0, float("-inf")], [float("-inf"), 0.0]]), seeds=[0, 1])
    tensor([0, 1])
    """
    cumulative = logits.float().softmax(-1).cumsum(-1)
    level = uniform(seeds, logits.shape[1:-1], logits).clamp(max=_BELOW_ONE)[..., None] * cumulative[..., -1:]
    return torch.searchsorted(cumulative, level, right=True).squeeze(-1)


def draw_tags(logits: Tensor, seeds: Sequence[int]) -> Tensor:
    """Draw zeros and ones for every example, (b, c) → (b, c), with the probabilities sigmoid(g) of ones.

    >>> draw_tags(torch.tensor([[-100.0, 100.0]]), seeds=[0])
    tensor([[0., 1.]])
    """
    return (uniform(seeds, logits.shape[1:], logits) < logits.float().sigmoid()).to(logits)
