"""Checks on two batches that scores are about the loss that training minimises, in both modes of the module."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.data import DataLoader

from lightning_trak.data.batch import same_tensors, tensors_of
from lightning_trak.gradients import ModelFunction
from lightning_trak.isolation.module_state import ModuleChanged
from lightning_trak.store.weights import copy_of_weights
from lightning_trak.tasks.base import prepared
from lightning_trak.tasks.checks import versions_of
from lightning_trak.tasks.loss_terms import LossTerms
from lightning_trak.trainer.host.attachment import undisturbed
from lightning_trak.trainer.host.framework import LightningModule, Trainer
from lightning_trak.trainer.host.reports import Reports

_CHECKS = 2  # again in epoch 2: at initialisation, labels hardly change the loss
_TOLERANCE = 0.1  # relative; Dropout may draw other numbers
_DRAWS = 4  # evaluations that show how much the loss varies by chance
_CLASSES = 20  # of modules that are tried one by one, at most

# These are meant to differ between the modes: by chance, or by batch statistics.
_KNOWN = (_DropoutNd, _NormBase, nn.RReLU, nn.RNNBase, nn.MultiheadAttention)


class Modes(NamedTuple):
    """The loss of a batch in evaluation mode and in training mode, Dropout and batch statistics off in both.

    Attributes:
        training: in training mode.
        evaluation: in evaluation mode.
        spread: largest minus smallest of several evaluations in training mode; 0 if nothing is random.
        classes: the classes of modules that behave differently in the two modes.
    """

    training: float
    evaluation: float
    spread: float
    classes: list[str]

    @property
    def differ(self) -> bool:
        """Whether the modes differ by more than tolerance and chance."""
        return _differ(self.training, self.evaluation, 3 * self.spread)


class LossCheck:
    """Compares losses of the first batch of the first two epochs, and warns of each kind of difference once.

    The loss that ``training_step`` returns is compared with that of ``model_output`` and ``output_to_loss``. The second
    is computed with training's mode, precision and random state, so that Dropout draws the same numbers. It is computed
    in evaluation mode too, as features are. The module gets copies of its weights and of the batch.
    """

    def __init__(self, reports: Reports) -> None:
        self._reports = reports
        self._left = _CHECKS
        self._batch: Any = None
        self._expected: float | None = None
        self._tensors: list[Tensor] = []
        self._versions: list[int | None] = []

    def before_step(self, trainer: Trainer, module: LightningModule, batch: Any, train_loader: DataLoader[Any]) -> None:
        """Note the batch and its loss, just before ``training_step``; called once an epoch."""
        if not self._left:
            return
        self._left -= 1
        try:
            self._batch = copy.deepcopy(batch)
            self._expected, modes = _losses(trainer, module, self._batch, train_loader)
        except Exception as error:  # features do not depend on it, so training goes on
            if isinstance(error, ModuleChanged) and not error.restored:
                raise
            self._warn(
                "comparison",
                f"The loss of the first batch cannot be compared with that of {type(module).__name__}'s own methods:"
                f" {type(error).__name__}: {str(error).rstrip('.')}. If training augments or combines batches, ignore"
                " this.",
            )
            return
        if modes is not None and modes.differ:
            self._warn("modes", _other_mode(module, modes))

    def watch(self, batch: Any) -> None:
        """Note a batch's tensors and their versions, at every step, before anything else sees the batch."""
        self._tensors = tensors_of(batch)
        self._versions = versions_of(batch)

    def after_step(self, trainer: Trainer, module: LightningModule, batch: Any, outputs: Any) -> None:
        """Compare with the loss that ``training_step`` returned, and with the batch as it is now."""
        (seen, expected), self._batch, self._expected = (self._batch, self._expected), None, None
        if self._has_other_tensors(batch):
            self._warn("batch", _other_batch(module))
        if seen is None:
            return
        if len(tensors_of(seen)) != len(tensors_of(batch)) or not same_tensors(seen, batch):
            self._warn("batch", _other_batch(module))
        elif expected is not None and isinstance(outputs, Mapping) and "loss" in outputs:
            trained = outputs["loss"].item() * trainer.accumulate_grad_batches
            # LBFGS evaluates several losses a step, at new weights.
            several = any(isinstance(one, torch.optim.LBFGS) for one in trainer.optimizers)
            if _differ(trained, expected) and not several:
                self._warn("loss", _other_loss(module, trained, expected))

    def _has_other_tensors(self, batch: Any) -> bool:
        """Tell whether a batch has other tensors than `watch` noted, or other values in them."""
        before, versions, after = self._tensors, self._versions, tensors_of(batch)
        self._tensors, self._versions = [], []
        same = len(before) == len(after) and all(one is other for one, other in zip(before, after, strict=True))
        return not same or versions_of(batch) != versions

    def _warn(self, what: str, message: str) -> None:
        self._reports.warn(message, about=f"the loss: {what}")


def _losses(
    trainer: Trainer, module: LightningModule, batch: Any, train_loader: DataLoader[Any]
) -> tuple[float | None, Modes | None]:
    """Return the loss of a batch as in training, and in both modes; None if the module defines no loss."""
    modes = {part: part.training for part in module.modules()}
    names = [name for name, _ in module.named_parameters()]
    terms = LossTerms(module)
    with undisturbed(trainer, module), torch.no_grad(), trainer.precision_plugin.train_step_context():
        for part, training in modes.items():
            part.training = training

        def loss() -> float | None:
            function = ModelFunction(module, copy_of_weights(module), names, module.device)
            with prepared(module, function.prepare, lambda: train_loader):
                found = function.call(terms.of_batch, copy.deepcopy(batch))
            return None if found is None else found.item()

        trained = loss()
        return trained, None if trained is None else _in_both_modes(module, loss)  # type: ignore[arg-type]


def _in_both_modes(module: nn.Module, loss: Callable[[], float]) -> Modes:
    """Return the loss in both modes, and the classes that cause a difference."""
    parts = [part for part in module.modules() if part.training]
    others = [part for part in parts if not isinstance(part, _KNOWN)]
    with _evaluating(parts):
        evaluation = loss()
    with _evaluating([part for part in parts if isinstance(part, _KNOWN)]):
        training = loss()
        drawn = [training, loss()]
        if drawn[0] != drawn[1]:
            drawn += [loss() for _ in range(_DRAWS - 2)]
        modes = Modes(training, evaluation, max(drawn) - min(drawn), [])
        if modes.differ:
            for kind in list(dict.fromkeys(type(part) for part in others))[:_CLASSES]:
                with _evaluating([part for part in others if type(part) is kind]):
                    if _differ(training, loss(), 3 * modes.spread):
                        modes.classes.append(kind.__name__)
    return modes


@contextmanager
def _evaluating(parts: list[nn.Module]) -> Iterator[None]:
    """Set these modules, without their children, to evaluation mode, and back to training mode."""
    for part in parts:
        part.training = False
    try:
        yield
    finally:
        for part in parts:
            part.training = True


def _differ(one: float, other: float, chance: float = 0.0) -> bool:
    return abs(one - other) > _TOLERANCE * max(abs(one), abs(other)) + 1e-3 + chance


def _other_loss(module: Any, trained: float, expected: float) -> str:
    return (
        f"On the first batch {type(module).__name__}.training_step returned a loss of {trained:.4g}, but"
        f" output_to_loss(model_output(batch), batch), or per_sample_loss(batch), is {expected:.4g} on average. Both"
        " are in training mode. Scores are about the second, so define it as the loss that training minimises. If that"
        " is not a mean over the batch, define reduce_losses too. Ignore this if training_step augments the batch, or"
        " adds something that is no loss of an example."
    )


def _other_mode(module: Any, modes: Modes) -> str:
    which = " and ".join(modes.classes) or f"{type(module).__name__} or a part of it"
    return (
        f"In evaluation mode the loss of {type(module).__name__}'s own methods on the first batch is"
        f" {modes.evaluation:.4g}, in training mode {modes.training:.4g}, without Dropout and batch statistics."
        f" {which} computes something else in evaluation mode. Features are computed in evaluation mode, so scores are"
        " about a loss that training does not minimise. Let model_output return what training sees, e.g. undo the"
        " scaling of predictions there."
    )


def _other_batch(module: Any) -> str:
    return (
        "A batch was changed between the loader and the end of training_step, by on_train_batch_start of a"
        f" callback or of {type(module).__name__}, or in training_step itself. Features are those of the unchanged"
        " examples. If the change is augmentation, ignore this. Otherwise make it in the dataset, the collate function"
        " or on_after_batch_transfer, which featurization uses too."
    )
