"""Modules that Lightning ships as examples: tensors that the first forward pass makes, and a state between batches."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.demos.lstm import LightningLSTM, SimpleLSTM
from lightning.pytorch.demos.transformer import LightningTransformer, Transformer
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak import TRAKCallback, TRAKMixin, log_odds
from tests.third_party.training import ENGINES, Data, assert_same_training, auroc, fit

N, M, LENGTH, WORDS = 48, 6, 8, 11
WRONG = range(0, N, 8)


def counting(n, seed, wrong=()):
    """Sequences that count on from some number, and the number that follows; in some what follows is at random."""
    generator = torch.Generator().manual_seed(seed)
    words = (torch.randint(0, WORDS, (n, 1), generator=generator) + torch.arange(LENGTH + 1)) % WORDS
    follow = words[:, 1:].clone()
    follow[list(wrong)] = torch.randint(0, WORDS, (len(wrong), LENGTH), generator=generator)
    return TensorDataset(words[:, :-1], follow)


@pytest.fixture(scope="module")
def data():
    train, targets = DataLoader(counting(N, 0, WRONG), 12, shuffle=True), DataLoader(counting(M, 1), M)
    return Data(train, targets, validates=False)


class OfSequences(TRAKMixin):
    """The log-odds of the loss averaged over a sequence."""

    def prepare_data(self):
        """Leave out the download."""

    def model_output(self, batch):
        words, follow = batch
        losses = F.nll_loss(self.log_probabilities(words, follow), follow.flatten(), reduction="none")
        return log_odds(losses.view(follow.shape).mean(1))


class Attentive(OfSequences, LightningTransformer):
    """Positions and mask are made in the first forward pass, and kept. It logs nothing by itself."""

    def __init__(self):
        super().__init__(WORDS)
        self.model = Transformer(WORDS, ninp=16, nhid=16, nlayers=1)

    def log_probabilities(self, words, follow):
        return self(words, follow)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss)
        return loss


class Recurrent(OfSequences, LightningLSTM):
    """Goes on with the state that the batch before left, from none at the start of an epoch."""

    def __init__(self):
        super().__init__(WORDS)
        self.model = SimpleLSTM(WORDS, ninp=16, nhid=16, nlayers=1, dropout=0.0)

    def log_probabilities(self, words, follow):
        return self.model(words, self.model.init_hidden(len(words)))[0]

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


@pytest.mark.parametrize("gradients", ENGINES)
@pytest.mark.parametrize("build", [Attentive, Recurrent])
def test_training_is_the_same(tmp_path, data, build, gradients):
    assert_same_training(tmp_path, build, data, gradients, max_epochs=2)


def test_wrong_sequences_are_found(tmp_path, data):
    trainer = fit(tmp_path, Recurrent, data, TRAKCallback(featurize_on="fit_end"), max_epochs=10)
    assert auroc(trainer.attribute_self(), WRONG) > 0.9
    assert trainer.attribute(data).scores.shape == (N, M)
