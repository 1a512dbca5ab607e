"""The methods that are compared: each turns checkpoint files into scores, (n, m)."""

from __future__ import annotations

import hashlib
import inspect
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_trak import LanguageModelingMixin, MultilabelMixin, RegressionMixin, TRAKCallback, log_odds
from tests.benchmarks.measuring import trainer
from tests.benchmarks.quality.every_task import TASKS

FEW = 10
TRAKER_DIM = 2048  # its default
LAMBDAS = tuple(10.0**power for power in range(-3, 5))


def ours(key: str, files: Sequence[Path], **options: Any) -> Tensor:
    """Attribute with `TRAKCallback(**options)`, in a new store."""
    task = TASKS[key]
    with tempfile.TemporaryDirectory() as root:
        own = trainer(root, TRAKCallback(f"{root}/trak", **options), accelerator="cpu")
        return own.attribute(task.make_module(), datamodule=task.data(), ckpt_path=list(files)).scores


def paper(key: str, files: Sequence[Path]) -> Tensor:
    """Attribute with the estimator of the TRAK paper, and half as many features as there are training examples."""
    return ours(key, files, estimator="trak", proj_dim=fewer_features(key))


def fewer_features(key: str) -> int:
    """Return at most n / 2 features, a power of two: without damping more than n make no sense."""
    n = len(TASKS[key].data().train_set)
    return 2 ** ((n // 2).bit_length() - 1)


def traker(key: str, files: Sequence[Path]) -> Tensor:
    """Attribute with the reference implementation and its defaults: k = 2048, λ = 0."""
    return _traker_scores(key, files, TRAKER_DIM, [0.0])[0]


def traker_tuned(key: str, files: Sequence[Path]) -> list[Tensor]:
    """Attribute with the reference implementation at every λ of `LAMBDAS`; the best is to be picked afterwards.

    With k < n; for few checkpoints, where it does not take hours, with its default of k = 2048 too.
    """
    tuned = _traker_scores(key, files, fewer_features(key), LAMBDAS)
    return tuned if len(files) > FEW else tuned + _traker_scores(key, files, TRAKER_DIM, LAMBDAS)


def ekfac(key: str, files: Sequence[Path]) -> Tensor:
    """Attribute with kronfluence's EK-FAC, with its heuristic damping; averaged over checkpoints."""
    scores: list[Tensor] = [_kept(file, "ekfac", partial(_ekfac, key, file)) for file in files]
    return torch.stack(scores).mean(0)


def cost(files: Sequence[Path], kind: str) -> float:
    """Return the seconds that the methods whose results are kept spent on some checkpoints."""
    return sum(torch.load(_place(file, kind), weights_only=True)["seconds"] for file in files)


def has_ekfac() -> bool:
    """Say whether kronfluence is installed."""
    return find_spec("kronfluence") is not None


def _kept(file: Path, kind: str, compute: Callable[[], Any]) -> Any:
    """Compute something for a checkpoint, unless it is kept beside it from another cell of the table."""
    path = _place(file, kind)
    if not path.exists():
        start, partial = time.perf_counter(), path.with_name(f"{path.name}.partial")
        result = compute()
        torch.save({"result": result, "seconds": time.perf_counter() - start}, partial)
        partial.replace(path)
    return torch.load(path, weights_only=True)["result"]


def _place(file: Path, kind: str) -> Path:
    """Return where a result is kept: beside the checkpoint, and named for the code that it comes from."""
    parts = (
        (ekfac_scores, _influence, _sampled, linear_layers) if kind == "ekfac" else (_traker_features, Wrapped, _output)
    )
    code = hashlib.sha256("".join(inspect.getsource(part) for part in parts).encode())
    return file.with_suffix(f".{kind}-{code.hexdigest()[:8]}")


def _traker_scores(key: str, files: Sequence[Path], proj_dim: int, lambdas: Sequence[float]) -> list[Tensor]:
    """Combine what the reference implementation computes of each checkpoint as its ``finalize_scores`` does."""
    from trak.score_computers import BasicScoreComputer

    computer = BasicScoreComputer(torch.float32, torch.device("cpu"), logging_level=logging.ERROR)
    totals, loss_grads = [torch.zeros(())] * len(lambdas), torch.zeros(())
    for file in files:
        features = partial(_traker_features, key, file, proj_dim)
        train, targets, loss_grad = _kept(file, f"traker{proj_dim}", features)
        kernel = computer.get_xtx(train)
        for number, computer.lambda_reg in enumerate(lambdas):
            totals[number] = totals[number] + computer.get_x_xtx_inv(train, kernel) @ targets.T
        loss_grads = loss_grads + loss_grad
    return [total * loss_grads / len(files) ** 2 for total in totals]


def _traker_features(key: str, file: Path, proj_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Featurize train set and targets at one checkpoint with the reference implementation."""
    from trak import TRAKer
    from trak.projectors import BasicProjector, ProjectionType

    task, data = TASKS[key], TASKS[key].data()
    module = Wrapped(loaded(key, file)).eval()
    dimension = sum(parameter.numel() for parameter in module.parameters())
    model_id = int(hashlib.sha256(file.read_bytes()).hexdigest()[:6], 16)  # chooses the projection
    with tempfile.TemporaryDirectory() as root, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        projector = BasicProjector(dimension, proj_dim, 0, ProjectionType.rademacher, torch.device("cpu"))
        own = TRAKer(
            module, _output(task.make_module()), len(data.train_set), save_dir=root, device="cpu", projector=projector,
            proj_dim=proj_dim, use_half_precision=False, logging_level=logging.ERROR,
        )  # fmt: skip
        own.load_checkpoint(module.state_dict(), model_id=model_id)
        own.featurize(data.train_set.tensors, num_samples=len(data.train_set))
        own.saver.model_ids[model_id]["is_finalized"] = 1  # it is finished by hand, for every λ
        own.start_scoring_checkpoint("targets", module.state_dict(), model_id, len(data.targets))
        own.score(data.targets.tensors, num_samples=len(data.targets))
        store = own.saver.current_store
        return tuple(torch.tensor(store[name][:]) for name in ("grads", "targets_grads", "out_to_loss"))


class Wrapped(nn.Module):
    """Gives a LightningModule the ``forward`` that the reference implementation calls: its model output."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.module.model_output((x, y))


def _output(module: Any) -> Any:
    """Return the task in the form of the reference implementation."""
    from trak.modelout_functions import AbstractModelOutput

    class Output(AbstractModelOutput):
        def __init__(self) -> None:
            super().__init__()

        @staticmethod
        def get_output(model: Any, weights: Any, buffers: Any, x: Tensor, y: Tensor) -> Tensor:
            return torch.func.functional_call(model, (weights, buffers), (x[None], y[None])).sum()

        def get_out_to_loss_grad(self, model: Any, weights: Any, buffers: Any, batch: Any) -> Tensor:
            output = torch.func.functional_call(model, (weights, buffers), tuple(batch)).detach()
            if isinstance(module, RegressionMixin):
                return 2 * (batch[1] - output)[:, None]
            if isinstance(module, MultilabelMixin):
                return (-output).sigmoid()[:, None] / batch[1].shape[1]  # the loss is the mean over labels
            return (-output).sigmoid()[:, None]

    return Output()


def _ekfac(key: str, file: Path) -> Tensor:
    data = TASKS[key].data()
    return ekfac_scores(loaded(key, file), data.train_set, data.targets)


def loaded(key: str, file: Path) -> Any:
    """Return a task's module with the weights of a checkpoint."""
    module = TASKS[key].make_module()
    module.load_state_dict(torch.load(file, weights_only=True)["state_dict"])
    return module


def ekfac_scores(module: Any, train_set: Any, targets: Any) -> Tensor:
    """Return the scores of EK-FAC at a module's weights, (n, m)."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments

    linear_layers(module)
    influence = _influence(module)
    with tempfile.TemporaryDirectory() as root, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)  # labels are sampled for the Fisher matrix
        analyzer = Analyzer(
            "ekfac", prepare_model(module.network.eval(), influence), influence, cpu=True, disable_tqdm=True,
            output_dir=root, log_level=logging.ERROR,
        )  # fmt: skip
        batch = {"per_device_batch_size": 200}
        analyzer.fit_all_factors("factors", train_set, factor_args=FactorArguments(strategy="ekfac"), **batch)
        analyzer.compute_pairwise_scores(
            "scores", "factors", targets, train_set, 100, per_device_train_batch_size=200,
            score_args=ScoreArguments(damping_factor=None),
        )  # fmt: skip
        return analyzer.load_pairwise_scores("scores")["all_modules"].T


def linear_layers(module: nn.Module) -> None:
    """Replace the ``Conv1D`` of Hugging Face by linear layers that compute the same: kronfluence knows these only."""
    for name, layer in list(module.named_modules()):
        if type(layer).__name__ == "Conv1D":
            linear = nn.Linear(*layer.weight.shape)
            linear.weight, linear.bias = nn.Parameter(layer.weight.detach().T.contiguous()), layer.bias
            module.set_submodule(name, linear)


def _influence(module: Any) -> Any:
    """Return the task in the form of kronfluence; it measures −f, since its scores are for losses."""
    from kronfluence.task import Task as InfluenceTask

    class Influence(InfluenceTask):
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> Tensor:
            x, y = batch
            prediction = model(x)
            if sample:
                y = _sampled(module, prediction.detach(), y)
            return module.loss(prediction, y).sum()

        def compute_measurement(self, batch: Any, model: Any) -> Tensor:
            x, y = batch
            prediction = model(x)
            if isinstance(module, RegressionMixin):
                return -prediction.sum()
            if isinstance(module, LanguageModelingMixin):
                return -log_odds(module.loss(prediction, y)).sum()
            if isinstance(module, MultilabelMixin):
                return -log_odds(module.loss(prediction, y) * y.shape[1]).sum()
            others = prediction.scatter(1, y[:, None], -torch.inf).logsumexp(1)
            return (others - prediction.gather(1, y[:, None]).squeeze(1)).sum()

    return Influence()


def _sampled(module: Any, prediction: Tensor, y: Tensor) -> Tensor:
    """Return labels drawn from what the model predicts."""
    if isinstance(module, RegressionMixin):
        return torch.normal(prediction.squeeze(1), 0.5**0.5)
    if isinstance(module, MultilabelMixin):
        return prediction.sigmoid().bernoulli()
    drawn = torch.distributions.Categorical(logits=prediction).sample()
    if isinstance(module, LanguageModelingMixin):
        return torch.cat([y[:, :1], drawn[:, :-1]], 1)  # after word t stands the prediction of word t + 1
    return drawn
