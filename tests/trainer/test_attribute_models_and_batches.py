"""Models and batches of every form, against slow references."""

from __future__ import annotations

import lightning as L
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import lightning_trak as lt
from lightning_trak import TRAKCallback
from tests.conftest import Classifier, make_data, make_trainer
from tests.trainer.references import scores_float64
from tests.trainer.test_attribute_calibration import DigitsCNN

# --------------------------------------------------------------------------------------------- models and batches


class DictSet(Dataset):
    """Examples as Hugging Face datasets give them."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        x, y = self.dataset[index]
        return {"inputs": x, "labels": y}


class NestedSet(DictSet):
    def __getitem__(self, index):
        x, y = self.dataset[index]
        return {"views": [x[:2], (x[2:], index)]}, y


class DictClassifier(Classifier):
    """Returns an object with logits, as Hugging Face models do."""

    def forward(self, inputs):
        from types import SimpleNamespace

        return SimpleNamespace(logits=self.net(inputs))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.get_logits(batch), self.get_labels(batch))


class NestedClassifier(DictClassifier):
    def forward(self, x):
        return self.net(x)

    def get_logits(self, batch):
        first, (second, _) = batch[0]["views"]
        return self(torch.cat([first, second], 1))


class Tied(Classifier):
    """The same weight used in two layers, and a layer called twice; a frozen layer in front."""

    def __init__(self):
        super().__init__()
        del self.net
        self.front = torch.nn.Linear(4, 4).requires_grad_(False)
        self.encode, self.decode = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)
        self.decode.weight = self.encode.weight
        self.last = torch.nn.Linear(4, 3)

    def forward(self, x):
        hidden = self.decode(self.encode(self.front(x)).tanh()).tanh()
        return self.last(self.encode(hidden))


class Regressor(lt.RegressionMixin, L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0])[:, 0], batch[1])

    configure_optimizers = DigitsCNN.configure_optimizers


def regression_data(n, seed=0):
    x, _ = make_data(n, seed).tensors
    return TensorDataset(x, x.sum(1))


CASES = {
    "dict": (DictClassifier, DictSet(make_data(24)), DictSet(make_data(5, 2))),
    "nested": (NestedClassifier, NestedSet(make_data(24)), NestedSet(make_data(5, 2))),
    "tied and frozen": (Tied, make_data(24), make_data(5, 2)),
    "regression": (Regressor, regression_data(24), regression_data(5, 2)),
}


@pytest.mark.parametrize("case", CASES)
def test_models_and_batches(tmp_path, case):
    make_module, train, targets = CASES[case]

    class Module(make_module):
        validation_step = None

    L.seed_everything(0, verbose=False)
    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store", damping=0.1), max_epochs=1)
    module = Module()
    trainer.fit(module, DataLoader(train, 8, shuffle=True))
    scores = trainer.attribute(dataloaders=DataLoader(targets, 2)).scores
    module = module.double().eval()
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]

    def double(batch):
        if isinstance(batch, torch.Tensor):
            return batch.double() if batch.is_floating_point() else batch
        if isinstance(batch, dict):
            return {key: double(value) for key, value in batch.items()}
        return [double(value) for value in batch]

    def reference(dataset):
        rows, q, w = [], [], []
        for batch in DataLoader(dataset, 1):
            batch = double(batch)
            output = module.model_output(batch)
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(output.sum(), parameters)]).numpy())
            f = output.detach().requires_grad_()
            (slope,) = torch.autograd.grad(module.output_to_loss(f, batch).sum(), f, create_graph=True)
            q.append(-slope.item())
            w.append(torch.autograd.grad(slope.sum(), f)[0].item())
        return np.array(rows), np.array(q), np.array(w)

    phi, q, w = reference(train)
    expected = scores_float64(phi, reference(targets)[0], q, w, 0.1)
    np.testing.assert_allclose(scores.numpy(), expected, rtol=2e-3, atol=1e-4 * np.abs(expected).max())
