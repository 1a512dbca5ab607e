"""A case: a task, what its faults are, and how its loss and embeddings are computed without this package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.benchmarks.quality.tasks import Task
from tests.benchmarks.suspects.planting import Faults, Fields


@dataclass
class Evaluated:
    """What a module says of n examples.

    Attributes:
        losses: (n,).
        embedded: what the last layer gets, (n, d).
        predictions: logits of classes, (n, classes, ...), where there are classes.
    """

    losses: Tensor
    embedded: Tensor
    predictions: Tensor | None = None


def evaluate(module: Any, fields: Fields) -> Evaluated:
    """Evaluate a module that has a loss of predictions and labels."""
    x, y = fields
    embedded, predictions = last_inputs(module, lambda: module(x))
    return Evaluated(module.loss(predictions, y), embedded, predictions)


def last_inputs(module: nn.Module, run: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """Return what the last layer gets, (n, d), averaged over words or pixels, and what is computed.

    Of a layer that runs several times, the inputs are put side by side.
    """
    inputs: list[Tensor] = []
    last = [layer for layer in module.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))][-1]
    hook = last.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    result = run()
    hook.remove()
    of_pixels, of_words = (2, 3), (1,)
    averaged = {4: of_pixels, 3: of_words}
    return torch.cat([one.mean(averaged[one.ndim]) if one.ndim in averaged else one for one in inputs], 1), result


@dataclass(frozen=True)
class Case:
    """A task with planted faults.

    Attributes:
        task: has right labels.
        faults: what is planted.
        evaluate: computes losses and embeddings: ``evaluate(module, fields)``.
        n_inputs: the first so many fields of an example are inputs; copies are told by them.
        has_classes: whether the labels are classes, as `cleanlab` needs them.
        memorised: whether wrong labels have a low loss at the end of training.
    """

    task: Task
    faults: Faults
    evaluate: Callable[[Any, Fields], Evaluated] = evaluate
    n_inputs: int = 1
    has_classes: bool = False
    memorised: bool = False

    @property
    def name(self) -> str:
        """In tables."""
        return self.task.name + (", memorised" if self.memorised else "")

    def raw(self, fields: Fields) -> Tensor:
        """Return the inputs of n examples as they are, (n, d)."""
        return torch.cat([field.flatten(1).float() for field in fields[: self.n_inputs]], 1)
