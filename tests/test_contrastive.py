"""ContrastiveMixin: against loops over the contrast set, and as a whole against a float64 reference."""

from __future__ import annotations

import copy

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, default_collate

from lightning_trak import ContrastiveMixin, TRAKCallback

N, M, SIZE = 30, 5, 12


def pairs(n, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator)
    return x, torch.cat([x[:, :2], torch.randn(n, 1, generator=generator)], 1)


class Pairs(ContrastiveMixin, L.LightningModule):
    contrast_size = SIZE

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        self.text = nn.Linear(3, 3)
        self.logit_scale = nn.Parameter(torch.tensor(1.5))
        self.prepared = 0

    def get_embeddings(self, batch):
        return self.image(batch[0]), self.text(batch[1])

    def get_contrast_batch(self):
        self.prepared += 1
        return super().get_contrast_batch()

    def training_step(self, batch, batch_idx):
        images, texts = (F.normalize(half, dim=1) for half in self.get_embeddings(batch))
        logits = self.logit_scale.exp() * images @ texts.T
        labels = torch.arange(len(logits))
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Data(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(*pairs(N, 0)), batch_size=10, shuffle=True)

    def predict_dataloader(self):
        return DataLoader(TensorDataset(*pairs(M, 1)), batch_size=5)


def margins_by_loop(module, batch, contrast):
    """m₁ and m₂, pair by pair and term by term."""
    module, scale = copy.deepcopy(module).double(), module.logit_scale.double().exp()
    u, v = (F.normalize(half, dim=1) for half in module.get_embeddings([half.double() for half in batch]))
    others_u, others_v = (F.normalize(half, dim=1) for half in module.get_embeddings([h.double() for h in contrast]))
    first = [-torch.log(sum(torch.exp(scale * (a @ (w - b))) for w in others_v)) for a, b in zip(u, v, strict=True)]
    second = [-torch.log(sum(torch.exp(scale * (b @ (w - a))) for w in others_u)) for a, b in zip(u, v, strict=True)]
    return torch.stack(first), torch.stack(second)


@pytest.fixture
def prepared_module():
    module = Pairs().double()
    module.get_contrast_batch = lambda: [half.double() for half in pairs(SIZE, 2)]
    module.prepare_checkpoint()
    return module


def test_output_is_the_sum_of_both_margins(prepared_module):
    batch = [half.double() for half in pairs(6, 3)]
    first, second = margins_by_loop(prepared_module, batch, pairs(SIZE, 2))
    torch.testing.assert_close(prepared_module.model_output(batch), first + second)
    output = prepared_module.model_output(batch)
    loss = (-first.sigmoid().log() - second.sigmoid().log()) / 2  # the cross-entropies of the pair among the set
    torch.testing.assert_close(prepared_module.output_to_loss(output, batch), loss)


def test_loss_terms(prepared_module):
    batch = [half.double() for half in pairs(6, 3)]
    first, second = margins_by_loop(prepared_module, batch, pairs(SIZE, 2))
    p, other = first.sigmoid().detach(), second.sigmoid().detach()
    torch.testing.assert_close(prepared_module.out_to_loss_grad(batch), (2 - p - other) / 4)
    torch.testing.assert_close(prepared_module.out_to_loss_curvature(batch), (p * (1 - p) + other * (1 - other)) / 8)


def test_the_loss_of_a_batch_is_that_of_clip(prepared_module):
    batch = [half.double() for half in pairs(6, 3)]
    torch.testing.assert_close(prepared_module.batch_loss(batch), prepared_module.training_step(batch, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_pair_is_not_among_its_own_others(prepared_module, dtype):
    """Nor is one that is the same in both halves; one of which either half is the same is."""
    images, texts = (half.to(dtype) for half in pairs(SIZE, 2))
    prepared_module.to(dtype).get_contrast_batch = lambda: [images, texts]
    prepared_module.prepare_checkpoint()
    others = [torch.cat([images[:3], images[:1]]), torch.cat([texts[:3], texts[1:2]])]  # three members, and a mixture
    for row in range(4):
        rest = [half[torch.arange(SIZE) != row] if row < 3 else half for half in (images, texts)]
        first, second = margins_by_loop(prepared_module, [half[row : row + 1] for half in others], rest)
        output = prepared_module.model_output([half[row : row + 1] for half in others])
        torch.testing.assert_close(output.double(), first + second, rtol=1e-4, atol=1e-5)


class Augmented(Data):
    """Training examples differ from read to read; a loader without that is there for features."""

    def train_dataloader(self):
        examples = TensorDataset(*pairs(N, 0))
        collate = lambda rows: [half + torch.randn_like(half) for half in default_collate(rows)]  # noqa: E731
        return DataLoader(examples, batch_size=10, shuffle=True, collate_fn=collate)

    def featurize_dataloader(self):
        return super().train_dataloader()


def test_the_contrast_set_is_not_augmented(tmp_path):
    trainer = L.Trainer(
        default_root_dir=tmp_path, max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[TRAKCallback(tmp_path / "store")],
    )  # fmt: skip
    trainer.fit(Pairs(), datamodule=Augmented())
    first, second = (trainer.attribute(datamodule=Augmented()).scores for _ in range(2))
    assert torch.equal(first, second)


@pytest.fixture
def run(tmp_path):
    """Train, and attribute with exact gradients."""
    saving = ModelCheckpoint(tmp_path / "files", save_top_k=-1)
    trak = TRAKCallback(tmp_path / "store", projector="identity", damping=0.1)
    trainer = L.Trainer(
        default_root_dir=tmp_path, max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[saving, trak],
    )  # fmt: skip
    module = Pairs()
    trainer.fit(module, datamodule=Data())
    return trainer, module, tmp_path


def test_whole_attribution_against_a_float64_reference(run):
    trainer, module, tmp_path = run
    scores = trainer.attribute(datamodule=Data()).scores
    rows = torch.randperm(N, generator=torch.Generator().manual_seed(0))[:SIZE]
    contrast = [half[rows] for half in pairs(N, 0)]
    expected = 0
    for path in sorted((tmp_path / "files").iterdir()):
        module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        reference = copy.deepcopy(module).double()
        reference.get_contrast_batch = lambda: [half.double() for half in contrast]
        reference.prepare_checkpoint()
        phi = {}
        for name, data in (("train", pairs(N, 0)), ("targets", pairs(M, 1))):
            outputs = reference.model_output([half.double() for half in data])
            gradients = [torch.autograd.grad(f, list(reference.parameters()), retain_graph=True) for f in outputs]
            phi[name] = np.array([np.concatenate([part.flatten() for part in gradient]) for gradient in gradients])
        batch = [half.double() for half in pairs(N, 0)]
        q, w = reference.out_to_loss_grad(batch).numpy(), reference.out_to_loss_curvature(batch).numpy()
        kernel = phi["train"].T @ np.diag(w) @ phi["train"]
        kernel += 0.1 * np.mean(np.diag(kernel)) * np.eye(len(kernel))
        expected = expected + (phi["train"] * q[:, None]) @ np.linalg.solve(kernel, phi["targets"].T) / 2
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_the_contrast_set_is_embedded_once_a_checkpoint_and_nothing_stays(run):
    trainer, module, _ = run
    assert not hasattr(module, "_contrast")
    before = module.prepared
    trainer.attribute(datamodule=Data())
    assert module.prepared == before  # what is set while preparing is taken away again
    assert not hasattr(module, "_contrast")
    calls = []
    module.get_contrast_batch = lambda: (calls.append(1), Pairs.get_contrast_batch(module))[1]
    trainer.attribute(datamodule=Data())
    assert len(calls) <= 2 * 2 + 3  # targets and checks at two checkpoints, and what is tried first


def test_without_a_train_set_the_remedy_is_named(run):
    _, module, tmp_path = run
    fresh = L.Trainer(accelerator="cpu", logger=False, callbacks=[TRAKCallback(tmp_path / "store", damping=0.1)])
    with pytest.raises(TypeError, match="override get_contrast_batch"):
        fresh.attribute(module, dataloaders=DataLoader(TensorDataset(*pairs(M, 1))))


def test_other_batches_name_the_hook():
    class Plain(ContrastiveMixin, nn.Module): ...

    with pytest.raises(TypeError, match=r"The batch is list.*Override get_embeddings"):
        Plain().get_embeddings([torch.zeros(2)])


@pytest.mark.parametrize(
    ("returned", "got"),
    [
        (lambda u, v: (u, v, u), r"tuple\(Tensor\(5, 3\), Tensor\(5, 3\), Tensor\(5, 3\)\)"),
        (lambda u, v: u, r"Tensor\(5, 3\)"),
        (lambda u, v: torch.stack([u[:2], v[:2]]), r"Tensor\(2, 2, 3\)"),
        (lambda u, v: {"image": u, "text": v}, "dict"),
        (lambda u, v: None, "NoneType"),
        (lambda u, v: (u, v[:, :2]), r"tuple\(Tensor\(5, 3\), Tensor\(5, 2\)\)"),
        (lambda u, v: (u[:, None], v[:, None]), r"tuple\(Tensor\(5, 1, 3\), Tensor\(5, 1, 3\)\)"),
    ],
)
def test_embeddings_of_another_form(prepared_module, returned, got):
    batch = [half.double() for half in pairs(5, 1)]
    found = returned(*prepared_module.get_embeddings(batch))
    prepared_module.get_embeddings = lambda batch: found
    for call in (prepared_module.model_output, prepared_module.batch_loss):
        with pytest.raises(
            TypeError, match=rf"Pairs.get_embeddings\(batch\) returned {got}.*expected two tensors, \(b, d\)"
        ):
            call(batch)


def test_a_forward_of_any_arguments_names_the_hook():
    class Clip(Pairs):
        get_embeddings = ContrastiveMixin.get_embeddings

        def forward(self, **inputs):
            return self.image(**inputs)

    with pytest.raises(
        TypeError, match=r"unexpected keyword argument 'pixels'. Override get_embeddings\(self, batch\)"
    ):
        Clip().model_output({"pixels": torch.ones(2, 4), "labels": torch.ones(2)})
