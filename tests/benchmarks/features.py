"""Features and scores per second: the whole call of ``trainer.attribute`` against a plain forward and backward pass."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_trak import ContrastiveMixin
from tests.benchmarks.measuring import attribute, plain_pass, print_table, seconds
from tests.benchmarks.models import MODELS, Model

PROJ_DIM = 2048


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        model: its key among `MODELS`.
        gradients: as for `TRAKCallback`.
        projector: as for `TRAKCallback`.
        n_train: examples featurized.
        n_targets: examples scored.
        traker: whether the reference implementation is measured, on one batch.
        preconditioner: as for `TRAKCallback`.
    """

    model: str
    gradients: str = "auto"
    projector: str = "auto"
    n_train: int = 256
    n_targets: int = 32
    traker: bool = False
    preconditioner: str = "auto"

    @property
    def name(self) -> str:
        """In the table."""
        return MODELS[self.model].name + (", not whitened" if self.preconditioner == "none" else "")


CASES = (
    Case("digits", n_train=16384, n_targets=1024),
    Case("digits", n_train=16384, n_targets=1024, traker=True, preconditioner="none"),
    Case("digits", projector="sparse", n_train=16384, n_targets=1024),
    Case("digits", projector="rademacher", n_train=4096, n_targets=256),
    Case("digits", "vmap", "sparse", n_train=16384, n_targets=1024),
    Case("digits", "loop", "sparse", n_train=4096, n_targets=256),
    Case("resnet9", n_train=1024, n_targets=128),
    Case("resnet9", n_train=1024, n_targets=128, traker=True, preconditioner="none"),
    Case("resnet9", n_train=512, n_targets=64, preconditioner="none"),
    Case("resnet9", projector="sparse", n_train=1024, n_targets=128),
    Case("resnet9", projector="rademacher", n_train=384, n_targets=32),
    Case("resnet9", "vmap", "sparse"),
    Case("resnet9", "loop", "sparse"),
    Case("vit"),
    Case("vit", projector="sparse", n_train=64),
    Case("bert"),
    Case("bert", projector="sparse", n_train=64, n_targets=16),
    Case("bert_lora"),
    Case("gpt2", n_train=192, preconditioner="none"),
    Case("gpt2", projector="sparse", n_train=64, n_targets=16),
)


def run(cases: tuple[Case, ...] = CASES) -> None:
    """Print the table."""
    header = ["model", "gradients", "projector", "× plain forward + backward", "× traker", "examples/s", "n + m"]
    print_table(f"trainer.attribute, CPU, k = {PROJ_DIM}", header, _rows(cases), "Batches are those of the plain pass.")


def _rows(cases: tuple[Case, ...]) -> Iterator[list[str]]:
    theirs: dict[str, float] = {}
    for case in cases:
        model = MODELS[case.model]
        if case.traker:
            theirs[case.model] = traker_seconds(model) / model.batch_size
        plain, ours = measure(case)
        n = case.n_train + case.n_targets
        ratio = f"{theirs[case.model] * n / ours:.0f}" if case.model in theirs else "–"
        names = [case.name, case.gradients, case.projector]
        yield [*names, f"{ours / plain:.2f}", ratio, f"{n / ours:.1f}", f"{case.n_train} + {case.n_targets}"]


def measure(case: Case) -> tuple[float, float]:
    """Return the seconds of the plain pass and of the whole call over the same examples, one after the other."""
    model = MODELS[case.model]
    module, train, targets = model.build(), model.loader(case.n_train), model.loader(case.n_targets)
    with tempfile.TemporaryDirectory() as root:
        checkpoint = Path(root) / "weights.pt"
        torch.save(module.state_dict(), checkpoint)

        def plain() -> None:
            plain_pass(module, train)
            plain_pass(module, targets)

        def ours() -> None:
            options: dict[str, Any] = {"gradients": case.gradients, "projector": case.projector, "proj_dim": PROJ_DIM}
            options["preconditioner"] = case.preconditioner
            attribute(module, train, targets, root, checkpoint, **options)

        if isinstance(module, ContrastiveMixin):
            module.prepare_checkpoint()
        plain_pass(module, model.loader(model.batch_size))  # the first pass of a process is slow
        halves = [seconds(plain)]
        measured = seconds(ours)
        if halves[0] < 60:
            halves.append(seconds(plain))  # before and after: machines change their speed
        return sum(halves) / len(halves), measured


def traker_seconds(model: Model) -> float:
    """Return the seconds that the reference implementation takes to featurize one batch on the CPU."""
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as root:
        warnings.simplefilter("ignore")
        from trak import TRAKer
        from trak.projectors import BasicProjector, ProjectionType

        module = model.build()
        dimension = sum(parameter.numel() for parameter in module.parameters())
        projector = BasicProjector(
            grad_dim=dimension, proj_dim=PROJ_DIM, seed=0, proj_type=ProjectionType.rademacher, device="cpu"
        )
        traker = TRAKer(
            model=module.network, task="image_classification", train_set_size=model.batch_size, save_dir=root,
            device="cpu", projector=projector, proj_dim=PROJ_DIM, use_half_precision=False, logging_level=40,
        )  # fmt: skip
        traker.load_checkpoint(module.network.state_dict(), model_id=0)
        batch = next(iter(model.loader(model.batch_size)))
        return seconds(lambda: traker.featurize(batch=batch, num_samples=model.batch_size))
