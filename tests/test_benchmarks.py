"""The benchmarks, small: that they run, and print a table of what they say."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from math import isfinite

import pytest
import torch

from tests.benchmarks import diffusion, features, fit, gpu, memory, quality, scoring, sizes, tasks
from tests.benchmarks.measuring import silence
from tests.benchmarks.models import MODELS
from tests.benchmarks.quality.runs import check_folder


def rows(printed):
    """Return the cells of every row but the header."""
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.fixture
def table(capsys):
    def run(benchmark, *args):
        with silence():
            benchmark(*args)
        return rows(capsys.readouterr().out)

    return run


def test_features(table):
    cases = (
        features.Case("digits", n_train=100, n_targets=10, traker=True),
        features.Case("digits", "vmap", "sparse", n_train=70, n_targets=10),
    )
    (one, other) = table(features.run, cases)
    assert one[:3] == ["digits CNN", "auto", "auto"]
    assert other[:3] == ["digits CNN", "vmap", "sparse"]
    assert all(isfinite(float(cell)) for row in (one, other) for cell in row[3:6])  # how fast is not for a test to say
    assert other[6] == "70 + 10"


def test_memory(table):
    ((name, ratio, ours, step),) = table(memory.run, ("digits",))
    assert name == "digits CNN"
    assert int(ours) > 0
    int(step)
    assert re.fullmatch(r"\d+\.\d\d", ratio)


def test_scoring(table):
    assert [row[0] for row in table(scoring.run, 300, 10, 64)] == [
        "H and its solution",
        "scores",
        "top 10 of the scores",
        "H, its solution and scores",
        "H, its solution and top 10",
    ]


def test_fit(table):
    ((name, without, beyond, own),) = table(fit.run, "digits", 64, 1, 1)
    assert name == "digits CNN"
    assert all(isfinite(float(cell)) for cell in (without, beyond, own.split()[0]))


def test_gpu_says_that_it_was_not_run(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu.run()
    assert "Not run: torch finds no CUDA device." in capsys.readouterr().out


def test_gpu_job_small_and_on_the_cpu():
    with silence():
        whole, one = gpu.quickstart("cpu", checkpoints=2, n_train=40, n_targets=5)
    assert whole[0] == "quickstart: 2 checkpoints, 40 + 5 pictures"
    assert isfinite(float(one[1]))


@pytest.mark.parametrize("key", ["vit", "bert", "bert_lora", "gpt2"])
def test_transformers_of_one_layer(key, monkeypatch, table):
    model = MODELS[key]
    smaller = replace(model, make=partial(model.make, layers=1), batch_size=2)
    if key == "gpt2":
        make = partial(model.make, layers=1, vocabulary=2000)
        smaller = replace(
            smaller, make=make, example=lambda generator: {"input_ids": torch.randint(2000, (99,), generator=generator)}
        )
    monkeypatch.setitem(MODELS, key, smaller)
    ((name, *_, size),) = table(features.run, (features.Case(key, n_train=4, n_targets=2),))
    assert name == model.name
    assert size == "4 + 2"


def test_quality(table, monkeypatch, tmp_path):
    """Every method but EK-FAC, whose package is not among those of the tests, on two cells of the smallest task."""
    monkeypatch.setattr(quality.methods, "find_spec", lambda name: None)
    without = replace(quality.METHODS["EK-FAC"], installed=quality.methods.has_ekfac)
    monkeypatch.setitem(quality.METHODS, "EK-FAC", without)
    cells = [quality.CELLS[0], quality.Cell("2 of 1 run", 1, lambda files: files[:2])]
    monkeypatch.setattr(quality, "CELLS", cells)
    first, second = table(quality.run, ("diabetes",), 4, 1, tmp_path, tmp_path / "lds.png")
    assert first[:2] == ["diabetes, MLP regression", "last of 1 run"]
    assert second[:2] == ["diabetes, MLP regression", "2 of 1 run"]
    for row in (first, second):
        assert len(row) == 2 + len(quality.METHODS) + 2
        assert all(re.fullmatch(r"-?\d\.\d{3} \(±\d\.\d{3}\)", cell) for cell in [row[2], *row[4:-3]])
        assert row[3] == row[-3] == "–"
        assert row[-1] == "–"
    assert (tmp_path / "lds.png").stat().st_size > 10_000


def test_sizes(table, tmp_path):
    calibrated, *sets = table(sizes.run, ("diabetes",), ("diabetes",), tmp_path, 8, (6,), 1, 2, 1)
    assert calibrated[:2] == ["diabetes, MLP regression", "6"]
    assert all(isfinite(float(cell)) for row in (calibrated, *sets[2:]) for cell in row[2:] if cell != "–")
    assert [row[1] for row in sets if row[1] in sizes.NAMES] == [sizes.NAMES[0], *sizes.NAMES[2:]]


def test_what_other_tasks_left_is_not_used(tmp_path):
    check_folder("diabetes", tmp_path)
    check_folder("diabetes", tmp_path)
    (tmp_path / "diabetes" / "made_with").write_text("other versions")
    with pytest.raises(ValueError, match="made with other tasks"):
        check_folder("diabetes", tmp_path)
    (tmp_path / "diabetes" / "made_with").unlink()
    with pytest.raises(ValueError, match="made with other tasks"):
        check_folder("diabetes", tmp_path)


@pytest.mark.parametrize("key", quality.TASKS)
def test_tasks_of_the_quality_benchmark(key):
    """Train set and targets are there, and a module's loss goes with its model output."""
    task = quality.TASKS[key]
    data, module = task.data(), task.make_module().eval()
    assert len(data.train_set) >= 300
    assert len(data.targets) >= 100
    batch = data.train_set[:20]
    mean = module.output_to_loss(module.model_output(batch), batch).mean()
    torch.testing.assert_close(module.training_step(batch, 0), mean, rtol=1e-4, atol=1e-6)


def test_tasks(table):
    cases = tuple(features.Case(key, n_train=8, n_targets=4) for key in ("regressor", "digits"))
    found = table(tasks.run, cases)
    assert [(row[0], row[2]) for row in found] == [("`RegressionMixin`", "hooks"), ("`ClassificationMixin`", "hooks")]


def test_diffusion(table, tmp_path):
    found = table(diffusion.run, 3, 1, tmp_path, 2)
    assert [row[0] for row in found][:2] == ["ours, last checkpoint", "ours, 2 checkpoints"]
    assert all(re.fullmatch(r"-?\d\.\d{3} \(±\d\.\d{3}\)", row[1]) for row in found[:-1])
