"""Training is the same to the bit with and without the callback, for modules that are easily disturbed."""

from __future__ import annotations

import random

import lightning as L
import numpy as np
import pytest
import torch
import torchmetrics
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_trak import ClassificationMixin, FeatureStore, TRAKCallback
from tests.conftest import make_data, make_trainer
from tests.isolation.test_module_state import snapshot


class Net(ClassificationMixin, L.LightningModule):
    """With Dropout and momentum, so that whatever is drawn or stepped once more shows."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.backbone(x))

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


class TwoNames(Net):
    """A module under two names, as in N-BEATS and TFT of pytorch-forecasting."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(self.backbone, self.head)

    def forward(self, x):
        return self.net(x)


class TwiceInALayer(Net):
    """One module twice in a module without a rule, that itself has two names."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(8))
            self.inner = nn.Linear(8, 8)
            self.again = self.inner
            self.scale_again = self.scale

        def forward(self, x):
            return self.again(torch.tanh(self.inner(x * self.scale))) * self.scale_again

    def __init__(self):
        super().__init__()
        self.twice = self.Twice()
        self.also = nn.ModuleList([self.twice, self.backbone])

    def forward(self, x):
        return self.head(self.also[0](self.also[1](x)))


class TiedParameters(Net):
    """One parameter in two modules, one of which has two names."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.alias = self.second

    def forward(self, x):
        return self.head(self.alias(torch.relu(self.first(self.backbone(x)))))


class Counting(Net):
    """A forward pass that counts, keeps what it saw, and updates a metric and a buffer."""

    def __init__(self):
        super().__init__()
        self.calls, self.kept, self.accuracy = 0, [], torchmetrics.Accuracy("multiclass", num_classes=3)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.kept.append(x.detach())
        self.passes += 1
        return super().forward(x) * (1 + 0.01 * (self.calls % 3) + 0.001 * self.passes % 1)

    def get_logits(self, batch):
        logits = Net.forward(self, batch[0])
        self.calls += 1
        self.kept.append(batch[0])
        self.passes += 1
        self.accuracy.update(logits.detach(), batch[1])
        return logits

    def training_step(self, batch, batch_idx):
        self.accuracy.update(self(batch[0]).detach(), batch[1])
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self):
        self.log("accuracy", self.accuracy.compute())
        self.log("calls", float(self.calls + len(self.kept)))


class Renormalised(Net):
    """Its embedding is changed in place by its forward pass."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 4, max_norm=0.5)

    def forward(self, x):
        return super().forward(x + self.table((x[:, 0].abs() * 10).long().clamp(max=49)))


class TakesApart(Net):
    """Its outputs take things out of the batch, and change what is left in place."""

    def training_step(self, batch, batch_idx):
        x, y = batch["x"], batch["y"]
        return F.cross_entropy(self(x), y)

    def get_labels(self, batch):
        return batch["y"]

    def get_logits(self, batch):
        return self(batch["x"])

    def model_output(self, batch):
        labels = batch.pop("y")
        return super().model_output({"x": batch.pop("x"), "y": labels})

    def output_to_loss(self, output, batch):
        batch.pop("y")
        return F.softplus(-output)


class Prepares(Net):
    """Leaves a buffer, a parameter, a module and an attribute behind when it prepares for a checkpoint."""

    def prepare_checkpoint(self):
        self.register_buffer("prepared", torch.ones(3))
        self.more = nn.Parameter(torch.ones(3))
        self.part = nn.Linear(1, 1)
        self.backbone.note = "prepared"

    def get_logits(self, batch):
        return self(batch[0]) + self.prepared + self.more + 0 * self.part.bias


class DrawsItself(Net):
    """Has a generator of its own."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x):
        noise = torch.rand(x.shape, generator=self.generator) if self.training else 0
        return super().forward(x + noise)


class HidesATeacher(Net):
    """Learns from a module that is not registered, through which gradients flow in training."""

    def __init__(self):
        super().__init__()
        self.teacher = [nn.Linear(3, 3)]

    def forward(self, x):
        return self.teacher[0](super().forward(x))

    def on_train_batch_end(self, *_):
        self.log("gradients", self.teacher[0].weight.grad.norm())


class HidesATeacherDeeper(Net):
    """Learns from modules in an object, in nested containers, and in such a module again."""

    class Distillation:
        def __init__(self, teacher):
            self.teacher = teacher

    def __init__(self):
        super().__init__()
        self.distillation = self.Distillation(nn.Linear(3, 3))
        self.more = {"teachers": [(nn.Linear(3, 3),)]}
        self.more["teachers"][0][0].another = [nn.Linear(3, 3)]

    @property
    def teachers(self):
        inner = self.more["teachers"][0][0]
        return [self.distillation.teacher, inner, inner.another[0]]

    def forward(self, x):
        x = super().forward(x)
        for teacher in self.teachers:
            x = teacher(x)
        return x

    def on_train_batch_end(self, *_):
        self.log("gradients", sum(teacher.weight.grad.norm() for teacher in self.teachers))


class HidesItsOwnLayer(Net):
    """Holds a layer's weight in a list, and in a module that is not registered."""

    def __init__(self):
        super().__init__()
        self.again = [self.head.weight, nn.Linear(4, 8)]
        self.again[1].weight = self.backbone[0].weight

    def forward(self, x):
        return super().forward(x) + F.linear(x.repeat(1, 2), self.again[0]) + self.again[1](x)[:, :3]


class Annealed(Net):
    """An object counts the calls of its loss."""

    class Schedule:
        def __init__(self):
            self.calls, self.history = 0, {"all": []}

        def weight(self):
            self.calls += 1
            self.history["all"].append(self.calls)
            return 1 + 0.01 * len(self.history["all"])

    def __init__(self):
        super().__init__()
        self.schedule = self.Schedule()

    def forward(self, x):
        return super().forward(x) * (self.schedule.weight() if self.training else 1)

    def get_logits(self, batch):
        self.schedule.weight()
        return super().get_logits(batch)

    def on_train_epoch_end(self):
        self.log("calls", float(self.schedule.calls))


class DrawsDeepInside(Net):
    """A generator in the last of many layers, and deep in there."""

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Sequential(nn.Sequential(DrawsDeepInside.Noise())))

        def forward(self, x):
            return self.inner(x)

    class Noise(nn.Module):
        def __init__(self):
            super().__init__()
            self.drawn = {"by": [torch.Generator().manual_seed(3)]}

        def forward(self, x):
            noise = torch.rand(x.shape, generator=self.drawn["by"][0])
            return x + noise if self.training else x

    def __init__(self):
        super().__init__()
        self.many = nn.Sequential(*(nn.Identity() for _ in range(100)), self.Noisy())

    def forward(self, x):
        return super().forward(self.many(x))


class Compiled(Net):
    """A part of it is compiled, as often as training needs it, and no more."""

    def __init__(self):
        super().__init__()
        self.graphs = 0
        self.backbone = torch.compile(self.backbone, backend=self.compiled)

    def compiled(self, graph, _):
        self.graphs += 1
        return graph.forward

    def on_train_epoch_end(self):
        self.log("graphs", float(self.graphs))


class _Drawing(torch.utils.data.Dataset):
    """Augments by a generator of its own."""

    def __init__(self, data):
        self.data, self.transforms = data, [np.random.default_rng(0), random.Random(0)]

    def __getitem__(self, index):
        x, y = self.data[index]
        return x + self.transforms[0].normal() + self.transforms[1].random(), y

    def __len__(self):
        return len(self.data)


class _Mapping(torch.utils.data.Dataset):
    def __init__(self, data):
        self.data = data

    def __getitem__(self, index):
        x, y = self.data[index]
        return {"x": x, "y": y}

    def __len__(self):
        return len(self.data)


MODULES = [
    Net,
    TwoNames,
    TwiceInALayer,
    TiedParameters,
    Counting,
    Renormalised,
    TakesApart,
    Prepares,
    DrawsItself,
    HidesATeacher,
    HidesATeacherDeeper,
    HidesItsOwnLayer,
    Annealed,
    DrawsDeepInside,
    Compiled,
]


def train(root, module_class, *callbacks, drawing=False, **options):
    L.seed_everything(0, verbose=False)
    module = module_class()
    trainer = make_trainer(root, *callbacks, **options)
    data = make_data(40)
    data = _Mapping(data) if module_class is TakesApart else _Drawing(data) if drawing else data
    before = snapshot(module)
    trainer.fit(module, DataLoader(data, 8, shuffle=True))
    return trainer, module, before, data


def structure(found):
    """Which objects a module has, without their values."""
    parameters, buffers, parts, _, *hooks = found
    return [row[:3] for row in parameters], [row[:2] for row in buffers], parts, hooks


@pytest.mark.parametrize("gradients", ["hooks", "vmap", "loop"])
@pytest.mark.parametrize("module_class", MODULES)
def test_training_and_module_are_the_same(tmp_path, module_class, gradients):
    def state(name, *callbacks):
        trainer, module, before, data = train(tmp_path / name, module_class, *callbacks)
        assert structure(snapshot(module)) == structure(before)
        optimizer = trainer.optimizers[0]
        held = {id(value) for group in optimizer.param_groups for value in group["params"]}
        assert held == {id(value) for value in module.parameters()}
        moments = [part[key] for part in optimizer.state_dict()["state"].values() for key in sorted(part)]
        return [*module.state_dict().values(), *moments, torch.rand(1)], trainer, module, data

    without, trainer, _, _ = state("without")
    metrics = trainer.callback_metrics
    gradients = "auto" if gradients == "vmap" and module_class in (Counting, Renormalised) else gradients
    with_trak, trainer, module, data = state("with", TRAKCallback(tmp_path / "store", gradients=gradients))
    assert all(torch.equal(one, other) for one, other in zip(without, with_trak, strict=True))
    assert metrics == trainer.callback_metrics
    store = FeatureStore(tmp_path / "store")
    assert [store[digest].complete for digest in store.digests] == [True] * 3

    before = snapshot(module)
    trainer.attribute(dataloaders=DataLoader(data, 5))
    trainer.attribute_self()
    assert snapshot(module) == before


def test_generators_of_a_dataset_are_put_back(tmp_path):
    _, without, _, _ = train(tmp_path / "without", Net, drawing=True)
    with pytest.warns(UserWarning, match="Two reads of the same train examples differ"):
        _, with_trak, _, _ = train(tmp_path / "with", Net, TRAKCallback(tmp_path / "store"), drawing=True)
    pairs = zip(without.state_dict().values(), with_trak.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


class _Augmenting(L.LightningDataModule):
    """Augments batches by a generator of its own."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def train_dataloader(self):
        return DataLoader(make_data(40), 8, shuffle=True)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0] + torch.rand((), generator=self.generator), batch[1]


def test_generators_of_a_datamodule_are_put_back(tmp_path):
    def trained(name, *callbacks):
        L.seed_everything(0, verbose=False)
        module, datamodule = Net(), _Augmenting()
        make_trainer(tmp_path / name, *callbacks).fit(module, datamodule=datamodule)
        return [*module.state_dict().values(), datamodule.generator.get_state()]

    without = trained("without")
    with pytest.warns(UserWarning, match="Two reads of the same train examples differ"):
        with_trak = trained("with", TRAKCallback(tmp_path / "store"))
    assert all(torch.equal(one, other) for one, other in zip(without, with_trak, strict=True))


def test_lazy_modules_are_refused_before_training_and_left_alone(tmp_path):
    class Lazy(Net):
        def __init__(self):
            super().__init__()
            self.head = nn.LazyLinear(3)

    def trained(name, module):
        L.seed_everything(1, verbose=False)
        make_trainer(tmp_path / name).fit(module, DataLoader(make_data(16), 8))
        return list(module.state_dict().values())

    L.seed_everything(0, verbose=False)
    without = trained("without", Lazy())
    L.seed_everything(0, verbose=False)
    module = Lazy()
    with pytest.raises(ValueError, match=r"head.weight has no shape yet.*Pass a batch"):
        make_trainer(tmp_path, TRAKCallback(tmp_path / "store")).fit(module, DataLoader(make_data(16), 8))
    assert module.head.has_uninitialized_params()
    after = trained("after", module)
    assert all(torch.equal(one, other) for one, other in zip(without, after, strict=True))
