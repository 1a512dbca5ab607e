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
from torch.utils.data import DataLoader, Subset, TensorDataset, default_collate

from lightning_trak import ContrastiveMixin, TRAKCallback, retrain_subsets
from lightning_trak.tasks.contrastive import _Members

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
    module = module if module.logit_scale.dtype == torch.float64 else copy.deepcopy(module).double()
    u, v = (F.normalize(half, dim=1) for half in module.get_embeddings([half.double() for half in batch]))
    others = module.get_embeddings([half.double() for half in contrast])
    others_u, others_v = (F.normalize(half, dim=1).detach() for half in others)
    scale = module.logit_scale.exp()
    first = [-torch.log(sum(torch.exp(scale * (a @ (w - b))) for w in others_v)) for a, b in zip(u, v, strict=True)]
    second = [-torch.log(sum(torch.exp(scale * (b @ (w - a))) for w in others_u)) for a, b in zip(u, v, strict=True)]
    return torch.stack(first), torch.stack(second)


@pytest.fixture
def prepared_module():
    module = Pairs().double()
    module.get_contrast_batch = lambda: [half.double() for half in pairs(SIZE, 2)]
    module.prepare_checkpoint()
    return module


def test_all_labels_together_give_the_gauss_newton_matrix(prepared_module):
    """½ Jᵀ (diag(p) − p pᵀ) J of the logits of both halves, by the Jacobian and the probabilities."""
    module, batch = prepared_module, [half.double() for half in pairs(1, 3)]
    module._contrast = tuple(half[:3] for half in module._contrast)  # 16 pairs of labels
    parameters = dict(module.named_parameters())
    first, second = module._choices(batch)
    assert first.shape == second.shape == (1, 4)
    expected, found = 0.0, 0.0
    for logits in (first[0], second[0]):
        rows = [
            torch.autograd.grad(logit, list(parameters.values()), retain_graph=True, materialize_grads=True)
            for logit in logits
        ]
        jacobian = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
        p = logits.softmax(0).detach()
        expected = expected + jacobian.T @ (p.diag() - torch.outer(p, p)) @ jacobian / 2
    for text in range(4):
        for image in range(4):
            loss = module.drawn_loss((batch, torch.tensor([[text, image]])))
            gradient = torch.cat(
                [part.flatten() for part in torch.autograd.grad(loss.sum(), list(parameters.values()))]
            )
            probability = first[0].softmax(0)[text] * second[0].softmax(0)[image]
            found = found + probability.detach() * torch.outer(gradient, gradient)
    torch.testing.assert_close(found, expected)
    drawn = module.draw_labels([half.expand(20_000, -1) for half in batch], range(20_000))
    for logits, own in zip((first[0], second[0]), drawn.unbind(1), strict=True):
        torch.testing.assert_close(
            torch.bincount(own, minlength=4) / 20_000, logits.softmax(0).float(), atol=0.02, rtol=0
        )


@pytest.mark.parametrize("gradients", ["hooks", "vmap", "loop"])
def test_pairs_are_whitened_if_asked_for(tmp_path, gradients):
    """A training pair of the contrast set is not drawn as another pair: rows are known while labels are drawn."""
    L.seed_everything(0, verbose=False)
    trak = TRAKCallback(tmp_path / "store", preconditioner="kronecker", gradients=gradients)
    trainer = L.Trainer(
        default_root_dir=tmp_path, max_epochs=1, accelerator="cpu", logger=False, callbacks=[trak],
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Pairs(), datamodule=Data())
    attribution = trainer.attribute(datamodule=Data())
    assert attribution.info.preconditioner == "kronecker"
    assert attribution.scores.shape == (N, M)
    assert attribution.scores.abs().sum() > 0


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


def margins_without(module, pair, contrast, place):
    """m₁ and m₂ of one pair; that at ``place`` in the contrast set, if there is one, is left out of the sums."""
    others = [half[torch.arange(len(half)) != place] for half in contrast]
    return torch.cat(margins_by_loop(module, pair, others))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_pair_is_not_among_its_own_others(prepared_module, dtype):
    """By its number alone: a copy is another."""
    images, texts = (half.to(dtype) for half in pairs(SIZE, 2))
    images[7], texts[7] = images[1], texts[1]
    prepared_module.to(dtype).get_contrast_batch = lambda: [images, texts]
    prepared_module.prepare_checkpoint()
    for place in (0, 1, 7, -1):
        pair = [half[place : place + 1] if place >= 0 else half[2:3] for half in (images, texts)]
        prepared_module.example_numbers = torch.tensor([place])
        expected = margins_without(prepared_module, pair, (images, texts), place).sum(0, keepdim=True)
        torch.testing.assert_close(prepared_module.model_output(pair).double(), expected, rtol=1e-4, atol=1e-5)


def test_a_contrast_set_from_elsewhere_has_no_rows(prepared_module):
    assert prepared_module.number_examples([0, 1]).tolist() == [-1, -1]
    assert prepared_module.example_numbers is None


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


ROWS = torch.randperm(N, generator=torch.Generator().manual_seed(0))[:SIZE].tolist()  # of the contrast set
OTHERS = [row for row in range(N) if row not in ROWS]
COPIES = {ROWS[3]: ROWS[1], OTHERS[0]: ROWS[2]}  # train rows with the content of another, in the contrast set and not


def train_pairs():
    halves = pairs(N, 0)
    for half in halves:
        for row, original in COPIES.items():
            half[row] = half[original]
    return halves


class Copies(Data):
    """Duplicates in the train set, and train examples among the targets."""

    drawn = (ROWS[1], OTHERS[1], ROWS[5])  # of a content that is twice in the contrast set, not there, and once

    def train_dataloader(self):
        return DataLoader(TensorDataset(*train_pairs()), batch_size=10, shuffle=True)

    def predict_dataloader(self):
        halves = zip(pairs(M, 1), train_pairs(), strict=True)
        return DataLoader(TensorDataset(*(torch.cat([own, train[[*self.drawn]]]) for own, train in halves)), 5)


def fit(tmp_path, module, data, **options):
    saving = ModelCheckpoint(tmp_path / "files", save_top_k=-1)
    trainer = L.Trainer(
        default_root_dir=tmp_path, max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[saving, TRAKCallback(tmp_path / "store", damping=0.1, **options)],
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return trainer


@pytest.fixture
def run(tmp_path):
    """Train, and attribute with exact gradients."""
    module = Pairs()
    return fit(tmp_path, module, Data(), projector="identity"), module, tmp_path


@pytest.mark.parametrize("gradients", ["hooks", "vmap", "loop"])
def test_whole_attribution_against_a_float64_reference(tmp_path, gradients):
    module = Pairs()
    trainer = fit(tmp_path, module, Copies(), projector="identity", gradients=gradients, batch_size=7)
    scores = trainer.attribute(datamodule=Copies()).scores
    contrast = [half[ROWS] for half in train_pairs()]
    places = [ROWS.index(row) if row in ROWS else -1 for row in range(N)]
    target_places = [-1] * M + [1, -1, 5]
    targets = Copies().predict_dataloader().dataset.tensors
    expected = 0
    for path in sorted((tmp_path / "files").iterdir()):
        module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        reference = copy.deepcopy(module).double()
        phi, margins = {}, {}
        for name, data, own in (("train", train_pairs(), places), ("targets", targets, target_places)):
            found = [
                margins_without(reference, [half[i : i + 1] for half in data], contrast, place)
                for i, place in enumerate(own)
            ]
            gradients_ = [torch.autograd.grad(both.sum(), list(reference.parameters())) for both in found]
            phi[name] = np.array([np.concatenate([part.flatten() for part in gradient]) for gradient in gradients_])
            margins[name] = torch.stack(found).detach()
        p = margins["train"].sigmoid().numpy()
        q, w = (2 - p.sum(1)) / 4, (p * (1 - p)).sum(1) / 8
        kernel = phi["train"].T @ np.diag(w) @ phi["train"]
        kernel += 0.1 * np.mean(np.diag(kernel)) * np.eye(len(kernel))
        expected = expected + (phi["train"] * q[:, None]) @ np.linalg.solve(kernel, phi["targets"].T) / 2
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


class Deep(Pairs):
    """Towers that map everything to almost the same place at initialisation."""

    def __init__(self):
        super().__init__()
        for name, width in (("image", 4), ("text", 3)):
            deeper = [layer for _ in range(20) for layer in (nn.Linear(8, 8), nn.ReLU())]
            setattr(self, name, nn.Sequential(nn.Linear(width, 8), nn.ReLU(), *deeper, nn.Linear(8, 3)))


@pytest.mark.parametrize("gradients", ["hooks", "vmap", "loop"])
def test_training_starts_where_all_pairs_look_the_same(tmp_path, gradients):
    module = Deep()
    for half in module._directions(pairs(N, 0)):
        assert (half @ half.T).min() > 1 - torch.finfo(torch.float32).eps ** 0.5  # no cosine tells pairs apart
    trainer = fit(tmp_path, module, Data(), proj_dim=16, projector="sparse", gradients=gradients)
    assert trainer.attribute(datamodule=Data()).scores.isfinite().all()
    assert trainer.attribute_self(datamodule=Data()).isfinite().all()


class Example:
    """Of a type that does not tell its value."""


def places(train, rows, dataset=None, targets=()):
    return _Members(train, rows).places(targets, dataset)


def test_training_examples_are_told_by_row():
    train = [1.0, 2.0, 1.0, 3.0]
    assert places(train, [3, 0], None, range(4)) == [1, -1, -1, 0]  # row 2 is a copy of row 0, and another pair
    assert places(train, [3, 0], train, range(4)) == [1, -1, -1, 0]


@pytest.mark.parametrize(
    "train",
    [
        [1.0, 2.0, 1.0, 3.0],
        [{"tokens": torch.arange(n % 3), "text": "ab"[n // 3 :]} for n in (1, 2, 1, 3)],  # padded when collated
        [(np.ones(2), n % 3) for n in (1, 2, 1, 3)],
    ],
)
def test_targets_are_told_by_content(train):
    targets = [*copy.deepcopy(train), "another"]
    assert places(train, [3, 2, 0], targets, [4, 0, 2, 1, 3]) == [-1, 1, 1, -1, 0]
    assert places(train, [3, 2, 0], Subset(train, [1, 2]), [0, 1]) == [-1, 1]


def test_examples_without_a_value_are_never_the_same():
    assert places([Example()], [0], [Example(), [Example()]], [0, 1]) == [-1, -1]


def test_reading_targets_draws_no_random_numbers():
    class Augmented:
        def __getitem__(self, row):
            return torch.rand(2), np.random.rand()

    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    assert places(Augmented(), [0, 1], Augmented(), [0]) == [0]  # as read under one seed
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


def test_a_part_of_the_contrast_set_is_refused(tmp_path):
    class Half(Pairs):
        def get_contrast_batch(self):
            return [half[:6] for half in super().get_contrast_batch()]

    with pytest.raises(ValueError, match="returned 6 of the 12 pairs.*Set contrast_size"):
        fit(tmp_path, Half(), Data())


def test_outputs_after_retraining(tmp_path):
    """Of targets that are in the contrast set, too."""
    made = []

    def make_module():
        made.append(Pairs())
        return made[-1]

    def make_trainer():
        return L.Trainer(
            default_root_dir=tmp_path, max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False,
        )  # fmt: skip

    truth = retrain_subsets(make_module, Copies(), make_trainer, n_subsets=1, dirpath=tmp_path / "runs")
    rows = truth.masks[0].nonzero()[:, 0]
    chosen = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:SIZE]]
    contrast = [half[chosen] for half in train_pairs()]
    targets = Copies().predict_dataloader().dataset.tensors
    places = [next(iter((contrast[0] == x).all(1).nonzero()[:, 0].tolist()), -1) for x in targets[0]]
    assert any(place != -1 for place in places)
    expected = [
        margins_without(made[0], [half[i : i + 1] for half in targets], contrast, place).sum()
        for i, place in enumerate(places)
    ]
    torch.testing.assert_close(truth.outputs[0].double(), torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert made[0].example_numbers is None


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
