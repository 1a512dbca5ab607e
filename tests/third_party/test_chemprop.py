"""chemprop's message passing network: batches of graphs, and predictions that are unscaled in evaluation mode."""

from __future__ import annotations

import random

import pytest
import torch
from chemprop.data import MoleculeDatapoint, MoleculeDataset, build_dataloader
from chemprop.models import MPNN
from chemprop.nn import BondMessagePassing, MeanAggregation, RegressionFFN, UnscaleTransform
from rdkit import Chem

from lightning_trak import RegressionMixin, TRAKCallback
from tests.third_party.training import Data, assert_same_training, auroc, fit

N, M = 64, 8
GROUPS = ["C", "CC", "OC", "NC", "c1ccccc1", "C(=O)", "C(F)", "C(Cl)", "S"]


def molecules(n, seed):
    """Chains of a few groups, no two the same, with the share of carbon among their atoms."""
    draw, found = random.Random(seed), {}
    while len(found) < n:
        smiles = "C" + "".join(draw.choice(GROUPS) for _ in range(draw.randint(3, 7)))
        atoms = [atom.GetSymbol() for atom in Chem.MolFromSmiles(smiles).GetAtoms()]
        found[smiles] = atoms.count("C") / len(atoms)
    return list(found), list(found.values())


def mirrored(labels):
    """Put every fourth label that is far from the mean as far on its other side, where it does not stand out."""
    mean = sum(labels) / len(labels)
    wrong = [row for row, label in enumerate(labels) if abs(label - mean) > 0.08][::4]
    return [2 * mean - label if row in wrong else label for row, label in enumerate(labels)], wrong


def dataset(smiles, labels, scaler=None):
    points = [MoleculeDatapoint.from_smi(one, [label]) for one, label in zip(smiles, labels, strict=True)]
    data = MoleculeDataset(points)
    return data, data.normalize_targets(scaler)


@pytest.fixture(scope="module")
def case():
    """The data, the scaler of labels, and which labels are wrong."""
    smiles, labels = molecules(N, 0)
    labels, wrong = mirrored(labels)
    train, scaler = dataset(smiles, labels)
    targets, _ = dataset(*molecules(M, 1), scaler)
    return Data(build_dataloader(train, 16), build_dataloader(targets, 4, shuffle=False)), scaler, wrong


class AsItPredicts(RegressionMixin, MPNN):
    """As one would write it first: predictions are those of ``forward``."""

    def get_predictions(self, batch):
        return self(batch.bmg, batch.V_d, batch.X_d)

    def get_labels(self, batch):
        return batch.Y


class AsItTrains(AsItPredicts):
    """Takes the predictions before they are unscaled."""

    def get_predictions(self, batch):
        return self.predictor.ffn(self.fingerprint(batch.bmg, batch.V_d, batch.X_d))


def builder(module_class, scaler):
    def build():
        unscale = UnscaleTransform.from_standard_scaler(scaler)
        predictor = RegressionFFN(input_dim=32, hidden_dim=32, output_transform=unscale)
        messages = BondMessagePassing(d_h=32, dropout=0.1)
        rates = {"init_lr": 1e-3, "max_lr": 1e-2, "final_lr": 1e-3}
        return module_class(messages, MeanAggregation(), predictor, batch_norm=True, **rates)

    return build


@pytest.mark.parametrize("gradients", ["auto", "loop"])
def test_training_is_the_same(tmp_path, case, gradients):
    data, scaler, _ = case
    assert_same_training(tmp_path, builder(AsItTrains, scaler), data, gradients, max_epochs=2)


@pytest.mark.parametrize("gradients", ["hooks", "vmap"])
def test_other_engines_refuse_before_training(tmp_path, case, gradients):
    """All molecules of a batch are one graph, whose rows are atoms and bonds, not examples."""
    data, scaler, _ = case
    with pytest.raises(ValueError, match=f"gradients='{gradients}' cannot .* has . rows: .*Use gradients='auto' or"):
        fit(tmp_path, builder(AsItTrains, scaler), data, TRAKCallback(gradients=gradients), max_epochs=1)
    assert not list(tmp_path.rglob("*.ckpt"))


def trained(root, case, module_class):
    data, scaler, _ = case
    return fit(root, builder(module_class, scaler), data, TRAKCallback(featurize_on="fit_end"), max_epochs=20)


def test_wrong_labels_are_found(tmp_path, case):
    data, _, wrong = case
    trainer = trained(tmp_path, case, AsItTrains)
    assert auroc(trainer.attribute_self(), wrong) > 0.9
    assert trainer.attribute(data).scores.shape == (N, M)


def test_another_loss_in_evaluation_mode_is_told_of(tmp_path, case):
    """Without the warning scores would be quietly wrong: labels are scaled, predictions in evaluation mode are not."""
    _, _, wrong = case
    with pytest.warns(UserWarning, match="In evaluation mode the loss .* UnscaleTransform computes something else"):
        trainer = trained(tmp_path, case, AsItPredicts)
    assert auroc(trainer.attribute_self(), wrong) < 0.8


class OwnLoss(AsItTrains):
    """Says what the loss of an example is, not how it follows from the prediction."""

    def per_sample_loss(self, batch):
        return (self.get_predictions(batch) - self.get_labels(batch)).square().squeeze(1)


def test_losses_of_ones_own(tmp_path, case):
    """Q is found by projection, and is that of the formula."""
    data, scaler, _ = case
    options = {"featurize_on": "fit_end", "curvature": False}
    found = [
        fit(
            tmp_path / kind.__name__, builder(kind, scaler), data, TRAKCallback(**options), max_epochs=1
        ).attribute_self()
        for kind in (AsItTrains, OwnLoss)
    ]
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)
