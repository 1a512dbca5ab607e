"""What loggers are told during `fit`: real ones of Lightning, as far as they need no server."""

from __future__ import annotations

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_trak import FeatureStore, TRAKCallback
from tests.conftest import Blobs, Classifier, make_trainer

NUMBERS = ["checkpoints_featurized", "checkpoints_waiting", "curvature_seconds", "featurizing_seconds"]


def fit(root, *loggers, data=None, **options):
    torch.manual_seed(0)
    trak, saving = TRAKCallback(root / "store", **options), ModelCheckpoint(root / "files", save_top_k=-1)
    trainer = make_trainer(root, trak, saving, logger=list(loggers), log_every_n_steps=2)
    trainer.fit(Classifier(), datamodule=data or Blobs())
    return trainer


def check_largest(root, rows):
    """Are these the rows of the 20 largest |Q|, averaged over checkpoints? A loop over what is stored; returns all."""
    entries = list(FeatureStore(root / "store"))
    means = [np.mean([abs(float(entry.loss_grad[row])) for entry in entries]) for row in range(40)]
    assert len(set(rows)) == 20
    assert [means[row] for row in rows] == pytest.approx(sorted(means)[:-21:-1], rel=1e-5)
    return means


def lines_of(path):
    with path.open(newline="") as file:
        return [line for line in csv.DictReader(file) if line.get("trak/checkpoints_featurized")]


@pytest.mark.parametrize("options", [{}, {"budget": 0}, {"featurize_on": "fit_end"}])
def test_csv_has_a_line_for_each_checkpoint(tmp_path, options):
    fit(tmp_path, CSVLogger(tmp_path / "logs"), **options)
    (path,) = (tmp_path / "logs").rglob("metrics.csv")
    lines = lines_of(path)
    assert [float(line["trak/checkpoints_featurized"]) for line in lines] == [1, 2, 3]
    waiting = [float(line["trak/checkpoints_waiting"]) for line in lines]
    assert waiting == ([2, 1, 0] if options else [0, 0, 0])
    steps = [int(line["step"]) for line in lines]
    assert steps == ([15, 15, 15] if options else [5, 10, 15])
    assert all(0 < float(line["trak/featurizing_seconds"]) < 100 for line in lines)
    assert all(0 < float(line["trak/curvature_seconds"]) < 100 for line in lines)
    assert "trak/share_of_training_time" in lines[0]


def test_tensorboard_has_scalars_and_a_table(tmp_path):
    fit(tmp_path, TensorBoardLogger(tmp_path, name="", version="logs"))
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    for name in NUMBERS:
        assert [event.step for event in events.Scalars(f"trak/{name}")] == [5, 10, 15]
    (event,) = events.Tensors("trak/largest_loss_gradients/text_summary")
    titles, _, *rows = event.tensor_proto.string_val[0].decode().splitlines()
    assert titles == "| row | label | loss gradient |"
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    means = check_largest(tmp_path, [int(cell[0]) for cell in cells])
    data = Blobs()
    data.setup("fit")
    for row, label, value in cells:
        assert int(label) == data.train_set[int(row)][1]
        assert float(value) == pytest.approx(means[int(row)], rel=1e-3)


def test_wandb_has_numbers_and_a_table(tmp_path, monkeypatch):
    for name in ("WANDB_SILENT", "WANDB_MODE"):
        monkeypatch.setenv(name, {"WANDB_SILENT": "true", "WANDB_MODE": "offline"}[name])
    logger = WandbLogger(project="digits", offline=True, save_dir=tmp_path)
    fit(tmp_path, logger)
    assert logger.experiment.summary["trak/checkpoints_featurized"] == 3
    logger.experiment.finish()
    (path,) = tmp_path.rglob("*.table.json")
    found = json.loads(path.read_text())
    assert found["columns"] == ["row", "label", "loss gradient"]
    check_largest(tmp_path, [row[0] for row in found["data"]])


class Tables(Logger):
    """Has an experiment that takes tables."""

    name, version = "recording", "0"

    def __init__(self):
        super().__init__()
        self.numbers, self.tables = [], []
        self.experiment = SimpleNamespace(log_table=lambda *table: self.tables.append(table))

    def log_metrics(self, metrics, step=None):
        self.numbers.append(metrics)

    def log_hyperparams(self, *args, **kwargs):
        pass


class Recording(Tables):
    """Takes tables as the client of MLflow does: `experiment.log_table(run_id, data, artifact_file)`."""

    run_id = "a1"


class Manual(Classifier):
    """Two optimizers, so that `global_step` counts twice."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.manual_backward(loss)
            optimizer.step()
        self.log("loss", loss, on_step=True)

    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), 0.1) for _ in range(2)]


def test_steps_are_those_of_the_other_curves(tmp_path):
    trak, saving = TRAKCallback(tmp_path / "store"), ModelCheckpoint(tmp_path / "files", save_top_k=-1)
    trainer = make_trainer(tmp_path, trak, saving, logger=CSVLogger(tmp_path / "logs"), log_every_n_steps=1)
    trainer.fit(Manual(), datamodule=Blobs())
    assert trainer.global_step == 30
    (path,) = (tmp_path / "logs").rglob("metrics.csv")
    with path.open(newline="") as file:
        steps = [int(line["step"]) for line in csv.DictReader(file) if line["loss"]]
    assert steps == list(range(15))
    assert [int(line["step"]) for line in lines_of(path)] == [5, 10, 15]


def test_a_logger_that_takes_no_table_is_not_warned_of(tmp_path):
    """As the experiment of Comet, whose `log_table` has other arguments."""
    logger = Tables()
    fit(tmp_path, logger)
    assert not logger.tables


class Bare(Tables):
    def __init__(self):
        super().__init__()
        del self.experiment


def test_a_logger_without_an_experiment_is_not_warned_of(tmp_path):
    logger = Bare()
    fit(tmp_path, logger)
    assert sum("trak/featurizing_seconds" in numbers for numbers in logger.numbers) == 3


def test_mlflow_has_a_table(tmp_path):
    logger = Recording()
    fit(tmp_path, logger)
    ((run, columns, file),) = logger.tables
    assert (run, file, list(columns)) == ("a1", "trak/largest_loss_gradients.json", ["row", "label", "loss gradient"])
    check_largest(tmp_path, columns["row"])


class Broken(Recording):
    def log_metrics(self, metrics, step=None):
        if any(name.startswith("trak/") for name in metrics):
            raise ConnectionError("no route to host")


def test_training_goes_on_without_a_logger_that_fails(tmp_path):
    with pytest.warns(UserWarning, match="could not log to Broken: ConnectionError: no route to host") as caught:
        trainer = fit(tmp_path, Broken())
    assert sum("could not log" in str(warning.message) for warning in caught) == 1
    assert trainer.global_step == 15
    assert all(entry.complete for entry in FeatureStore(tmp_path / "store"))


def test_there_is_no_time_of_a_curvature_without_one(tmp_path):
    fit(tmp_path, CSVLogger(tmp_path / "logs"), preconditioner="none")
    (path,) = (tmp_path / "logs").rglob("metrics.csv")
    assert "trak/curvature_seconds" not in lines_of(path)[0]
    assert float(lines_of(path)[0]["trak/featurizing_seconds"]) > 0


class Named(Blobs):
    """Examples whose ids would break a table in Markdown."""

    def setup(self, stage):
        super().setup(stage)
        if stage == "fit":
            self.train_set.samples = [(f"<b>|{row}|</b>\n.png", 0) for row in range(40)]


def test_ids_stay_in_their_cell(tmp_path):
    fit(tmp_path, TensorBoardLogger(tmp_path, name="", version="logs"), data=Named())
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    (event,) = events.Tensors("trak/largest_loss_gradients/text_summary")
    rows = event.tensor_proto.string_val[0].decode().splitlines()
    assert len(rows) == 22
    assert "<b>" not in "".join(rows)
