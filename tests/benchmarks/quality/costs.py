"""What methods store of a training example, and how often they go through the train set."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Subset

from lightning_trak import TRAKCallback
from lightning_trak.store.store import FeatureStore
from tests.benchmarks.measuring import trainer
from tests.benchmarks.quality import methods
from tests.benchmarks.quality.every_task import TASKS

FEW = 100  # training examples for EK-FAC: how often it goes through them does not depend on their number


@dataclass(frozen=True)
class Passes:
    """Passes over the train set for one checkpoint."""

    forward: float
    backward: float

    def __str__(self) -> str:
        return f"{self.forward:.2f} / {self.backward:.2f}"


# Read from its source: vmap(grad(model output)) is one pass of both kinds, the gradient of the loss a forward pass.
TRAKER = Passes(2, 1)


def ours(key: str, file: Path) -> tuple[float, Passes]:
    """Return the bytes of an example's features on disk, and the passes, of an attribution with the defaults."""
    data, module = TASKS[key].data(), TASKS[key].make_module()
    n = len(data.train_set)
    with tempfile.TemporaryDirectory() as root, counted(module.network) as count:
        own = trainer(root, TRAKCallback(f"{root}/trak"), accelerator="cpu")
        own.attribute(module, datamodule=data, ckpt_path=file)
        (entry,) = FeatureStore(f"{root}/trak")
        features = entry.features
        arrays = features.values() if isinstance(features, Mapping) else [features]
        stored = sum(array.nbytes for array in arrays) / n
    return stored, count.over(n, n_targets=len(data.targets))


def ekfac(key: str, file: Path) -> Passes:
    """Return the passes of EK-FAC."""
    data, module = TASKS[key].data(), methods.loaded(key, file)
    with counted(module.network) as count:
        methods.ekfac_scores(module, Subset(data.train_set, range(FEW)), data.targets)
    return count.over(FEW, n_targets=len(data.targets))


@dataclass
class Count:
    """How many examples went through a network.

    It has a lock, since attribution restores all that a module holds, except for objects that threads share.
    """

    forward: int = 0
    backward: int = 0
    lock: Any = field(default_factory=Lock, repr=False, compare=False)

    def over(self, n: int, n_targets: int) -> Passes:
        """Return passes over n examples, without the one over the targets."""
        return Passes((self.forward - n_targets) / n, (self.backward - n_targets) / n)


@contextmanager
def counted(network: nn.Module) -> Iterator[Count]:
    """Count the examples that go through a network; not those of ``vmap``, of which it sees one."""
    count = Count()

    def add_backward(grad: Tensor) -> None:
        with count.lock:
            count.backward += len(grad)

    def add_forward(network: nn.Module, inputs: Any, output: Tensor) -> None:
        with count.lock:
            count.forward += len(output)
        if output.requires_grad:
            output.register_hook(add_backward)

    hook = network.register_forward_hook(add_forward)
    try:
        yield count
    finally:
        hook.remove()
