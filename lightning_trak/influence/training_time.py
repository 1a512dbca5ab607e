"""How long training went on, in units of gradient flow: like weight decay, this regularizes a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

CHECKPOINT_KEY = "lightning_trak"  # where `TRAKCallback` stores its part of a Lightning checkpoint

# A state dict holds the options of an optimizer, but not its name. These are SGD's, and those that schedulers add.
_OPTIONS = {"lr", "momentum", "dampening", "weight_decay", "nesterov"}
_MORE_OPTIONS = {"maximize", "foreach", "differentiable", "fused", "initial_lr", "params", "param_names"}


@dataclass(frozen=True)
class TrainingTime:
    """How long SGD followed the gradient of the mean loss.

    A step of SGD goes as far as gradient flow in the time η (1 − d) / (1 − μ), with learning rate η, momentum μ and
    dampening d.

    Attributes:
        time: t, the sum over the optimizer's steps.
        steps: the number of steps.
        weight_decay: that of the optimizer; parameter groups without weight decay are ignored.
    """

    time: float = 0.0
    steps: int = 0
    weight_decay: float = 0.0

    def after_step(self, optimizer: torch.optim.Optimizer) -> TrainingTime | None:
        """Return the training time after one more step of the optimizer; None if that is not SGD.

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
        """Return the training time of a Lightning checkpoint; None where it is unknown.

        It is what `TRAKCallback` stored there; else it is computed from learning rate and step. It is unknown for plain
        weights, for an optimizer other than SGD, for several optimizers, and where the learning rate was scheduled and
        the callback did not run.

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
    """Return the time that some steps take; None if it differs between groups: then no single time fits the model."""
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
