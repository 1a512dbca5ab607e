"""How long training went on, in the time of gradient flow: what regularizes a model beside its weight decay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

_OF_SGD = {"momentum", "dampening", "nesterov"}  # options that a state dict keeps; nothing in it names the optimizer
_OF_OTHERS = {"betas", "eps"}


@dataclass(frozen=True)
class TrainingTime:
    """For how long SGD followed the gradient of the mean loss.

    A step of SGD with learning rate η and momentum μ goes as far as gradient flow in the time η / (1 − μ).

    Attributes:
        time: t = Σ η / (1 − μ) over the optimizer's steps.
        weight_decay: of the optimizer; the largest, where groups of parameters differ.
    """

    time: float = 0.0
    weight_decay: float = 0.0

    def after_step(self, param_groups: Iterable[Mapping[str, Any]]) -> TrainingTime | None:
        """Return what it is after one more step of the optimizer; None if that is not SGD.

        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9, weight_decay=0.01)
        >>> TrainingTime().after_step(optimizer.param_groups)
        TrainingTime(time=1.0, weight_decay=0.01)
        >>> TrainingTime().after_step(torch.optim.Adam([torch.zeros(1)]).param_groups) is None
        True
        """
        one = _one_step(param_groups)
        return None if one is None else replace(one, time=self.time + one.time)

    @staticmethod
    def of_checkpoint(checkpoint: Mapping[str, Any]) -> TrainingTime | None:
        """Return that of a Lightning checkpoint: what `TRAKCallback` put there, else reckoned from rate and step.

        None where it cannot be known: for mere weights, other optimizers than SGD, several of them, or where the
        learning rate was scheduled and the callback did not watch.
        """
        for key, state in checkpoint.get("callbacks", {}).items():
            if key.startswith("TRAKCallback"):
                return TrainingTime(**state["training_time"]) if state.get("training_time") else None
        optimizers, step = checkpoint.get("optimizer_states", []), checkpoint.get("global_step", 0)
        if len(optimizers) != 1 or checkpoint.get("lr_schedulers"):
            return None
        one = _one_step(optimizers[0].get("param_groups", []))
        return None if one is None else replace(one, time=step * one.time)


def _one_step(param_groups: Iterable[Mapping[str, Any]]) -> TrainingTime | None:
    """Return the time that one step takes; None if groups differ in it, as then no one time is that of the model."""
    groups = list(param_groups)
    if not all(set(group) >= _OF_SGD and not _OF_OTHERS & set(group) for group in groups):
        return None
    times = {float(group["lr"]) * (1 - group["dampening"]) / (1 - group["momentum"]) for group in groups}
    decays = [float(group["weight_decay"]) for group in groups]
    return TrainingTime(times.pop(), max(decays)) if len(times) == 1 else None
