"""On a CUDA GPU: the quickstart's whole job, and dense projection against the bfloat16 GEMM rate."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from lightning_trak.projection import RademacherProjector
from tests.benchmarks.measuring import attribute, plain_pass, print_table, seconds
from tests.benchmarks.models import MODELS

N_TRAIN, N_TARGETS, CHECKPOINTS, PROJ_DIM = 10_000, 2_000, 20, 2048


def run() -> None:
    """Print the table, or that there is nothing to run it on."""
    if not torch.cuda.is_available():
        print("\n### GPU\n\nNot run: torch finds no CUDA device.")
        return
    header = ["what", "ratio", "seconds"]
    print_table(f"GPU: {torch.cuda.get_device_name()}", header, (*quickstart("cuda"), *_dense()))


def quickstart(
    device: str, checkpoints: int = CHECKPOINTS, n_train: int = N_TRAIN, n_targets: int = N_TARGETS
) -> Iterator[list[str]]:
    """ResNet-9, 20 checkpoints, 10 000 training pictures, 2 000 targets: featurized and scored."""
    model = MODELS["resnet9"]
    module, train, targets = model.build(), model.drawn_loader(n_train), model.drawn_loader(n_targets)
    options = {"accelerator": device, "proj_dim": PROJ_DIM}
    with tempfile.TemporaryDirectory() as root:
        paths = [Path(root) / f"{number}.pt" for number in range(checkpoints)]
        for path in paths:
            weights = {name: value * 1.001 if value.is_floating_point() else value for name, value in _weights(module)}
            module.load_state_dict(weights)
            torch.save(weights, path)
        whole = seconds(lambda: attribute(module, train, targets, root, paths, **options))
        yield [f"quickstart: {checkpoints} checkpoints, {n_train} + {n_targets} pictures", "–", f"{whole:.1f}"]
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / "weights.pt"
        torch.save(module.state_dict(), path)
        ours = seconds(lambda: attribute(module, train, targets, root, path, **options))
    module.to(device)

    def plain() -> None:
        for loader in (train, targets):
            plain_pass(module, ([part.to(device) for part in batch] for batch in loader))

    plain()
    yield ["one checkpoint, against plain forward + backward", f"{ours / seconds(plain):.2f}", f"{ours:.1f}"]


def _weights(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return list(module.state_dict().items())


def _dense() -> Iterator[list[str]]:
    """Dense projection of 128 gradients of a million entries, against a GEMM of the same shape."""
    gradients = torch.randn(128, 2**20, device="cuda")
    features = torch.zeros(128, PROJ_DIM, device="cuda")
    projector = RademacherProjector(PROJ_DIM)
    matrix = torch.randn(2**20, PROJ_DIM, device="cuda", dtype=torch.bfloat16)
    half = gradients.bfloat16()

    def ours() -> None:
        projector.add_(features, gradients, start=0, key=0)

    def gemm() -> None:
        torch.mm(half, matrix)

    ours(), gemm()
    times = [min(seconds(run) for _ in range(5)) for run in (ours, gemm)]
    yield ["dense projection against a bfloat16 GEMM", f"{times[0] / times[1]:.2f}", f"{times[0]:.4f}"]
