"""What every method says of each example of a train set with planted faults."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_trak import Suspects, TRAKCallback
from lightning_trak.influence import nearest
from tests.benchmarks.measuring import trainer
from tests.benchmarks.suspects.cases import Case, Evaluated
from tests.benchmarks.suspects.planting import Planted


@dataclass
class Found:
    """What was measured of a case.

    Attributes:
        suspects: of `trainer.suspects`.
        rankings: how suspicious each label is, (n,), by method.
        copies: the cosine with the nearest earlier example, (n,), by method.
        leaks: the cosine with the nearest target, (n,), by method.
    """

    suspects: Suspects
    rankings: dict[str, Tensor]
    copies: dict[str, Tensor]
    leaks: dict[str, Tensor]


def find(case: Case, planted: Planted, seed: int, root: str, epochs: int | None = None) -> Found:
    """Train on a train set, and look for its faults by every method."""
    L.seed_everything(seed, verbose=False)
    module, data, epochs = case.task.make_module(), planted.data, epochs or case.task.epochs
    saving = ModelCheckpoint(f"{root}/files", save_top_k=-1, save_weights_only=True, filename="{epoch}")
    trak = TRAKCallback(f"{root}/trak", proj_dim=512)
    own = trainer(root, saving, trak, accelerator="cpu", max_epochs=epochs)
    own.fit(module, datamodule=data)
    suspects = own.suspects(targets=True)
    losses = []
    for epoch in range(epochs):
        module.load_state_dict(torch.load(f"{root}/files/epoch={epoch}.ckpt", weights_only=True)["state_dict"])
        losses.append(_evaluated(case, module, data.train_set).losses)
    rankings = {
        "suspects": suspects.findings.loss,
        "loss, last": losses[-1],
        "loss, mean": torch.stack(losses).mean(0),
        "self-influence": suspects.findings.self_influence,
    }
    train, targets = (_evaluated(case, module, one) for one in (data.train_set, data.targets))
    if case.has_classes and find_spec("cleanlab"):
        rankings["cleanlab"] = _cleanlab(data.train_set.tensors[1], train.predictions)
    copies, leaks = {"suspects": suspects.findings.similarity}, {"suspects": suspects.findings.leak_similarity}
    raw = [case.raw(one.tensors) for one in (data.train_set, data.targets)]
    for name, both in (("embeddings", [train.embedded, targets.embedded]), ("raw inputs", raw)):
        rows, others = (nn.functional.normalize(one - both[0].mean(0)) for one in both)
        copies[name], leaks[name] = nearest(rows)[1], nearest(rows, others)[1]
    return Found(suspects, rankings, copies, leaks)


@torch.no_grad()
def _evaluated(case: Case, module: Any, examples: TensorDataset) -> Evaluated:
    return case.evaluate(module.eval(), examples.tensors)


def _cleanlab(classes: Tensor, predictions: Tensor) -> Tensor:
    """Return how suspicious the classes of examples are, (n,), or those of all pixels of an image."""
    from cleanlab.rank import get_label_quality_scores
    from cleanlab.segmentation.rank import get_label_quality_scores as of_pixels

    labels, probabilities = classes.numpy(), predictions.softmax(1).numpy()
    if labels.ndim == 1:
        return -torch.tensor(get_label_quality_scores(labels, probabilities))
    return -torch.tensor(of_pixels(labels, probabilities, verbose=False)[0])
