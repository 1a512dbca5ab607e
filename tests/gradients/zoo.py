"""Small versions of published architectures, each with data of its kind.

``ZOO[name]()`` is a pair: a module in eval mode whose ``model_output(batch)`` is one number per example, a number that
no other example of the batch has a part in; and ``make_batch(b)``, which makes a batch of ``b`` examples.
Image nets are in ``zoo_small``, sequence and table nets here, those of the transformers package in ``zoo_hf``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.gradients import zoo_small as small
from tests.gradients.zoo_hf import HF_ZOO
from tests.gradients.zoo_small import (
    N_CLASSES,
    PAD,
    VOCABULARY,
    SentenceClassifier,
    masked_mean,
    mlp,
    token_log_likelihood,
)


class LSTMClassifier(SentenceClassifier):
    """Two bidirectional layers, batch first, run over the padding too or over packed sequences."""

    def __init__(self, packed=False, width=12):
        super().__init__()
        self.packed = packed
        self.embedding = nn.Embedding(VOCABULARY, width, padding_idx=PAD)
        self.lstm = nn.LSTM(width, width, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * width, N_CLASSES)

    def forward(self, tokens, mask):
        x = self.embedding(tokens)
        if not self.packed:
            return self.head(masked_mean(self.lstm(x)[0], mask))
        packed = pack_padded_sequence(x, mask.sum(1).cpu(), batch_first=True, enforce_sorted=False)
        hidden, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=tokens.shape[1])
        return self.head(masked_mean(hidden, mask))


class GRUClassifier(SentenceClassifier):
    """Time first; the state at each row's last real token is what is classified."""

    def __init__(self, width=16):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width, padding_idx=PAD)
        self.gru = nn.GRU(width, width)
        self.head = nn.Linear(width, N_CLASSES)

    def forward(self, tokens, mask):
        hidden, _ = self.gru(self.embedding(tokens.t()))
        last = (mask.sum(1) - 1).view(1, -1, 1).expand(1, -1, hidden.shape[-1])
        return self.head(hidden.gather(0, last).squeeze(0))


class EncoderClassifier(SentenceClassifier):
    """torch's own nn.TransformerEncoder, time first, with a learned position embedding."""

    def __init__(self, width=16, length=12):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width, padding_idx=PAD)
        self.position = nn.Parameter(0.5 * torch.randn(length, 1, width))
        layer = nn.TransformerEncoderLayer(width, nhead=2, dim_feedforward=32)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.head = nn.Linear(width, N_CLASSES)
        for parameter in self.encoder.parameters():  # the layers are copies of one until they are drawn anew
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, tokens, mask):
        x = self.embedding(tokens.t()) + self.position
        hidden = self.encoder(x, src_key_padding_mask=~mask)
        return self.head(masked_mean(hidden.transpose(0, 1), mask))


class GatedConv(nn.Module):
    """A causal dilated convolution through a gate, with its residual and its skip output."""

    def __init__(self, width, dilation):
        super().__init__()
        self.dilation = dilation
        self.conv = nn.Conv1d(width, 2 * width, 2, dilation=dilation)
        self.residual, self.skip = nn.Conv1d(width, width, 1), nn.Conv1d(width, width, 1)

    def forward(self, x):
        value, gate = self.conv(F.pad(x, (self.dilation, 0))).chunk(2, dim=1)
        hidden = torch.tanh(value) * torch.sigmoid(gate)
        return x + self.residual(hidden), self.skip(hidden)


class WaveNet(nn.Module):
    """Predicts each quantised sample from those before; the output is a mean log-likelihood."""

    def __init__(self, width=12):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList([GatedConv(width, dilation) for dilation in (1, 2, 4, 1, 2, 4)])
        self.head = nn.Sequential(nn.ReLU(), nn.Conv1d(width, width, 1), nn.ReLU(), nn.Conv1d(width, VOCABULARY, 1))

    def forward(self, samples):
        x, total = self.embedding(samples).transpose(1, 2), 0.0
        for layer in self.layers:
            x, skip = layer(x)
            total = total + skip
        return self.head(total)

    def model_output(self, batch):
        (samples,) = batch
        return token_log_likelihood(self(samples[:, :-1]).transpose(1, 2), samples[:, 1:])


class DLRM(nn.Module):
    """Dense features through an MLP, sparse ones through tables, then the dot products of all pairs."""

    def __init__(self, width=8, tables=3):
        super().__init__()
        self.tables = nn.ModuleList([nn.Embedding(VOCABULARY, width) for _ in range(tables)])
        self.bottom = mlp(4, 16, width)
        self.top = mlp(width + tables * (tables + 1) // 2, 16, 1)

    def forward(self, dense, sparse):
        x = self.bottom(dense)
        rows = torch.stack([x] + [table(sparse[:, i]) for i, table in enumerate(self.tables)], dim=1)
        i, j = torch.tril_indices(rows.shape[1], rows.shape[1], offset=-1)
        interactions = torch.bmm(rows, rows.transpose(1, 2))[:, i, j]
        return self.top(torch.cat([x, interactions], dim=1)).squeeze(1)

    def model_output(self, batch):
        dense, sparse, clicked = batch
        return self(dense, sparse) * (2 * clicked - 1)


def entry(make, make_batch):
    """What the zoo holds under a name."""
    return lambda: (small.build(make, make_batch), make_batch)


ZOO: dict[str, Callable[[], tuple[nn.Module, Callable[[int], Any]]]] = {
    "resnet9": entry(small.ResNet9, small.make_images),
    "mobilenet": entry(small.MobileNet, small.make_images),
    "unet": entry(small.UNet, small.make_segmentation),
    "style_transfer": entry(small.StyleTransfer, small.make_image_pairs),
    "conv3d": entry(small.VideoNet, partial(small.make_images, size=8, channels=1, dims=3)),
    "mlp_mixer": entry(small.MLPMixer, small.make_images),
    "vit": entry(small.ViT, small.make_images),
    "lstm": entry(LSTMClassifier, small.make_sentences),
    "lstm_packed": entry(partial(LSTMClassifier, packed=True), small.make_sentences),
    "gru": entry(GRUClassifier, small.make_sentences),
    "transformer_encoder": entry(EncoderClassifier, small.make_sentences),
    "wavenet": entry(WaveNet, small.make_waves),
    "dlrm": entry(DLRM, small.make_clicks),
}
if find_spec("transformers"):
    ZOO |= {name: entry(make, make_batch) for name, (make, make_batch) in HF_ZOO.items()}
