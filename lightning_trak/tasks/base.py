"""TRAKMixin: what a module defines so that its outputs can be attributed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus
from torch.utils.data import DataLoader

from lightning_trak.data.batch import NumberedBatch
from lightning_trak.isolation.module_state import ModuleState, unchanged

_PREDICTED = ("model_output", "part_losses", "output_to_loss", "per_sample_loss")  # what drawn labels must belong to


class TRAKMixin:
    """Defines what to attribute: the model output f, and the loss L as a function of f.

    Mix it into a LightningModule and define `model_output`; that is enough. The rest has defaults:

    - ``output_to_loss``: L(f) = softplus(−f), the loss of a log-odds f (TRAK, Section 3.1);
    - ``out_to_loss_grad``: Q = −∂L/∂f, by autograd on ``output_to_loss``;
    - ``out_to_loss_curvature``: w = ∂²L/∂f², by autograd on ``output_to_loss``.

    Where the loss is no function of f alone, define ``per_sample_loss`` instead of these three.

    If an example's loss L is not negative, f = −√L always works, with L = f² as ``output_to_loss``. If L = −log p is of
    the order of 1, `log_odds` of it works too, with the default ``output_to_loss``. Both make ∇L exactly −Q ∇f.

    A module that defines ``model_output`` works without the mixin too. Park et al., "TRAK: Attributing Model
    Behavior at Scale", ICML 2023, arXiv 2303.14186.

    A mixin may also define ``draw_labels(batch, seeds)`` and ``drawn_loss((batch, labels))``, (b,). The first draws
    labels from the predictions, by a seed for each example, so that they are the same in every batch. It returns None
    where none are left to draw. On average, the outer product of the second's gradient is the Fisher information of
    the labels. See ``TRAKCallback(preconditioner=...)``.

    Attributes:
        example_numbers: what `number_examples` returned for the current batch; None where rows are unknown.
        draws_rest: whether drawn labels leave out what the model output tells, whose curvature w ∇f ∇fᵀ then is added.
        whitens_by_default: whether ``preconditioner="auto"`` uses drawn labels.

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
    draws_rest: bool = False
    whitens_by_default: bool = True

    def prepare_checkpoint(self) -> None:
        """Compute what ``model_output`` needs once per checkpoint, at the checkpoint's weights. Optional.

        It may set attributes and buffers. They are removed when the checkpoint is done.
        """

    def model_output(self, batch: Any) -> Tensor:
        """Return f(z; θ) for every example z of ``batch``, shape (b,).

        The batch is an ordinary one, of any structure, as ``training_step`` gets it. The output of an example must not
        depend on the other examples of the batch.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define model_output(self, batch), which returns the number to attribute for"
            " every example of the batch, shape (b,). ClassificationMixin and RegressionMixin have it ready."
        )

    def label_targets(self, batch: Any) -> Any:
        """Return a batch of targets with what it lacks, e.g. labels. Optional.

        It is called once, at the weights of the last checkpoint, so that all checkpoints attribute the same output.
        """
        return batch

    def number_examples(self, rows: Sequence[int], dataset: Any | None = None) -> Tensor | None:
        """Return what ``model_output`` needs to know about the rows of a batch, (b, ...). Optional.

        A batch itself does not say which rows of the data set it holds. What is returned here is `example_numbers`
        while a method runs on these examples, or on one of them. It is called after ``prepare_checkpoint``.

        Args:
            rows: the rows of the examples.
            dataset: the data set that has these rows; None for the train set.
        """
        return None

    def describe(self, batch: Any) -> Mapping[str, Tensor | Sequence[Any]]:
        """Return what tables and reports should say of targets, by name, each (b,). Optional.

        The values are text, numbers, True, False or None. Mixins of tasks return ``"label"`` and ``"prediction"``,
        where an example has them; the name ``"id"`` sets the ids. It is called after scoring, at the weights of the
        last checkpoint, without gradients. The batch is as the loader gives it, without what `label_targets` adds. See
        `Attribution.targets`.
        """
        return {}

    def output_to_loss(self, output: Tensor, batch: Any) -> Tensor:
        """Return the training loss of every example as a function of its model output, (b,) → (b,).

        It must be twice differentiable. The default is softplus(−f).
        """
        return softplus(-output)

    def kernel_weight(self, output: Tensor, batch: Any) -> Tensor:
        """Return the weight of every example in the Gauss–Newton matrix H, (b,): by default w.

        Override it where one output stands for many parts of an example, such as tokens. Their losses have curvature in
        many directions, and w = ∂²L/∂f² is the curvature in one.
        """
        return _derivatives_of(self, output, batch)[1]

    def per_sample_loss(self, batch: Any) -> Tensor:
        """Return the training loss of every example, (b,): by default ``output_to_loss`` of its output.

        Override it where the loss is no function of the model output alone. Then ``output_to_loss`` is not called, and
        Q follows from projecting the gradient of this loss onto the gradient of the output. How much of the loss
        gradient this explains is reported. Featurizing the train set takes two backward passes instead of one.
        """
        return self.output_to_loss(self.model_output(batch), batch)

    def reduce_losses(self, losses: Tensor, batch: Any) -> Tensor:
        """Return the loss of a batch that training minimises, from the losses of its examples, (b,) → (): their mean.

        Scores do not depend on it. It is compared with the loss of the first training batch.
        """
        return losses.mean()

    def batch_loss(self, batch: Any) -> Tensor | None:
        """Return the loss of a batch that training minimises, (): ``reduce_losses`` of its examples' losses.

        Override it where the batch loss is no function of the examples' losses; return None where it is unknown. Scores
        do not depend on it.
        """
        return self.reduce_losses(self.per_sample_loss(batch), batch)

    def out_to_loss_grad(self, batch: Any) -> Tensor:
        """Return Q = −∂L/∂f for every example, (b,): how strongly training still raises its output. Overridable."""
        return _derivatives_of(self, self.model_output(batch), batch)[0]

    def out_to_loss_curvature(self, batch: Any) -> Tensor:
        """Return w = ∂²L/∂f² for every example, (b,). Overridable."""
        return _derivatives_of(self, self.model_output(batch), batch)[1]


def _derivatives_of(module: Any, output: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    return loss_derivatives(lambda f: module.output_to_loss(f, batch), output)


def loss_derivatives(output_to_loss: Callable[[Tensor], Tensor], output: Tensor) -> tuple[Tensor, Tensor]:
    """Differentiate a loss twice with respect to the model output.

    Args:
        output_to_loss: L, (b,) → (b,), the per-sample loss.
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
            (curvature,) = torch.autograd.grad(slope.sum(), output, materialize_grads=True)
    return -slope.detach(), curvature.detach()  # zeros that older versions of torch fill in would require gradients


@contextmanager
def prepared(module: Any, call: Callable[..., Any], find_train_loader: Callable[[], DataLoader[Any]]) -> Iterator[None]:
    """Call a module's ``prepare_checkpoint``, if it has one; at the end, restore the module.

    Restored are its attributes, buffers, parameters and submodules.

    Args:
        module: a module, with or without ``prepare_checkpoint``.
        call: calls a bound method of the module at the checkpoint's weights.
        find_train_loader: becomes a method of the module, for a ``prepare_checkpoint`` that needs training examples.
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
    """Return a batch with the numbers of its examples, if the module defines them; see `TRAKMixin.number_examples`."""
    number_examples = own_method(module, "number_examples")
    return batch if number_examples is None else NumberedBatch(batch, number_examples(rows, dataset))


def draws_labels(module: Any) -> bool:
    """Say whether a module draws labels from its predictions, and they are those of its own output and loss.

    A subclass that overrides the output or the loss, and not ``draw_labels``, may predict something else.
    """
    drawn = _place(module, "draw_labels")
    return drawn is not None and all(
        drawn <= place for place in (_place(module, name) for name in _PREDICTED) if place is not None
    )


def of_drawing_class(module: Any, name: str) -> bool:
    """Return an attribute of the class that defines ``draw_labels``, or its default.

    Of two mixins, the one that comes first draws; the other's attribute must not count.
    """
    kinds = (kind for kind in type(module).__mro__ if "draw_labels" in vars(kind))
    return bool(getattr(next(kinds, None), name, getattr(TRAKMixin, name)))


def has_parts(module: Any) -> bool:
    """Say whether a module's output is that of losses of parts: ``output_of_parts`` of ``all_part_losses``.

    A subclass that overrides the output, and not ``output_of_parts``, may have another.
    """
    parts, output = _place(module, "output_of_parts"), _place(module, "model_output")
    return parts is not None and output is not None and parts <= output


def _place(module: Any, name: str) -> int | None:
    """Return which class of the method resolution order defines an attribute; None if no class does."""
    return next((place for place, kind in enumerate(type(module).__mro__) if name in vars(kind)), None)


def own_method(module: Any, name: str) -> Callable[..., Any] | None:
    """Return the module's own method of that name; None if it has none or inherits the default of `TRAKMixin`."""
    method = getattr(module, name, None)
    default = getattr(TRAKMixin, name)
    return None if method is None or getattr(method, "__func__", None) is default else method
