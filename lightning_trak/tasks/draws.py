"""Labels drawn from predictions, for each example by its own random numbers: the same in a batch of any size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

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
    signs = torch.where(uniform(seeds, shape, like) < 0.5, -1.0, 1.0)
    return signs.to(like.dtype) if like.is_floating_point() else signs


def draw_classes(logits: Tensor, seeds: Sequence[int]) -> Tensor:
    """Draw a class for every part of every example, (b, ..., classes) → (b, ...), with the probabilities softmax(g).

    A class is where the cumulative probability passes a uniform number.

    >>> draw_classes(torch.tensor([[0.0, float("-inf")], [float("-inf"), 0.0]]), seeds=[0, 1])
    tensor([0, 1])
    """
    with _sums_of_any_order():
        cumulative = logits.float().softmax(-1).cumsum(-1)
    _check_finite(cumulative[..., -1])
    level = uniform(seeds, logits.shape[1:-1], logits).clamp(max=_BELOW_ONE)[..., None] * cumulative[..., -1:]
    return torch.searchsorted(cumulative, level, right=True).squeeze(-1)


def draw_tags(logits: Tensor, seeds: Sequence[int]) -> Tensor:
    """Draw zeros and ones for every example, (b, c) → (b, c), with the probabilities sigmoid(g) of ones.

    >>> draw_tags(torch.tensor([[-100.0, 100.0]]), seeds=[0])
    tensor([[0., 1.]])
    """
    _check_finite(logits)
    return (uniform(seeds, logits.shape[1:], logits) < logits.float().sigmoid()).to(logits)


def _check_finite(values: Tensor) -> None:
    wrong = (~values.isfinite())[:, None].flatten(1).any(1)
    if bool(wrong.any()):
        raise ValueError(
            f"The predictions of {int(wrong.sum())} of {len(wrong)} training examples are not finite, so no labels can"
            " be drawn from them. Look for NaN in the data, or for weights that have diverged."
        )


@contextmanager
def _sums_of_any_order() -> Iterator[None]:
    """Allow a cumulative sum on a GPU with ``Trainer(deterministic=True)``: its rounding hardly changes a draw."""
    asked, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(asked, warn_only=warn)
