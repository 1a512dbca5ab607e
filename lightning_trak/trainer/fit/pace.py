"""How fast training is, and how much of its time featurizing may take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic

import torch

from lightning_trak.gradients.memory import is_out_of_memory
from lightning_trak.results.terminal import size_text
from lightning_trak.store.files import free_space
from lightning_trak.store.store import FeatureStore
from lightning_trak.store.weights import Weights, tensors_in
from lightning_trak.trainer.featurizing.curvature import trial_curvature, trial_whitening
from lightning_trak.trainer.featurizing.featurization import FeaturizationLoop
from lightning_trak.trainer.host.framework import Trainer
from lightning_trak.trainer.host.reports import time_text

_TIMED = 3  # training steps after the first, which is slow


def synchronize(device: torch.device) -> None:
    """Return when a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measured_seconds(loop: FeaturizationLoop, load: Callable[[], Weights]) -> float | None:
    """Return how many seconds an example takes in the first batch; None, with a warning, if that fails.

    Gradients are whitened as they will be, by the curvature of a few examples. The module may change the weights.
    """
    own = loop.preconditioner
    try:
        whitening = None if own is None else trial_whitening(loop, own, trial_curvature(loop, own, load(), ""))
        return loop.measured(load(), "", whitening).seconds
    except (ValueError, RuntimeError) as error:
        if not is_out_of_memory(error):  # batches are halved when they are featurized
            what = f"The first batch cannot be featurized now; it is tried again at the first checkpoint: {error}"
            loop.reader.reports.warn(what, about="the first batch")
        return None


@dataclass(frozen=True)
class Coming:
    """What featurizing the train set at a checkpoint will take.

    Attributes:
        examples: their number.
        seconds: about.
        bytes: on the disk, with the weights.
        whitened: whether gradients are.
    """

    examples: int
    seconds: float
    bytes: int
    whitened: bool

    @classmethod
    def of(cls, loop: FeaturizationLoop, trainer: Trainer, seconds: float) -> Coming:
        """Return it from the seconds that an example takes; estimating the curvature takes some examples more."""
        own = loop.preconditioner
        more = 0 if own is None else sum(min(loop.reader.size, size) for size in (own.basis_examples, own.examples))
        weights = sum(value.nbytes for value in tensors_in(trainer.lightning_module.state_dict()).values())
        rows = loop.reader.size / trainer.world_size + more
        return cls(loop.reader.size, rows * seconds, loop.reader.size * loop.form.row_bytes + weights, own is not None)

    def text(self, store: FeatureStore) -> str:
        """Say it in a sentence, with the room in the store that will hold the features."""
        room = free_space(store.dirpath) // self.bytes
        whitened = " Gradients are whitened by the curvature of each parameter." * self.whitened
        return (
            f"at each checkpoint, featurizing {self.examples} examples takes about"
            f" {time_text(self.seconds)}, and {size_text(self.bytes)} on the disk, which has room for {room}"
            f" checkpoints.{whitened}"
        )

    def beside(self, epoch: float) -> str:
        """Compare it with an epoch of training, which takes so many seconds."""
        return f"featurizing at a checkpoint takes as long as {self.seconds / epoch:.2g} epochs of training."


class Pace:
    """Measures training and featurizing, each without the other.

    Args:
        share: featurizing may take this share of the time that training took so far; None: no limit.
        expected: how many seconds featurizing at a checkpoint will take.
        wait: returns when the device has done what it was given.
        clock: returns seconds.

    >>> pace = Pace(0.5, expected=2.0, clock=iter([0.0, 3.0, 4.0]).__next__)
    >>> pace.allows_another(), pace.allows_another()  # after 3 seconds, and after 4
    (False, True)
    """

    def __init__(
        self,
        share: float | None,
        expected: float,
        wait: Callable[[], object] = lambda: None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.share, self.expected, self._wait, self._clock = share, expected, wait, clock
        self.limited = share is not None
        self._began, self._spent = clock(), 0.0
        self._steps, self._since = 0, 0.0

    def allows_another(self) -> bool:
        """Whether featurizing at another checkpoint stays within the share."""
        return self.share is None or self._spent + self.expected <= self.share * self._trained()

    @property
    def spent(self) -> float:
        """Featurizing took this share of the time of training so far."""
        trained = self._trained()
        return self._spent / trained if trained > 0 else 0.0

    @contextmanager
    def featurizing(self) -> Iterator[None]:
        """Count the time as one of featurizing."""
        self._wait()
        start = self._clock()
        try:
            yield
        finally:
            self._spent += self._clock() - start

    def took(self, seconds: float) -> None:
        """Note how long a checkpoint took, of which nothing was there before."""
        self.expected = seconds

    def step_began(self) -> None:
        """Note that a training step begins."""
        if self._steps == 0:
            self._wait()
            self._since = self._trained()

    def step_ended(self, per_epoch: float) -> float | None:
        """Note that a training step ended; an epoch has ``per_epoch`` steps.

        Returns:
            How many seconds an epoch takes, once, when that can be told; else None.
        """
        self._steps += 1
        last = min(_TIMED + 1, per_epoch)
        if self._steps not in (1, last):
            return None
        self._wait()
        seconds, timed = self._trained() - self._since, max(1, self._steps - 1)
        if self._steps == 1:
            self._since = self._trained()  # the first step is slow
        return seconds / timed * per_epoch if self._steps == last else None

    def _trained(self) -> float:
        """Return how many seconds training took so far."""
        return self._clock() - self._began - self._spent
