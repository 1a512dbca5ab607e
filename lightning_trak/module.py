"""What a module tells about itself so that its outputs can be attributed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from lightning_trak.gradients.batch import NumberedBatch, fresh
from lightning_trak.module_state import ModuleState, unchanged


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
def prepared(module: Any, call: Callable[..., Any]) -> Iterator[None]:
    """Let a module prepare for a checkpoint, and leave it as it was: attributes, buffers, parameters, submodules.

    Args:
        module: defines ``prepare_checkpoint``, or does not.
        call: calls a bound method of the module at the checkpoint's weights.
    """
    prepare = getattr(module, "prepare_checkpoint", None)
    if prepare is None:
        yield
        return
    state = ModuleState(module)
    try:
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


class LossTerms:
    """Q and w of a module's examples, from whatever the module defines: its own formulas first, else autograd.

    Where neither ``out_to_loss_grad`` nor ``out_to_loss_curvature`` is the module's own, the outputs already known
    are differentiated and no further forward pass is run.

    Args:
        module: defines ``model_output``, with or without `TRAKMixin`.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        self._own_grad = own_method(module, "out_to_loss_grad")
        self._own_curvature = own_method(module, "out_to_loss_curvature")
        self._own_loss = own_method(module, "output_to_loss")
        self._kernel_weight = own_method(module, "kernel_weight")
        self._per_sample_loss = own_method(module, "per_sample_loss")

    @property
    def need_projection(self) -> bool:
        """Whether Q is to be found by projection, as the module does not define it either."""
        return self._per_sample_loss is not None and self._own_grad is None

    def own_curvature(self, call: Callable[..., Any], batch: Any, output: Tensor) -> Tensor | None:
        """Return w, (b,), as the module defines it; None if it leaves that to the loss. See `__call__`."""
        if self._own_curvature is None:
            return None
        return _checked("out_to_loss_curvature", call(self._own_curvature, batch), output)

    def __call__(self, call: Callable[..., Any], batch: Any, output: Tensor) -> tuple[Tensor, Tensor]:
        """Return Q and w, each (b,), for a batch whose model outputs are known.

        Args:
            call: calls a bound method of the module at the right weights, as `ModelFunction.call` does.
            batch: the batch.
            output: f, (b,).
        """
        loss_grad, curvature = loss_derivatives(lambda f: call(self._output_to_loss, f, batch), output)
        if self._own_grad is not None:
            own = _checked("out_to_loss_grad", call(self._own_grad, batch), output)
            if self._own_curvature is None:
                _check_consistent(own, loss_grad)
            loss_grad = own
        own_curvature = self.own_curvature(call, batch, output)
        if own_curvature is not None:
            curvature = own_curvature
        elif self._kernel_weight is not None:
            curvature = _checked("kernel_weight", call(self._kernel_weight, output, batch), output)
        return loss_grad, curvature

    def of_batch(self, batch: Any) -> Tensor | None:
        """Return the loss of a batch that training minimises; None where the module tells no loss, but its Q alone."""
        whole, reduce = own_method(self._module, "batch_loss"), own_method(self._module, "reduce_losses")
        if whole is not None:
            return whole(batch)  # type: ignore[no-any-return]
        if self._per_sample_loss is not None:
            losses = self._per_sample_loss(fresh(batch))
        elif self._own_loss is None and self._own_grad is not None:
            return None
        else:
            losses = self._output_to_loss(self._module.model_output(fresh(batch)), fresh(batch))
        return losses.mean() if reduce is None else reduce(losses, batch)

    def _output_to_loss(self, output: Tensor, batch: Any) -> Tensor:
        own = self._own_loss
        return TRAKMixin.output_to_loss(self._module, output, batch) if own is None else own(output, batch)


def own_method(module: Any, name: str) -> Callable[..., Any] | None:
    """Return the module's own method of that name; None if it has none or merely inherits the mixin's default."""
    method = getattr(module, name, None)
    default = getattr(TRAKMixin, name)
    return None if method is None or getattr(method, "__func__", None) is default else method


def _checked(name: str, value: Any, output: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != output.shape:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"{name}(batch) returned {got}; expected one number for each example, shape {tuple(output.shape)}."
        )
    return value.detach()


def _check_consistent(own: Tensor, from_loss: Tensor) -> None:
    """Refuse a Q of one loss and a w of another: the Newton step of neither."""
    if not torch.allclose(own.to(from_loss.dtype), from_loss, rtol=1e-2, atol=1e-3, equal_nan=True):
        raise ValueError(
            f"out_to_loss_grad gives {own[0].item():.4g} for an example where −∂output_to_loss/∂f is"
            f" {from_loss[0].item():.4g}: they belong to different losses, so the curvature ∂²L/∂f² is unknown. Define"
            " output_to_loss (out_to_loss_grad then follows), or out_to_loss_curvature beside out_to_loss_grad."
        )
