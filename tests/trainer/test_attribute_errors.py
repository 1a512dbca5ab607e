"""What attribute refuses or tells of, and how it says so."""

from __future__ import annotations

import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

import lightning_trak as lt
from lightning_trak import FeatureStore, TRAKCallback
from lightning_trak.store.checkpoint import CheckpointEntry
from lightning_trak.store.weights import load_weights, read_weights, weights_digest
from tests.conftest import Blobs, Classifier, make_data, make_trainer
from tests.trainer.references import fresh

# ---------------------------------------------------------------------------------------------------- bad input


def test_no_callback(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"no TRAKCallback.*callbacks=\[TRAKCallback"):
        make_trainer(tmp_path).attribute(Classifier(), datamodule=Blobs())


def test_two_callbacks(tmp_path):
    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "a"))
    trainer.callbacks.append(TRAKCallback(tmp_path / "b"))
    with pytest.raises(MisconfigurationException, match="2 TRAKCallbacks"):
        trainer.attribute(Classifier(), datamodule=Blobs())


def test_no_model(tmp_path):
    with pytest.raises(TypeError, match="needs a model"):
        fresh(tmp_path).attribute(datamodule=Blobs())


def test_model_without_model_output(run):
    with pytest.raises(MisconfigurationException, match="does not define model_output"):
        run[1].attribute(L.LightningModule())


def test_no_store_or_an_empty_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no feature store.*ckpt_path"):
        fresh(tmp_path).attribute(Classifier(), datamodule=Blobs())
    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store"), enable_checkpointing=False)
    trainer.fit(Classifier(), datamodule=Blobs())
    store = FeatureStore(tmp_path / "store")
    store.discard(store.digests[0])
    with pytest.raises(MisconfigurationException, match="has no checkpoints.*ckpt_path"):
        trainer.attribute()


def test_no_targets(run):
    class NoTargets(Blobs):
        test_dataloader = L.LightningDataModule.test_dataloader

    with pytest.raises(
        MisconfigurationException, match=r"attribute_dataloader, predict_dataloader\s+nor test_dataloader"
    ):
        run[1].attribute(datamodule=NoTargets())


class Stream(IterableDataset):
    def __iter__(self):
        yield from make_data(4)


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        (DataLoader(Stream(), 2), TypeError, "iterable dataset"),
        (DataLoader(Subset(make_data(4), []), 2), ValueError, "empty dataset"),
        ([DataLoader(make_data(4)), DataLoader(make_data(4))], TypeError, "expected one"),
        (make_data(4), TypeError, "expected one torch.utils.data.DataLoader"),
    ],
)
def test_targets_without_rows(run, loader, error, message):
    with pytest.raises(error, match=message):
        run[1].attribute(dataloaders=loader)


@pytest.mark.parametrize("limit", [{"limit_predict_batches": 1}, {"limit_test_batches": 0.5}])
def test_limits_that_truncate(run, limit):
    root = run[0]
    trainer = make_trainer(root, TRAKCallback(root / "store"), **limit)
    kind = next(iter(limit))
    loaders = (
        {"dataloaders": DataLoader(make_data(5), 2)} if kind == "limit_predict_batches" else {"datamodule": Blobs()}
    )
    with pytest.raises(MisconfigurationException, match=f"{kind}=.* leaves examples out"):
        trainer.attribute(Classifier(), **loaders)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Blobs(n=41), r"another train set: 40 examples, here 41, .* 40 of 40 compared rows differ, .* row 0: "),
        (
            Blobs(seed=9),
            "another train set: as many examples as here, 40, with other content: .* first of them row 0: ",
        ),
    ],
)
def test_other_data_than_the_stores(run, data, message):
    with pytest.raises(ValueError, match=message):
        fresh(run[0]).attribute(Classifier(), datamodule=data)


def test_checkpoints_that_do_not_fit(tmp_path, run):
    root, trainer, _, _ = run
    torch.save(Classifier(hidden=9).state_dict(), tmp_path / "wide.pt")
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pt")
    n = len(FeatureStore(root / "store"))
    with pytest.raises(ValueError, match=r"does not fit Classifier: net.0.weight: shape \(9, 4\).*\(6, 4\)"):
        trainer.attribute(ckpt_path=tmp_path / "wide.pt")
    with pytest.raises(ValueError, match=r"does not fit Classifier: missing: net.0.weight"):
        trainer.attribute(ckpt_path=[tmp_path / "other.pt"])
    torch.save(Classifier().net.state_dict(), tmp_path / "net.pt")
    with pytest.raises(ValueError, match=r"those of its part 'net': load them into module\.net, and save module\."):
        trainer.attribute(ckpt_path=tmp_path / "net.pt")
    with pytest.raises(FileNotFoundError, match="which is no file"):
        trainer.attribute(ckpt_path=tmp_path / "nowhere.pt")
    with pytest.raises(ValueError, match="empty list"):
        trainer.attribute(ckpt_path=[])
    assert len(FeatureStore(root / "store")) == n
    with pytest.raises(ValueError, match=r"parameters.net.0.weight=\[6, 4\], but here"):
        fresh(root).attribute(Classifier(hidden=9), datamodule=Blobs())


def test_damaged_store(tmp_path):
    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store"), max_epochs=1)
    trainer.fit(Classifier(), datamodule=Blobs())
    entry = next(iter(FeatureStore(tmp_path / "store")))
    scores = trainer.attribute().scores
    for path in (entry.train.path(0), entry.weights_path, entry.path / "meta.json"):
        content = path.read_bytes()
        flipped = bytearray(content)
        for place in range(len(flipped) // 3, 2 * len(flipped) // 3):
            flipped[place] ^= 0xFF
        for damaged in (content[:-9], bytes(flipped), b""):
            path.write_bytes(damaged)
            if path == entry.train.path(0):
                with pytest.warns(UserWarning, match=f"{path.name}' is damaged.*1 files are computed again"):
                    torch.testing.assert_close(trainer.attribute().scores, scores)
            else:
                with pytest.raises(ValueError, match=f"{path.name}.* is damaged.*Delete the folder '{entry.path}'"):
                    trainer.attribute()
            path.write_bytes(content)
    path = entry.weights_path
    path.unlink()
    with pytest.raises(ValueError, match=f"{path.name}.* is damaged: it is missing"):
        trainer.attribute()


def test_a_checkpoint_that_training_discards_in_the_meantime_is_left_out(tmp_path, monkeypatch):
    files = [tmp_path / f"{seed}.pt" for seed in range(2)]
    modules = [Classifier() for _ in files]
    for module, file in zip(modules, files, strict=True):
        torch.nn.init.normal_(module.net[0].weight)
        torch.save(module.state_dict(), file)
    expected = fresh(tmp_path / "one").attribute(Classifier(), datamodule=Blobs(), ckpt_path=files[0]).scores
    digests, load = [weights_digest(read_weights(file)) for file in files], CheckpointEntry.weights

    def discarding(entry):
        FeatureStore(tmp_path / "store").discard(digests[1])
        return load(entry)

    monkeypatch.setattr(CheckpointEntry, "weights", discarding)
    with pytest.warns(UserWarning, match=f"{digests[1]} was deleted from the store in the meantime, and is left out"):
        found = fresh(tmp_path).attribute(Classifier(), datamodule=Blobs(), ckpt_path=files)
    assert found.info.checkpoints == (digests[0],)
    torch.testing.assert_close(found.scores, expected)


def test_damage_without_a_train_set_is_an_error_with_a_remedy(tmp_path):
    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store"), max_epochs=1)
    data = Blobs()
    trainer.fit(Classifier(), datamodule=data)
    data.setup("test")
    trainer, targets = fresh(tmp_path), data.test_dataloader()
    trainer.attribute(Classifier(), targets)
    entry = next(iter(FeatureStore(tmp_path / "store")))
    entry.train.path(0).write_bytes(b"damaged")
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(MisconfigurationException, match="There is no train set"),
    ):
        trainer.attribute(Classifier(), targets)


@pytest.mark.parametrize("row", [3, 33])  # among those tried first, and later
def test_targets_with_nan_are_named(run, row):
    x, y = make_data(40).tensors
    x = x.index_fill(0, torch.tensor([row]), float("nan"))
    with pytest.raises(ValueError, match=rf"infinite for target rows {row}\. Look at these targets") as raised:
        run[1].attribute(dataloaders=DataLoader(TensorDataset(x, y), 2))
    assert not {"delete", "diverge"} & set(str(raised.value).replace("?", " ").split())  # no checkpoint is to blame


DRAWS_NONE = "draws none for its own model_output and loss"
NOT_THOSE = r"stored \w+ of train rows .* are not those that"


@pytest.mark.parametrize(
    ("change", "message"),
    [("temperature", NOT_THOSE), ("inputs", NOT_THOSE), ("loss", DRAWS_NONE), ("output", DRAWS_NONE)],
)
def test_a_model_that_has_changed_since(run, change, message):
    class Changed(Classifier):
        temperature = 2.0 if change == "temperature" else 1.0

    class OtherOutput(Classifier):
        def model_output(self, batch):
            return super().model_output(batch) * 1.2

    class OtherLoss(Classifier):
        def output_to_loss(self, output, batch):
            return super().output_to_loss(output, batch) * 1.2

    class ChangedData(Blobs):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return (batch[0] * 1.3, batch[1]) if change == "inputs" else batch

    root, _, _, _ = run
    module = {"output": OtherOutput, "loss": OtherLoss}.get(change, Changed)()
    with pytest.raises(ValueError, match=f"{message}.*another dirpath"):
        fresh(root).attribute(module, datamodule=ChangedData())


def test_another_precision_than_the_trainings(tmp_path):
    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store"), precision="bf16-true", max_epochs=1)
    trainer.fit(Classifier(), datamodule=Blobs())
    expected = trainer.attribute().scores
    with pytest.raises(ValueError, match=r"is torch.bfloat16, the model's torch.float32 .*Use the precision"):
        fresh(tmp_path).attribute(Classifier(), datamodule=Blobs())
    again = make_trainer(tmp_path, TRAKCallback(tmp_path / "store"), precision="bf16-true")
    torch.testing.assert_close(again.attribute(Classifier(), datamodule=Blobs()).scores, expected)


@pytest.mark.parametrize("top_k", [0, -1, 2.5, True])
def test_top_k_is_checked(run, top_k):
    with pytest.raises(ValueError, match="top_k must be a positive integer"):
        run[1].attribute(top_k=top_k)


def test_without_damping_too_few_examples_are_an_error(tmp_path, run):
    files = sorted((run[0] / "files").iterdir())
    with pytest.raises(ValueError, match=r"damping=0.*n=40.*meaningless"):
        fresh(tmp_path, damping=0).attribute(Classifier(), datamodule=Blobs(), ckpt_path=files)


@pytest.mark.parametrize("form", [lambda x: TensorDataset(x), lambda x: list(x), lambda x: [{"x": row} for row in x]])
def test_targets_without_labels_are_of_the_class_that_the_last_checkpoint_predicts(run, form):
    """At all checkpoints the same, though they predict others."""
    root, trainer, _, _ = run
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(5))
    store, predicted = FeatureStore(root / "store"), []
    for entry in map(store.__getitem__, store.digests):
        model = Classifier().eval()
        model.load_state_dict(load_weights(entry.weights_path, entry.digest))
        predicted.append(model(x).argmax(1).detach())
    assert (predicted[0] != predicted[-1]).any()
    expected = trainer.attribute(dataloaders=DataLoader(TensorDataset(x, predicted[-1]), 20)).scores
    scores = trainer.attribute(dataloaders=DataLoader(form(x), 20)).scores
    torch.testing.assert_close(scores, expected)


def test_a_datamodule_in_the_first_place_is_the_datamodule(run):
    _, trainer, _, data = run
    by_name = trainer.attribute(datamodule=data).scores
    assert torch.equal(trainer.attribute(data).scores, by_name)
    assert torch.equal(trainer.attribute(data, DataLoader(make_data(7, 2), 3)).scores, by_name)
    assert torch.equal(trainer.attribute_self(data), trainer.attribute_self(datamodule=data))
    with pytest.raises(TypeError, match="Several datamodules were passed"):
        trainer.attribute(data, datamodule=data)


def test_freezing_the_model_before_attribute_changes_no_score(tmp_path):
    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store"))
    trainer.fit(Classifier(hidden=32), datamodule=Blobs())
    before = trainer.attribute()
    assert before.info.temperature == 1.3
    trainer.lightning_module.freeze()
    after = trainer.attribute()
    assert after.info == before.info
    assert torch.equal(after.scores, before.scores)
    assert torch.equal(trainer.attribute_self(), trainer.attribute_self())


@pytest.mark.parametrize(
    "options", [{"estimator": "paper"}, {"estimator": "trak", "temperature": 1.3}, {"overwrite": 1}]
)
def test_wrong_choices_of_the_estimator_are_refused(options):
    with pytest.raises((ValueError, TypeError), match=r"estimator|overwrite"):
        TRAKCallback(**options)


def test_weights_that_setup_draws_anew_are_told_of(tmp_path):
    class DrawsAnew(Classifier):
        def setup(self, stage):
            torch.nn.init.normal_(self.net[0].weight)

        def test_dataloader(self):
            return DataLoader(make_data(7, 2), 3)

    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store"), max_epochs=1)
    module = DrawsAnew()
    trainer.fit(module, DataLoader(make_data(40), 8), DataLoader(make_data(12, 1), 6))
    with pytest.warns(
        UserWarning, match=r"DrawsAnew has other weights now than before: net\.0\.weight has other values"
    ):
        trainer.attribute()


class Bigram(lt.LanguageModelingMixin, L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(5, 5)

    def forward(self, input_ids):
        return self.table(input_ids)

    def training_step(self, batch, batch_idx):
        return self.output_to_loss(self.model_output(batch), batch).mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)


def test_targets_that_nothing_is_left_of_are_told_of(tmp_path):
    tokens = torch.randint(0, 5, (20, 6), generator=torch.Generator().manual_seed(0))
    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store"))
    trainer.fit(Bigram(), DataLoader([{"input_ids": row} for row in tokens], 5))
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[1], mask[3, 1:] = False, False  # the first token is not predicted
    targets = [{"input_ids": row, "output_mask": keep} for row, keep in zip(tokens, mask, strict=False)]
    with pytest.warns(UserWarning, match=r"zero for 2 targets \(rows 1, 3\), so all of their scores are") as caught:
        scores = trainer.attribute(dataloaders=DataLoader(targets, 2)).scores
    assert sum("so all of their scores are" in str(warning.message) for warning in caught) == 1  # of three checkpoints
    assert (scores == 0).all(0).tolist() == [False, True, False, True]


def test_targets_without_a_gradient_of_some_parameters_are_no_matter_of_a_warning(tmp_path, said):
    class Dead(Classifier):
        def model_output(self, batch):
            return self.net[0].weight.sum() * (batch[0][:, 0] > 0) + super().model_output(batch).detach()

    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store", parameters="net.0.weight"), max_epochs=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "On the first batch Dead")  # it is not what is trained
        trainer.fit(Dead(), datamodule=Blobs())
    scores = trainer.attribute().scores
    zero = (scores == 0).all(0)
    assert 0 < zero.sum() < 7
    (line,) = [line for line in said() if "so all of their scores are" in line]
    assert f"is zero for {zero.sum()} targets" in line


class LooksAhead(Classifier):
    """Each example depends on the next; of the last nothing is to be seen."""

    def model_output(self, batch):
        x = batch[0].sum(1)
        return super().model_output(batch) + torch.cat([x[1:], x[-1:]])


def test_outputs_that_depend_on_the_next_example_are_refused_without_fit(tmp_path, run):
    files = sorted((run[0] / "files").iterdir())
    with pytest.raises(ValueError, match="for train row 0 in a batch"):
        fresh(tmp_path).attribute(LooksAhead(), datamodule=run[3], ckpt_path=files[:1])


def test_a_loader_in_the_place_of_the_model_is_told_its_place(run):
    with pytest.raises(TypeError, match=r"Pass targets with dataloaders=\.\.\."):
        run[1].attribute(DataLoader(make_data(7, 2), 3))
