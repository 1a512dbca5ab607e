"""Six small tasks on real data that needs no download; each trains in about a second."""

from __future__ import annotations

import ast
import re
import sysconfig
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import lightning as L
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak import ClassificationMixin, LanguageModelingMixin, RegressionMixin
from tests.benchmarks.models import digits_cnn

PACKAGES = ("asyncio", "email", "importlib", "logging", "unittest", "xml")
WORDS, LENGTH = 2000, 32
PASSAGES, PASSAGE_WORDS, PASSAGE_LENGTH = 1200, 1000, 24


class Data(L.LightningDataModule):
    """Examples in a random order, cut into train set and targets."""

    def __init__(self, x: Tensor, y: Tensor, n_train: int, n_targets: int, batch_size: int) -> None:
        super().__init__()
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[: n_train + n_targets]
        x, y = x[order], y[order]
        self.train_set = TensorDataset(x[:n_train], y[:n_train])
        self.targets = TensorDataset(x[n_train:], y[n_train:])
        self.batch_size = batch_size

    def train_dataloader(self) -> Any:
        return DataLoader(self.train_set, self.batch_size, shuffle=True)

    def test_dataloader(self) -> Any:
        return DataLoader(self.targets, len(self.targets))


class Classifier(ClassificationMixin, L.LightningModule):
    """A network trained on the cross-entropy."""

    def __init__(self, network: nn.Module, optimizer: Callable[..., torch.optim.Optimizer]) -> None:
        super().__init__()
        self.network, self.optimizer = network, optimizer

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def loss(self, prediction: Tensor, y: Tensor) -> Tensor:
        """Return what training minimises, (b,)."""
        return F.cross_entropy(prediction, y, reduction="none")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return self.loss(self(x), y).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())


class Regressor(RegressionMixin, Classifier):
    """A network trained on the squared error."""

    def loss(self, prediction: Tensor, y: Tensor) -> Tensor:
        """Return what training minimises, (b,)."""
        return (prediction.squeeze(1) - y) ** 2


class LanguageModel(LanguageModelingMixin, Classifier):
    """A network trained on the cross-entropy of the next word."""

    def loss(self, prediction: Tensor, y: Tensor) -> Tensor:
        """Return what training minimises, (b,)."""
        return F.cross_entropy(prediction[:, :-1].mT, y[:, 1:], reduction="none").mean(1)


@dataclass(frozen=True)
class Task:
    """What is trained, and how.

    Attributes:
        name: in the table.
        data: makes train set and targets.
        make_module: returns a new module.
        epochs: of a training.
    """

    name: str
    data: Callable[[], Data]
    make_module: Callable[[], L.LightningModule]
    epochs: int


def _sgd(**options: float) -> Callable[..., torch.optim.Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, **options)


def _digits() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    return torch.tensor(digits.images[:, None] / 16, dtype=torch.float32), torch.tensor(digits.target)


def _digits_data() -> Data:
    return Data(*_digits(), n_train=1000, n_targets=300, batch_size=50)


def _noisy_digits_data() -> Data:
    """One training label in ten is replaced by another."""
    data = Data(*_digits(), n_train=1000, n_targets=300, batch_size=50)
    labels = data.train_set.tensors[1]
    generator = torch.Generator().manual_seed(1)
    wrong = torch.rand(len(labels), generator=generator) < 0.1
    labels[wrong] = (labels[wrong] + torch.randint(1, 10, labels.shape, generator=generator)[wrong]) % 10
    return data


def _cancer_data() -> Data:
    cancer = load_breast_cancer()
    return Data(_standard(cancer.data), torch.tensor(cancer.target), n_train=400, n_targets=169, batch_size=20)


def _diabetes_data() -> Data:
    diabetes = load_diabetes()
    return Data(_standard(diabetes.data), _standard(diabetes.target), n_train=300, n_targets=142, batch_size=20)


def _standard(values: Any) -> Tensor:
    return torch.tensor((values - values.mean(0)) / values.std(0), dtype=torch.float32)


def _docstring_data() -> Data:
    return Data(*_docstring_examples(), n_train=800, n_targets=200, batch_size=40)


@cache
def _docstring_examples() -> tuple[Tensor, Tensor]:
    """Docstrings of the standard library: which package is it from? Words are hashed into a table of 2000."""
    texts, labels = [], []
    for label, package in enumerate(PACKAGES):
        for path in sorted((Path(sysconfig.get_paths()["stdlib"]) / package).rglob("*.py")):
            for words in _docstrings(path):
                texts.append([1 + _hash(word) % (WORDS - 1) for word in words[:LENGTH]])
                labels.append(label)
    tokens = torch.tensor([text + [0] * (LENGTH - len(text)) for text in texts])
    return tokens, torch.tensor(labels)


def _docstrings(path: Path) -> list[list[str]]:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [(ast.get_docstring(node) or "").lower().split() for node in nodes if isinstance(node, kinds)]
    return [words for words in found if len(words) >= 8]


def _passage_data() -> Data:
    passages = _passages()
    return Data(passages, passages, n_train=PASSAGES - 200, n_targets=200, batch_size=40)


@cache
def _passages() -> Tensor:
    """Passages of Python's language reference, one after the other, of its most frequent words; 0 for all others."""
    text = "\n".join(topics[name] for name in sorted(topics)).lower()
    words = re.findall(r"\w+|[^\w\s]", text)[: PASSAGES * PASSAGE_LENGTH]
    frequent = sorted(Counter(words).items(), key=lambda item: (-item[1], item[0]))[: PASSAGE_WORDS - 1]
    numbers = {word: number for number, (word, _) in enumerate(frequent, start=1)}
    return torch.tensor([numbers.get(word, 0) for word in words]).reshape(PASSAGES, PASSAGE_LENGTH)


def _hash(word: str) -> int:
    return int.from_bytes(word.encode(), "little") * 2654435761 % 2**32 >> 7


class Block(nn.Module):
    """A pre-norm transformer block, of linear layers that every method knows."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.norm1(x)
        query, key, value = (
            layer(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        weights = (query @ key.mT / query.shape[-1] ** 0.5).masked_fill(~mask, -1e9).softmax(-1)
        x = x + self.out((weights @ value).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class TextTransformer(nn.Module):
    """Two blocks over embedded words, averaged."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(WORDS, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(PACKAGES))

    def forward(self, tokens: Tensor) -> Tensor:
        mask = tokens != 0
        x = self.words(tokens) + self.positions(torch.arange(LENGTH, device=tokens.device))
        for block in self.blocks:
            x = block(x, mask[:, None, None])
        weights = mask / mask.sum(1, keepdim=True)
        return self.head((self.norm(x) * weights[..., None]).sum(1))


class CausalTransformer(nn.Module):
    """Two blocks over embedded words that see the words before, and a prediction after every word."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(PASSAGE_WORDS, width), nn.Embedding(PASSAGE_LENGTH, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, PASSAGE_WORDS)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.words(tokens) + self.positions(places)
        for block in self.blocks:
            x = block(x, places[:, None] >= places)
        return self.head(self.norm(x))


def _cnn() -> L.LightningModule:
    return Classifier(digits_cnn().network, _sgd(lr=0.02, momentum=0.9))


def _noisy_mlp() -> L.LightningModule:
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.BatchNorm1d(128), nn.GELU(), nn.Linear(128, 128), nn.BatchNorm1d(128),
        nn.GELU(), nn.Linear(128, 10),
    )  # fmt: skip
    return Classifier(network, _sgd(lr=0.05, momentum=0.9))


def _cancer_mlp() -> L.LightningModule:
    network = nn.Sequential(nn.Linear(30, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    return Classifier(network, _sgd(lr=0.05, momentum=0.9))


def _diabetes_mlp() -> L.LightningModule:
    network = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    return Regressor(network, _sgd(lr=0.01, momentum=0.9))


def _transformer() -> L.LightningModule:
    return Classifier(TextTransformer(), lambda parameters: torch.optim.Adam(parameters, lr=3e-3))


def _language_model() -> L.LightningModule:
    return LanguageModel(CausalTransformer(), lambda parameters: torch.optim.Adam(parameters, lr=3e-3))


TASKS = {
    "digits": Task("digits, CNN", _digits_data, _cnn, epochs=15),
    "noisy": Task("digits, MLP, label noise", _noisy_digits_data, _noisy_mlp, epochs=30),
    "cancer": Task("breast cancer, MLP", _cancer_data, _cancer_mlp, epochs=20),
    "diabetes": Task("diabetes, MLP regression", _diabetes_data, _diabetes_mlp, epochs=20),
    "docstrings": Task("docstrings, transformer", _docstring_data, _transformer, epochs=12),
    "passages": Task("passages, language model", _passage_data, _language_model, epochs=12),
}
