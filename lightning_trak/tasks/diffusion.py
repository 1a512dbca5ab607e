"""Denoising diffusion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_trak.data.batch import describe
from lightning_trak.tasks.base import TRAKMixin
from lightning_trak.tasks.draws import draw_signs


class DiffusionMixin(TRAKMixin):
    """Denoising diffusion, trained with the squared error of the predicted noise.

    The loss of an example is an expectation over steps t and noise ε. It is approximated with K pairs (t_k, ε_k), the
    same for all examples. The schedule is cut into K equal parts, and t_k is the middle of part k; the noise is drawn
    once. With the noisy example x_k = √ᾱ x + √(1 − ᾱ) ε_k, where ᾱ belongs to step t_k, and its d entries:

    - f = −(Σ_k ‖ε_θ(x_k, t_k) − ε_k‖² / (K d))^½: a positive score says that the training example makes the model
      denoise the target better;
    - L = f², the mean squared error;
    - Q = −2 f;
    - w = 2; an example has the weight 2 d in H, see `kernel_weight`.

    Scores rank training examples; their size is not the size of the change to expect (``python -m tests.benchmarks
    diffusion``). Other outputs are compared in Zheng et al., "Intriguing properties of data attribution on diffusion
    models", ICLR 2024, arXiv 2311.00500. The noisy example is that of Ho et al., "Denoising diffusion probabilistic
    models", NeurIPS 2020, arXiv 2006.11239, Equation 4.

    Define `predict_noise`; and `add_noise` and `get_n_steps`, unless the module has ᾱ as ``alphas_cumprod``, (steps,).
    All examples must have the same shape.

    Attributes:
        n_pairs: K. Each pair takes a forward and a backward pass.
        pair_seed: the seed of the noise.

    >>> class Denoiser(DiffusionMixin, torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.net, self.alphas_cumprod = torch.nn.Linear(4, 4), torch.linspace(0.99, 0.01, 50)
    ...     def predict_noise(self, noisy, steps, batch):
    ...         return self.net(noisy)
    >>> Denoiser().model_output(torch.randn(3, 4)).shape
    torch.Size([3])
    """

    whitens_by_default = False  # LDS is lower with it

    n_pairs: int = 10
    pair_seed: int = 0

    def get_clean(self, batch: Any) -> Tensor:
        """Return the examples without noise, (b, ...): ``batch``, or its first item."""
        clean = batch[0] if isinstance(batch, (list, tuple)) and batch else batch
        if not isinstance(clean, Tensor):
            raise TypeError(
                f"The batch is {describe(batch)}; expected examples or (examples, ...). Override"
                f" get_clean(self, batch) in {type(self).__name__} to say where to find them."
            )
        return clean

    def predict_noise(self, noisy: Tensor, steps: Tensor, batch: Any) -> Tensor:
        """Return ε_θ, (b, ...), for noisy examples (b, ...) at steps (b,); conditions, if any, are in ``batch``."""
        raise NotImplementedError(
            f"{type(self).__name__} must define predict_noise(self, noisy, steps, batch), which returns the noise that"
            " the model predicts for noisy examples, e.g. self(noisy, steps)."
        )

    def add_noise(self, clean: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """Return the noisy examples, (b, ...), at steps (b,), as in training."""
        share = self._schedule()[steps].reshape(-1, *[1] * (clean.ndim - 1)).to(clean)
        return share.sqrt() * clean + (1 - share).sqrt() * noise

    def get_n_steps(self) -> int:
        """Return the number of steps."""
        return len(self._schedule())

    def model_output(self, batch: Any) -> Tensor:
        """Return minus the root mean squared error over the pairs, (b,)."""
        errors = [(predicted - noise).square().flatten(1).mean(1) for predicted, noise in self._predictions(batch)]
        return -torch.stack(errors).mean(0).sqrt()

    def draw_labels(self, batch: Any, seeds: Sequence[int]) -> Tensor:
        """Return a sign for every entry of every predicted noise, (b, K, ...); see `TRAKMixin` for ``seeds``."""
        clean = self.get_clean(batch)
        return draw_signs(seeds, (self.n_pairs, *clean.shape[1:]), clean)

    def drawn_loss(self, drawn: tuple[Any, Tensor]) -> Tensor:
        """Return √(2 / (K d)) Σ s ε_θ for every example, (b,), with signs s.

        On average, the outer product of its gradient is the Gauss–Newton matrix of the mean squared error.
        """
        batch, signs = drawn
        pairs = zip(signs.unbind(1), self._predictions(batch), strict=True)
        total = torch.stack([(sign * predicted).flatten(1).sum(1) for sign, (predicted, _) in pairs]).sum(0)
        return (2 / signs[0].numel()) ** 0.5 * total

    def output_to_loss(self, output: Tensor, batch: Any) -> Tensor:
        """Return the mean squared errors, (b,)."""
        return output.square()

    def kernel_weight(self, output: Tensor, batch: Any) -> Tensor:
        """Return the weight of every example in H, (b,): d w.

        An example adds weight · ∇f ∇fᵀ to H, a matrix of rank 1. The Gauss–Newton matrix of its mean squared error over
        d entries has rank d. The weight d w gives both the same trace, if the gradients of the d predictions are
        orthogonal and of equal norm.
        """
        return self.get_clean(batch)[0].numel() * super().kernel_weight(output, batch)

    def batch_loss(self, batch: Any) -> None:
        """Return None: training draws other steps and noise, so its loss differs."""
        return

    def _predictions(self, batch: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield predicted noise and noise of every pair, (b, ...) each."""
        clean = self.get_clean(batch)
        for steps, noise in self._pairs(clean):
            predicted = self.predict_noise(self.add_noise(clean, noise, steps), steps, batch)
            if predicted.shape != noise.shape:
                raise ValueError(
                    f"predict_noise returned shape {tuple(predicted.shape)} for noise {tuple(noise.shape)}; expected"
                    " the same. Return the predicted noise alone, without a predicted variance."
                )
            yield predicted, noise

    def _pairs(self, clean: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield steps (b,) and noise (b, ...), the same in every row."""
        generator = torch.Generator().manual_seed(self.pair_seed)
        for pair in range(self.n_pairs):
            noise = torch.randn(clean.shape[1:], generator=generator, dtype=torch.float32).to(clean)
            step = int((pair + 0.5) * self.get_n_steps() / self.n_pairs)
            yield torch.full((len(clean),), step, device=clean.device), noise.expand_as(clean)

    def _schedule(self) -> Tensor:
        schedule = getattr(self, "alphas_cumprod", None)
        if not isinstance(schedule, Tensor):
            raise TypeError(
                f"{type(self).__name__} has no tensor alphas_cumprod, (steps,). Set it, or override add_noise(self,"
                " clean, noise, steps) and get_n_steps(self)."
            )
        return schedule
