"""Slow and obvious references in float64, and a trainer that knows nothing but a store."""

from __future__ import annotations

import copy
import shutil

import numpy as np
import torch
from torch.utils.data import Dataset

from lightning_trak import TRAKCallback
from tests.conftest import make_trainer


def fresh(root, **kwargs):
    """A trainer that knows nothing but the store."""
    return make_trainer(root, TRAKCallback(root / "store", **kwargs))


def feature_files(root):
    """The stored features of targets."""
    found = (root / "store" / "targets").glob("*/*/*.safetensors")
    return sorted(path for path in found if not path.parent.name.startswith("scores-"))


def forget_scores(root):
    """Delete stored scores, so that they are computed again from features."""
    for folder in (root / "store" / "targets").glob("*/scores-*"):
        shutil.rmtree(folder)


class Noisy(Dataset):
    """Augments at random."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        x, y = self.dataset[index]
        return x + torch.randn_like(x), y


def features_float64(module, dataset, names, projection):
    """Slow and obvious: one example, one backward pass, one matrix product at a time. Returns Φ, p."""
    module = copy.deepcopy(module).double().eval()
    rows, probabilities = [], []
    for x, y in dataset:
        p = module(x[None].double()).softmax(1)[0, y]
        parameters = dict(module.named_parameters())
        gradients = torch.autograd.grad(torch.log(p / (1 - p)), [parameters[name] for name in names])
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]).numpy() @ projection)
        probabilities.append(p.item())
    return np.array(rows), np.array(probabilities)


def scores_float64(train, targets, q, w, damping):
    """τ[i, j] = φ(z_j)ᵀ (H + λ·mean(diag H)·I)⁻¹ φ(z_i) q_i, by explicit loops and an explicit inverse."""
    k = train.shape[1]
    kernel = np.zeros((k, k))
    for phi, weight in zip(train, w, strict=True):
        kernel += weight * np.outer(phi, phi)
    inverse = np.linalg.inv(kernel + damping * np.mean(np.diag(kernel)) * np.eye(k))
    scores = np.zeros((len(train), len(targets)))
    for i in range(len(train)):
        for j in range(len(targets)):
            scores[i, j] = targets[j] @ inverse @ train[i] * q[i]
    return scores


def projection_matrix(projector, key, p):
    """Row by row: what the projector makes of each unit vector."""
    features = torch.zeros(p, projector.dimension(p))
    projector.add_(features, torch.eye(p), 0, key)
    return features.double().numpy()
