"""TRAKCLI as a user of the command line sees it: the same YAML for all subcommands, text on stdout, and files."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_trak import TRAKCLI, Attribution, TRAKCallback, TRAKMixin
from lightning_trak.projection import SparseProjector
from lightning_trak.results.numbers import number_text
from tests.conftest import Blobs, Classifier, make_data, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")  # Lightning's own

ROOT = Path(__file__).parents[2]
N, M = 40, 7
CALLBACKS = [{"class_path": "lightning_trak.TRAKCallback", "init_args": {"dirpath": "store", "proj_dim": 16}}]
TRAINER = {
    "max_epochs": 2,
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "callbacks": CALLBACKS,
}
CONFIG = {"seed_everything": 0, "trainer": TRAINER, "data": {"n": N}}


class Boring(TRAKMixin, BoringModel):
    """A module and a datamodule that nobody here wrote."""

    def model_output(self, batch):
        return -(self(batch) - 1).square().mean(1).sqrt()

    def output_to_loss(self, output, batch):
        return output.square()


class Validated(Blobs):
    def setup(self, stage):
        super().setup("fit" if stage == "validate" else stage)


def call(*arguments, model=Classifier, data=Blobs, **options):
    """What a process with these arguments does, in this one and in its folder."""
    return TRAKCLI(model, data, args=[str(one) for one in arguments], **options)


def write(config=CONFIG):
    Path("trak.yaml").write_text(yaml.safe_dump(config))


@pytest.fixture(autouse=True)
def _no_other_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py"])


@pytest.fixture(scope="module")
def _trained(tmp_path_factory):
    folder, before = tmp_path_factory.mktemp("trained"), Path.cwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["main.py"])
        patch.chdir(folder)
        write()
        call("fit", "-c", "trak.yaml")
    assert Path.cwd() == before
    return folder


@pytest.fixture
def trained(_trained, tmp_path, monkeypatch):
    """A copy of the folder after ``fit``, which is the working directory."""
    folder = Path(shutil.copytree(_trained, tmp_path / "trained"))
    monkeypatch.chdir(folder)
    return folder


def reference(folder):
    """A trainer without the command line, on the same store."""
    return make_trainer(folder, TRAKCallback(folder / "store", proj_dim=16))


def scores_of(folder):
    return reference(folder).attribute(Classifier(), datamodule=Blobs(N)).scores


def table_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_scores_are_printed_and_written(trained, capsys):
    scores = scores_of(trained)
    capsys.readouterr()
    call("attribute", "-c", "trak.yaml", "--k", 2, "--csv", "out/scores.csv", "--report", "out/report.html")
    out = capsys.readouterr().out
    assert out.startswith(f"Attribution of {N} training examples for {M} targets: ")
    ranked = sorted(range(N), key=lambda row: -scores[row, 0].item())
    printed = re.search(r"^Target 0: label \d, prediction \d, output .*\n.*\n(.*)\n(.*)$", out, re.M).groups()
    for line, best, worst in zip(printed, ranked, reversed(ranked), strict=False):
        cells = line.split()
        assert (int(cells[1]), int(cells[4])) == (best, worst)
        assert float(cells[0]) == pytest.approx(scores[best, 0].item(), rel=0.01)
    assert out.count("\nTarget ") == 5
    assert f"\n{M - 5} more targets. The scores are not saved; '--name NAME' saves them in the store.\n" in out
    assert [int(row["train_id"]) for row in table_of("out/scores.csv")][:2] == ranked[:2]
    assert "The table is in 'out/scores.csv'.\nThe report is in 'out/report.html'.\n" in out
    features = make_data(N).tensors[0]
    page = Path("out/report.html").read_text(encoding="utf-8")
    assert number_text(features[ranked[0], 0].item()) in page, "examples are not drawn"
    assert not Path("store/scores").exists()


def test_scores_are_saved_by_name(trained, capsys):
    call("attribute", "-c", "trak.yaml", "--name", "first one")
    torch.testing.assert_close(Attribution.load("store/scores/first one").scores, scores_of(trained))
    assert "All are shown by:\npython -m lightning_trak top store --name 'first one'\n" in capsys.readouterr().out


def test_a_file_that_cannot_be_written_is_told_before_the_work(trained, tmp_path):
    (tmp_path / "file").write_text("")
    for file in (tmp_path, tmp_path / "file" / "scores.csv"):
        with pytest.raises(OSError, match="cannot be written. Name a file in a folder that you may write to"):
            call("attribute", "-c", "trak.yaml", "--csv", file)


def test_extremes_alone(trained, capsys):
    call("attribute", "-c", "trak.yaml", "--top_k", 1, "--name", "few")
    with pytest.raises(AttributeError, match="Only the 1 highest"):
        _ = Attribution.load("store/scores/few").scores
    assert re.search(r"^Target 0.*\n.*\n.*\n\nTarget 1", capsys.readouterr().out, re.M)  # one rank


def test_a_forecast(trained, capsys):
    call("attribute", "-c", "trak.yaml", "--dry_run", "true", "--name", "none")
    assert re.match(r"stage +time +disk +memory\ntargets .*\n(.*\n)*together .* free\)\n", capsys.readouterr().out)
    assert not Path("store/scores").exists()


def test_checkpoint_files(trained):
    """One file, which also tells hyperparameters; or a list."""
    other = make_trainer("other", max_epochs=1)
    other.fit(Classifier(hidden=5), Blobs(N))
    other.save_checkpoint("other.ckpt")
    other.fit_loop.max_epochs = 2
    other.fit(Classifier(hidden=5), Blobs(N))
    other.save_checkpoint("more.ckpt")
    write({**CONFIG, "trainer": {**TRAINER, "callbacks": [{"class_path": "lightning_trak.TRAKCallback"}]}})
    for given, count in (("other.ckpt", 1), ("[other.ckpt, more.ckpt]", 2)):
        call("attribute", "-c", "trak.yaml", "--model.hidden", 5, "--ckpt_path", given, "--name", "files")
        assert len(Attribution.load("trak/scores/files").info.checkpoints) == count
    call("attribute", "-c", "trak.yaml", "--ckpt_path", "other.ckpt", "--name", "told")
    assert len(Attribution.load("trak/scores/told").info.checkpoints) == 1


def test_self_influence(trained, capsys):
    expected = reference(trained).attribute_self(Classifier(), datamodule=Blobs(N)).tolist()
    call("attribute_self", "-c", "trak.yaml", "--k", 3, "--csv", "self.csv")
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"The highest self-influences of {N} training examples:"
    highest = sorted(range(N), key=lambda row: -expected[row])
    assert [int(line.split()[0]) for line in lines[1:4]] == highest[:3]
    assert lines[4:] == ["All of them are in 'self.csv'."]
    assert [float(row["self_influence"]) for row in table_of("self.csv")] == pytest.approx(expected)


def test_suspects(trained, capsys):
    expected = reference(trained).suspects(Classifier(), datamodule=Blobs(N), targets=True)
    call("suspects", "-c", "trak.yaml", "--targets", "true", "--csv", "suspects.csv")
    assert capsys.readouterr().out == f"{expected}\nAll training examples are in 'suspects.csv'.\n"
    rows = table_of("suspects.csv")
    assert [int(row["row"]) for row in rows] == expected.indices.tolist()
    assert [row["wrong"] for row in rows] == ["; ".join(one.wrong) for one in expected]


def test_results_for_a_program(trained):
    found = []

    class Own(TRAKCLI):
        def attribute(self, *arguments, **options):
            found.append(super().attribute(*arguments, **options))

    Own(Classifier, Blobs, args=["attribute", "-c", "trak.yaml"])
    torch.testing.assert_close(found[0].scores, scores_of(trained))


def test_configurations_are_neither_replaced_nor_in_the_way(trained):
    first = Path("config.yaml").read_text()
    call("attribute", "-c", "trak.yaml")
    assert sorted(path.name for path in trained.glob("*.yaml")) == ["config.yaml", "trak.yaml"]
    for number in (1, 2):
        call("validate", "-c", "trak.yaml", "--data.batch_size", 4 + number, data=Validated)
        assert yaml.safe_load(Path(f"config-{number}.yaml").read_text())["data"]["batch_size"] == 4 + number
    assert Path("config.yaml").read_text() == first
    call("validate", "-c", "trak.yaml", "--data.batch_size", 9, data=Validated, save_config_kwargs={"overwrite": True})
    assert yaml.safe_load(Path("config.yaml").read_text())["data"]["batch_size"] == 9


def test_a_trainer_without_the_callback(trained):
    write({**CONFIG, "trainer": {**TRAINER, "callbacks": None}})
    for name in ("attribute", "attribute_self", "suspects"):
        with pytest.raises(
            MisconfigurationException, match="The Trainer has no TRAKCallback. Add these lines"
        ) as error:
            call(name, "-c", "trak.yaml")
    told = yaml.safe_load(str(error.value).split("fit:\n", 1)[1])
    write({**CONFIG, "trainer": {**TRAINER, **told["trainer"]}})
    Path("store").rename("attributions")
    call("attribute", "-c", "trak.yaml", "--trainer.callbacks.proj_dim", 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attribute", "--k", 0], "k must be a positive integer, got 0"),
        (["attribute_self", "--k", -1], "k must be a positive integer, got -1"),
        (["attribute", "--top_k", 0], "top_k must be a positive integer"),
        (["attribute", "--report", "report.txt"], "report must end in .html"),
        (["attribute", "--name", "a/b"], "name must be usable as a folder name"),
    ],
)
def test_wrong_values_are_told_before_any_work(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)  # without a store, which would be the next error
    write()
    with pytest.raises(ValueError, match=message):
        call(*arguments, "-c", "trak.yaml")


@pytest.mark.parametrize("arguments", [["attribute", "--rows", "3"], ["attribute", "--top_k", "few"], ["attributes"]])
def test_wrong_options(trained, capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        call(*arguments, "-c", "trak.yaml")
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_classes_of_the_other_package():
    import pytorch_lightning as pl

    class Other(pl.LightningModule):
        pass

    with pytest.raises(TypeError, match="model_class must be of lightning.pytorch, .* got Other of pytorch_lightning"):
        call("fit", model=Other)


def test_arguments_of_the_callback():
    """None, numbers or "auto", lists and objects, as YAML has them."""
    projector = {"class_path": "lightning_trak.projection.SparseProjector", "init_args": {"proj_dim": 8}}
    given = {"dirpath": None, "projector": projector, "proj_dim": 8, "parameters": ["net.*"], "damping": 0.5}
    callback = {"class_path": "lightning_trak.TRAKCallback", "init_args": {**given, "temperature": "auto"}}
    cli = TRAKCLI(Classifier, Blobs, run=False, args={"trainer": {**TRAINER, "callbacks": [callback]}})
    found = next(one for one in cli.trainer.callbacks if isinstance(one, TRAKCallback))
    assert isinstance(found.projector, SparseProjector)
    assert (found.dirpath, found.projector.proj_dim, found.parameters) == (None, 8, ["net.*"])
    assert (found.damping, found.temperature, found.batch_size) == (0.5, "auto", None)


def test_a_module_that_nobody_here_wrote(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write({"seed_everything": 0, "trainer": TRAINER})
    for name in ("fit", "attribute", "suspects"):
        call(name, "-c", "trak.yaml", model=Boring, data=BoringDataModule)
    assert "Attribution of 64 training examples for 64 targets: 2 checkpoints of 1 run" in capsys.readouterr().out


def test_processes_and_help(trained):
    Path("main.py").write_text(
        "import sys\nimport lightning_trak\nassert 'lightning.pytorch.cli' not in sys.modules\n"
        "from lightning_trak import TRAKCLI\nfrom tests.conftest import Blobs, Classifier\nTRAKCLI(Classifier, Blobs)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}

    def process(*arguments):
        command = [sys.executable, "main.py", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    done = process("attribute", "-c", "trak.yaml", "--name", "saved")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Attribution of ")
    torch.testing.assert_close(Attribution.load("store/scores/saved").scores, scores_of(trained))
    helped = process("attribute", "--help").stdout
    for option in ("ckpt_path", "name", "top_k", "dry_run", "k", "csv", "report"):
        assert re.search(rf"^  --{option} ", helped, re.M)
    assert "save the scores in the store under this name" in helped
    assert "--datamodule" not in helped
