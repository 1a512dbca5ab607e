"""Kronecker factors and eigenvalues beside those of kronfluence, entry by entry, where both cover a layer."""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from lightning_trak.curvature import EigenBasis, Eigenvalues, SecondMoments
from lightning_trak.gradients import HooksEngine, ModelFunction
from tests.benchmarks.measuring import print_table
from tests.benchmarks.quality.methods import has_ekfac

N, CLASSES = 60, 4
LAYERS = ("0", "3", "5", "7")  # in the network


class Labelled(nn.Module):
    """Layers of both kinds, and positions; the losses are those of given labels, so that nothing is drawn."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(
            nn.Conv2d(2, 5, 3, stride=2, bias=False), nn.ReLU(), nn.Flatten(2), nn.Linear(9, 6, bias=False), nn.ReLU(),
            nn.Linear(6, 7, bias=False), nn.Flatten(), nn.Linear(35, CLASSES, bias=False),
        )  # fmt: skip

    def model_output(self, batch: Any) -> Tensor:
        """Return the cross-entropies, (b,)."""
        x, y = batch
        return cross_entropy(self.network(x), y, reduction="none")


def run() -> None:
    """Print the table."""
    if not has_ekfac():
        print("\nThe factors were not compared: the package kronfluence is not installed.")
        return
    header = ["layer", "A, inputs", "S, output gradients", "Λ, eigenvalues"]
    note = f"‖ours − theirs‖ / ‖theirs‖ in float32, of {N} examples with given labels, in their eigenbasis."
    print_table("Kronecker factors beside kronfluence's", header, _rows(), note)


def _rows() -> Iterator[list[str]]:
    model = Labelled().eval()
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(N, 2, 8, 8, generator=generator), torch.randint(0, CLASSES, (N,), generator=generator)
    covariances, factors = _theirs(model.network, x, y)
    bases = {
        f"network.{layer}.weight": EigenBasis(
            factors["gradient_eigenvectors"][layer], factors["activation_eigenvectors"][layer]
        )
        for layer in LAYERS
    }
    moments, eigenvalues = _ours(model, (x, y), bases)
    for layer in LAYERS:
        name = f"network.{layer}.weight"
        left, right = moments[name]
        theirs = [
            covariances["activation_covariance"][layer],
            covariances["gradient_covariance"][layer],
            factors["lambda_matrix"][layer] / N,
        ]
        ours = [right, left, eigenvalues[name].view_as(theirs[2])]
        yield [str(model.network[int(layer)]), *map(_apart, ours, theirs)]


def _ours(
    model: Labelled, batch: tuple[Tensor, Tensor], bases: Mapping[str, EigenBasis]
) -> tuple[Mapping[str, tuple[Tensor, Tensor]], Mapping[str, Tensor]]:
    """Return S and A, and Λ in given bases, of each parameter."""
    function, engine = ModelFunction(model, model.state_dict(), list(bases)), HooksEngine()
    moments, eigenvalues = SecondMoments(), Eigenvalues(bases)
    engine.prepare(function, batch, N)
    with moments.batch(N) as sink:
        engine(function, batch, N, sink)
    with eigenvalues.batch(N) as sink:
        engine(function, batch, N, sink)
    return moments._sums, eigenvalues.curvature().eigenvalues


def _theirs(network: nn.Module, x: Tensor, y: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return kronfluence's sums of outer products, and its eigenbases and eigenvalues."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task

    class Classification(Task):
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> Tensor:
            return cross_entropy(model(batch[0]), batch[1], reduction="sum")

        def compute_measurement(self, batch: Any, model: Any) -> Tensor:
            return self.compute_train_loss(batch, model)

    task, arguments = Classification(), FactorArguments(strategy="ekfac", use_empirical_fisher=True)
    with tempfile.TemporaryDirectory() as root, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        analyzer = Analyzer(
            "factors", prepare_model(copy.deepcopy(network), task), task, cpu=True, disable_tqdm=True, output_dir=root,
            log_level=logging.ERROR,
        )  # fmt: skip
        analyzer.fit_all_factors("all", TensorDataset(x, y), per_device_batch_size=20, factor_args=arguments)
        return analyzer.load_covariance_matrices("all"), analyzer.load_all_factors("all")


def _apart(ours: Tensor, theirs: Tensor) -> str:
    return f"{torch.linalg.norm(ours - theirs) / torch.linalg.norm(theirs):.0e}"
