"""How long training went on, in the time of gradient flow: what regularizes a model beside its weight decay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

CHECKPOINT_KEY = "lightning_trak"  # under which `TRAKCallback` adds to Lightning's checkpoints

# A state dict has the options of an optimizer, but not its name: these are SGD's, and those that schedulers add.
_OPTIONS = {"lr", "momentum", "dampening", "weight_decay", "nesterov"}
_MORE_OPTIONS = {"maximize", "foreach", "differentiable", "fused", "initial_lr", "params", "param_names"}


@dataclass(frozen=True)
class TrainingTime:
    """For how long SGD followed the gradient of the mean loss.

    A step of SGD with learning rate η, momentum μ and dampening d goes as far as gradient flow in η (1 − d) / (1 − μ).

    Attributes:
        time: t, the sum over the optimizer's steps.
        steps: how many there were.
        weight_decay: of the optimizer; groups of parameters without it do not count.
    """

    time: float = 0.0
    steps: int = 0
    weight_decay: float = 0.0

    def after_step(self, optimizer: torch.optim.Optimizer) -> TrainingTime | None:
        """Return what it is after one more step of the optimizer; None if that is not SGD.

        >>> weight = torch.zeros(1, requires_grad=True)
        >>> weight.grad = torch.ones(1)
        >>> optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.5, weight_decay=0.01)
        >>> TrainingTime().after_step(optimizer)
        TrainingTime(time=0.2, steps=1, weight_decay=0.01)
        >>> TrainingTime().after_step(torch.optim.Adam([weight])) is None
        True
        """
        one = _of_steps(optimizer.param_groups, 1) if type(optimizer) is torch.optim.SGD else None
        if one is None:
            return None
        still = all(value.grad is None for group in optimizer.param_groups for value in group["params"])
        return TrainingTime(self.time + (0 if still else one.time), self.steps + 1, one.weight_decay)

    @staticmethod
    def of_checkpoint(checkpoint: Mapping[str, Any]) -> TrainingTime | None:
        """Return that of a Lightning checkpoint: what `TRAKCallback` put there, else reckoned from rate and step.

        None where it cannot be known: for mere weights, other optimizers than SGD, several of them, or where the
        learning rate was scheduled and the callback did not watch.

        >>> TrainingTime.of_checkpoint({"state_dict": {}}) is None
        True
        """
        if CHECKPOINT_KEY in checkpoint:
            watched = checkpoint[CHECKPOINT_KEY].get("training_time")
            return TrainingTime(**watched) if watched else None
        optimizers = checkpoint.get("optimizer_states", [])
        if len(optimizers) != 1 or checkpoint.get("lr_schedulers"):
            return None
        return _of_steps(optimizers[0].get("param_groups", []), checkpoint.get("global_step", 0))


def _of_steps(param_groups: Iterable[Mapping[str, Any]], steps: int) -> TrainingTime | None:
    """Return the time that some steps take; None if groups differ in it, as then no one time is that of the model."""
    groups = list(param_groups)
    if not groups or any(not _OPTIONS <= set(group) <= _OPTIONS | _MORE_OPTIONS for group in groups):
        return None
    if any(group.get("maximize") or not 0 <= group["momentum"] < 1 for group in groups):
        return None
    times = {float(group["lr"]) * (1 - group["dampening"]) / (1 - group["momentum"]) for group in groups}
    decays = {float(group["weight_decay"]) for group in groups} - {0.0}
    if len(times) > 1 or len(decays) > 1:
        return None
    return TrainingTime(steps * times.pop(), steps, max(decays, default=0.0))
