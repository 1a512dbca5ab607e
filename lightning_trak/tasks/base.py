"""TRAKMixin: what a module tells about itself so that its outputs can be attributed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus
from torch.utils.data import DataLoader

from lightning_trak.data.batch import NumberedBatch
from lightning_trak.isolation.module_state import ModuleState, unchanged


class TRAKMixin:
    """Says what to attribute: the model output f, and the loss L as a function of it.

    Mix it into a LightningModule and define `model_output`; that is enough. The rest has defaults:

    - ``output_to_loss``: L(f) = softplus(−f), the loss of a log-odds f (TRAK, Section 3.1);
    - ``out_to_loss_grad``: Q = −∂L/∂f, by autograd on ``output_to_loss``;
    - ``out_to_loss_curvature``: w = ∂²L/∂f², by autograd on ``output_to_loss``.

    Where the loss is no function of f alone, define ``per_sample_loss`` instead of the three.

    A module that merely defines ``model_output`` works without the mixin. Park et al., "TRAK: Attributing Model
    Behavior at Scale", ICML 2023, arXiv 2303.14186.

    Attributes:
        example_numbers: what `number_examples` returned for the batch in hand; None where rows are unknown.

    >>> class Logistic(TRAKMixin, torch.nn.Linear):
    ...     def model_output(self, batch):
    ...         x, sign = batch
    ...         return sign * self(x).squeeze(1)
    >>> batch = torch.zeros(1, 3), torch.ones(1)
    >>> model = Logistic(3, 1, bias=False)
    >>> model.out_to_loss_grad(batch), model.out_to_loss_curvature(batch)
    (tensor([0.5000]), tensor([0.2500]))
    """

    example_numbers: Tensor | None = None

    def prepare_checkpoint(self) -> None:
        """Compute what ``model_output`` needs of every checkpoint, once, at its weights.

        It may set attributes and buffers; afterwards the module is as it was. Optional.
        """

    def model_output(self, batch: Any) -> Tensor:
        """Return f(z; θ) for every example z of ``batch``, shape (b,).

        Written for an ordinary batch as ``training_step`` gets it, of any structure. The output of an example must not
        depend on the other examples of the batch.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define model_output(self, batch), which returns the number to attribute for"
            " every example of the batch, shape (b,). ClassificationMixin and RegressionMixin have it ready."
        )

    def label_targets(self, batch: Any) -> Any:
        """Return a batch of targets as it is to be attributed, e.g. with labels for those that have none. Optional.

        It is called at the weights of the last checkpoint, so that at all checkpoints the same is attributed.
        """
        return batch

    def number_examples(self, rows: Sequence[int], dataset: Any | None = None) -> Tensor | None:
        """Return what ``model_output`` is to know of which examples a batch has, (b, ...): a batch tells no rows.

        It is `example_numbers` while a method is called with these examples, or with one of them. It is called after
        ``prepare_checkpoint``. Optional.

        Args:
            rows: of the examples.
            dataset: what they are rows of; None for the train set.
        """
        return None

    def output_to_loss(self, output: Tensor, batch: Any) -> Tensor:
        """Return the training loss of every example as a function of its model output, (b,) → (b,).

        It must be differentiable twice. The default is softplus(−f).
        """
        return softplus(-output)

    def kernel_weight(self, output: Tensor, batch: Any) -> Tensor:
        """Return the weight of every example in the kernel H, (b,): w, of its model output.

        Override it where one output stands for many parts of an example, tokens for example, whose losses together have
        more curvature than ∂²L/∂f² tells: it is that of one direction.
        """
        return _derivatives_of(self, output, batch)[1]

    def per_sample_loss(self, batch: Any) -> Tensor:
        """Return the training loss of every example, (b,): by default ``output_to_loss`` of its output.

        Override it where the loss is no function of the model output alone. Then ``output_to_loss`` is not asked, and Q
        follows from projecting the gradient of this loss on that of the output (`lightning_trak.loss_projection`). How
        much of it is left is reported. Featurizing the train set takes two backward passes instead of one.
        """
        return self.output_to_loss(self.model_output(batch), batch)

    def reduce_losses(self, losses: Tensor, batch: Any) -> Tensor:
        """Return the loss of a batch that training minimises, from those of its examples, (b,) → (): their mean.

        Scores do not depend on it; the first batch of training is compared with it.
        """
        return losses.mean()

    def batch_loss(self, batch: Any) -> Tensor | None:
        """Return the loss of a batch that training minimises, (): ``reduce_losses`` of its examples' losses.

        Override it where it is no function of these, or unknown, None. Scores do not depend on it either.
        """
        return self.reduce_losses(self.per_sample_loss(batch), batch)

    def out_to_loss_grad(self, batch: Any) -> Tensor:
        """Return Q = −∂L/∂f for every example, (b,): how hard training still pulls on it. Overridable."""
        return _derivatives_of(self, self.model_output(batch), batch)[0]

    def out_to_loss_curvature(self, batch: Any) -> Tensor:
        """Return w = ∂²L/∂f² for every example, (b,). Overridable."""
        return _derivatives_of(self, self.model_output(batch), batch)[1]


def _derivatives_of(module: Any, output: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    return loss_derivatives(lambda f: module.output_to_loss(f, batch), output)


def loss_derivatives(output_to_loss: Callable[[Tensor], Tensor], output: Tensor) -> tuple[Tensor, Tensor]:
    """Differentiate a loss twice by the model output.

    Args:
        output_to_loss: L, (b,) → (b,), example by example.
        output: f, (b,).

    Returns:
        Q = −∂L/∂f and w = ∂²L/∂f², each (b,).

    >>> loss_derivatives(softplus, torch.zeros(1))
    (tensor([-0.5000]), tensor([0.2500]))
    """
    with torch.inference_mode(False), torch.enable_grad():
        output = output.detach().clone().requires_grad_()
        loss = output_to_loss(output)
        if not isinstance(loss, Tensor) or loss.shape != output.shape:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                f"output_to_loss(output, batch) returned {got} for an output of shape {tuple(output.shape)}; expected"
                " one loss for each example. Use reduction='none', and do not average over the batch."
            )
        if not loss.requires_grad:
            raise ValueError("output_to_loss(output, batch) does not depend on output; compute the loss from it.")
        (slope,) = torch.autograd.grad(loss.sum(), output, create_graph=True)
        curvature = torch.zeros_like(output)
        if slope.requires_grad:
            (second,) = torch.autograd.grad(slope.sum(), output, allow_unused=True)
            curvature = curvature if second is None else second
    return -slope.detach(), curvature


@contextmanager
def prepared(module: Any, call: Callable[..., Any], find_train_loader: Callable[[], DataLoader[Any]]) -> Iterator[None]:
    """Let a module prepare for a checkpoint, and leave it as it was: attributes, buffers, parameters, submodules.

    Args:
        module: defines ``prepare_checkpoint``, or does not.
        call: calls a bound method of the module at the checkpoint's weights.
        find_train_loader: the module has it as a method, for what needs training examples.
    """
    prepare = getattr(module, "prepare_checkpoint", None)
    if prepare is None:
        yield
        return
    state = ModuleState(module)
    try:
        vars(module)["find_train_loader"] = find_train_loader
        with torch.no_grad():
            call(prepare)
        with unchanged(module):
            yield
    finally:
        state.restore()


def numbered(module: Any, batch: Any, rows: Sequence[int], dataset: Any | None) -> Any:
    """Return a batch with the numbers of its examples, if the module asks for them; see `TRAKMixin.number_examples`."""
    number_examples = own_method(module, "number_examples")
    return batch if number_examples is None else NumberedBatch(batch, number_examples(rows, dataset))


def own_method(module: Any, name: str) -> Callable[..., Any] | None:
    """Return the module's own method of that name; None if it has none or merely inherits the mixin's default."""
    method = getattr(module, name, None)
    default = getattr(TRAKMixin, name)
    return None if method is None or getattr(method, "__func__", None) is default else method
