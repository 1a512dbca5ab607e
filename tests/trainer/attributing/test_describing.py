"""Attributions know the ids, labels and predictions of their examples."""

from __future__ import annotations

import json

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset

import lightning_trak as lt
from lightning_trak import Attribution, TRAKCallback
from tests.conftest import Blobs, Classifier, make_data, make_trainer
from tests.trainer.references import fresh
from tests.trainer.test_ranks import run as run_in_processes

NAMES = ["ant", "bee", "cat"]
M = 7


def weights_of_last(root):
    paths = sorted((root / "files").iterdir(), key=lambda path: int(path.stem.removeprefix("epoch=")))
    return torch.load(paths[-1], weights_only=True)["state_dict"]


def predictions(root, data):
    model = Classifier()
    model.load_state_dict(weights_of_last(root))
    return model.eval()(data.tensors[0]).argmax(1).tolist()


def test_labels_and_predictions_are_those_of_the_last_checkpoint(run):
    root, trainer, _, data = run
    attribution = trainer.attribute()
    assert list(attribution.train.columns["label"]) == data.train_set.tensors[1].tolist()
    assert list(attribution.targets.columns["label"]) == data.test_set.tensors[1].tolist()
    assert list(attribution.targets.columns["prediction"]) == predictions(root, data.test_set)
    other = make_data(40, 5)  # on which the checkpoints differ
    found = fresh(root).attribute(Classifier(), DataLoader(other, 4), Blobs()).targets.columns["prediction"]
    assert list(found) == predictions(root, other)
    first = Classifier()
    first.load_state_dict(torch.load(root / "files" / "epoch=0.ckpt", weights_only=True)["state_dict"])
    assert first.eval()(other.tensors[0]).argmax(1).tolist() != list(found)


def test_all_ways_to_scores_know_them(run, tmp_path):
    root, trainer, *_ = run
    whole, extremes = trainer.attribute(), trainer.attribute(top_k=2, name="described")
    assert extremes.targets == whole.targets
    assert Attribution.load(root / "store" / "scores" / "described").targets == whole.targets
    one = fresh(root).attribute(Classifier(), datamodule=Blobs(), ckpt_path="last")
    assert one.targets.columns == whole.targets.columns


class Pictures(Dataset):
    """Like a folder of images: pairs of path and class, and names of classes."""

    def __init__(self, n, seed):
        self.x, y = make_data(n, seed).tensors
        self.targets, self.classes = y.tolist(), NAMES
        self.samples = [(f"{NAMES[label]}/{row}.png", label) for row, label in enumerate(self.targets)]

    def __len__(self):
        return len(self.x)

    def __getitem__(self, row):
        return self.x[row], self.targets[row]


class Folder(Blobs):
    def setup(self, stage):
        self.train_set, self.test_set = Pictures(self.n, self.seed), Subset(Pictures(20, 2), range(19, 2, -2))
        self.val_set = make_data(12, 1)


def test_ids_and_names_of_classes_come_from_the_data_sets(tmp_path):
    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store"), max_epochs=1)
    trainer.fit(Classifier(), datamodule=Folder())
    attribution = trainer.attribute()
    whole = Pictures(20, 2)
    assert list(attribution.train.ids) == [path for path, _ in Pictures(40, 0).samples]
    assert list(attribution.targets.ids) == [whole.samples[row][0] for row in range(19, 2, -2)]
    assert list(attribution.targets.columns["label"]) == [NAMES[whole.targets[row]] for row in range(19, 2, -2)]
    assert set(attribution.targets.columns["prediction"]) <= {*NAMES}
    unlabelled = DataLoader(whole.x, 4)
    columns = fresh(tmp_path).attribute(Classifier(), unlabelled, Folder()).targets.columns
    assert list(columns) == ["prediction"]
    assert set(columns["prediction"]) <= {*NAMES}


def test_the_status_counts_runs_and_parameters(run, tmp_path):
    root, trainer, model, _ = run
    whole = sum(value.numel() for value in model.parameters())
    info = trainer.attribute().info
    assert (info.runs, info.n_attributed, info.n_params) == (1, whole, whole)
    files = sorted((root / "files").iterdir())
    callback = TRAKCallback(tmp_path / "store", parameters="net.4.*")
    other = make_trainer(tmp_path, callback).attribute(Classifier(), datamodule=Blobs(), ckpt_path=files)
    assert (other.info.runs, other.info.n_attributed, other.info.n_params) == (0, 6 * 3 + 3, whole)
    assert f": 3 checkpoints, 21 of {whole} parameters by hooks, whitened, damping" in repr(other)


def test_without_a_train_set_examples_have_row_numbers(run):
    root, *_ = run
    attribution = fresh(root).attribute(Classifier(), DataLoader(make_data(M, 2), 4))
    assert list(attribution.train.ids) == list(range(40))
    assert not attribution.train.columns


class Describing(Classifier):
    """Says more, and notices what it must not."""

    def describe(self, batch):
        assert not torch.is_grad_enabled()
        assert not self.training
        self.log("described", 1.0)
        torch.rand(1)
        self.note = "left behind"
        norm = batch[0].norm(dim=1)
        return {"id": [f"{x:.6f}" for x in norm], "norm": norm, "far": norm > 2, **super().describe(batch)}


def test_a_module_may_name_any_column(run):
    root, *_ = run
    targets = make_data(M, 2)
    model, trainer = Describing(), fresh(root)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    found = trainer.attribute(model, DataLoader(targets, 3, shuffle=True), Blobs()).targets
    norms = targets.tensors[0].norm(dim=1)
    assert list(found.ids) == [f"{x:.6f}" for x in norms]
    assert found.columns["norm"] == pytest.approx(norms.tolist())
    assert list(found.columns["far"]) == (norms > 2).tolist()
    assert list(found.columns["label"]) == targets.tensors[1].tolist()
    assert not hasattr(model, "note")
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Failing(Classifier):
    def describe(self, batch):
        raise KeyError("caption")


class Lists(Classifier):
    def describe(self, batch):
        return {"x": batch[0]}


class Hooking(Classifier):
    def describe(self, batch):
        self.net[0].register_forward_hook(print)
        return {}


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Failing, "KeyError: 'caption'"),
        (Lists, "TypeError: The column 'x' has a value of type list"),
        (Hooking, "ModuleChanged: "),
    ],
)
def test_scores_are_not_lost_if_describing_fails(run, kind, why):
    root, *_ = run
    model = kind()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    targets = DataLoader(make_data(M, 2), 4)
    expected = fresh(root).attribute(Classifier(), targets, Blobs())
    with pytest.warns(UserWarning, match=f"{kind.__name__}.describe failed, .*{why}.*with_columns"):
        attribution = fresh(root).attribute(model, targets, Blobs())
    assert torch.equal(attribution.scores, expected.scores)
    assert list(attribution.targets.columns) == ["label"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.net[0]._forward_hooks


class Own(L.LightningModule):
    """Defines ``model_output`` alone, and a method that happens to have the name."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def model_output(self, batch):
        return self.layer(batch[0])[:, 0]

    def describe(self):
        raise AssertionError("was called")

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.softplus(-self.model_output(batch)).mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Unsuited(lt.ClassificationMixin, Own):
    """Overrides the output: the inherited description does not understand the batch."""

    model_output = Own.model_output


def test_a_method_that_is_not_of_the_mixin_is_not_called(tmp_path):
    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store"), max_epochs=1)
    trainer.fit(Own(), datamodule=Blobs())
    assert list(trainer.attribute().targets.columns) == ["label"]


def test_a_description_that_is_inherited_and_does_not_suit_is_left_out(tmp_path, said):
    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store"), max_epochs=1)
    trainer.fit(Unsuited(), datamodule=Blobs())
    assert list(trainer.attribute().targets.columns) == ["label"]
    assert any("labels and predictions of targets are not known" in line for line in said())


def test_all_processes_end_with_the_same(tmp_path):
    run_in_processes(tmp_path / "run", "ddp", 2)
    told = [json.loads((tmp_path / "run" / f"targets-{rank}.json").read_text()) for rank in range(2)]
    assert told[0] == told[1]
    assert set(told[0]) == {"label", "prediction"}
