"""How fast training is, and how much of its time featurizing may take."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic

from lightning_trak.store.files import free_space
from lightning_trak.store.store import FeatureStore
from lightning_trak.store.weights import tensors_in
from lightning_trak.trainer.featurization import FeaturizationLoop
from lightning_trak.trainer.framework import Trainer
from lightning_trak.trainer.reports import bytes_text, time_text

_TIMED = 5  # training steps after the first, which is slow


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
        more = 0 if own is None else sum(min(loop.size, size) for size in (own.basis_examples, own.examples))
        weights = sum(value.nbytes for value in tensors_in(trainer.lightning_module.state_dict()).values())
        rows = loop.size / trainer.world_size + more
        return cls(loop.size, rows * seconds, loop.size * loop.form.row_bytes + weights, own is not None)

    def text(self, epoch: float, store: FeatureStore) -> str:
        """Say it in a sentence.

        Args:
            epoch: how many seconds an epoch of training takes; infinite if it has no end.
            store: will hold the features.
        """
        beside = f", as long as {self.seconds / epoch:.2g} epochs of training" if 0 < epoch < math.inf else ""
        room = free_space(store.dirpath) // self.bytes
        whitened = " Gradients are whitened by the curvature of each parameter." * self.whitened
        return (
            f"at each checkpoint, featurizing {self.examples} examples takes about"
            f" {time_text(self.seconds)}{beside}, and {bytes_text(self.bytes)} on the disk, which has room for {room}"
            f" checkpoints.{whitened}"
        )


class Pace:
    """Measures training and featurizing, each without the other.

    Args:
        share: featurizing may take this share of the time that training took so far; None for all of it and more.
        expected: how many seconds featurizing at a checkpoint will take.
        clock: returns seconds.

    >>> pace = Pace(0.5, expected=2.0, clock=iter([0.0, 3.0, 4.0]).__next__)
    >>> pace.allows_another(), pace.allows_another()  # after 3 seconds, and after 4
    (False, True)
    """

    def __init__(self, share: float | None, expected: float, clock: Callable[[], float] = monotonic) -> None:
        self._share, self.expected, self._clock = share, expected, clock
        self._began, self._spent = clock(), 0.0
        self._steps, self._since = 0, 0.0

    @property
    def limited(self) -> bool:
        """Whether featurizing has a limit."""
        return self._share is not None

    def allows_another(self) -> bool:
        """Whether featurizing at another checkpoint stays within the share."""
        return self._share is None or self._spent + self.expected <= self._share * self._trained()

    @property
    def spent(self) -> float:
        """Featurizing took this share of the time of training so far."""
        trained = self._trained()
        return self._spent / trained if trained > 0 else 0.0

    @contextmanager
    def featurizing(self) -> Iterator[None]:
        """Measure how long it takes to featurize at a checkpoint; the next will take as long."""
        start = self._clock()
        try:
            yield
        finally:
            self.expected = self._clock() - start
            self._spent += self.expected

    def step_began(self) -> None:
        """Note that a training step begins."""
        if self._steps == 0:
            self._since = self._trained()

    def step_ended(self, per_epoch: float) -> float | None:
        """Note that a training step ended.

        Args:
            per_epoch: the number of steps in an epoch.

        Returns:
            How many seconds an epoch takes, once, when that can be told; else None.
        """
        self._steps += 1
        last = min(_TIMED + 1, per_epoch)
        if self._steps > last:
            return None
        seconds, timed = self._trained() - self._since, max(1, self._steps - 1)
        if self._steps == 1:
            self._since = self._trained()  # the first step is slow
        return seconds / timed * per_epoch if self._steps == last else None

    def _trained(self) -> float:
        """Return how many seconds training took so far."""
        return self._clock() - self._began - self._spent
