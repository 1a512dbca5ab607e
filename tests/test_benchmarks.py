"""The benchmarks, small: that they run, and print a table of what they say."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from math import isfinite

import numpy
import pytest
import scipy.stats
import torch
from torch.utils.data import TensorDataset

from examples.clip import DIGITS, WORDS
from lightning_trak import GroundTruth, evaluate
from lightning_trak.metrics import LinearDatamodelingScore
from tests.benchmarks import (
    diffusion,
    factors,
    features,
    fit,
    gpu,
    memory,
    quality,
    remote,
    scale,
    scoring,
    sizes,
    suspects,
    tasks,
)
from tests.benchmarks.measuring import silence
from tests.benchmarks.models import MODELS
from tests.benchmarks.quality.costs import Count, Passes, counted
from tests.benchmarks.quality.every_task import digest_of_code
from tests.benchmarks.quality.figure import SHOWN, draw
from tests.benchmarks.quality.methods import has_ekfac
from tests.benchmarks.quality.paired import Difference, difference
from tests.benchmarks.quality.results import Result, Table
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


def test_remote(table):
    found = table(remote.run, 600, 8)
    assert [row[0] for row in found] == [
        "local disk",
        "plain requests to the server",
        "s3, first",
        "s3, from the copies",
    ]
    assert all(isfinite(float(row[2])) for row in found)


def test_memory(table):
    ((name, ratio, ours, step),) = table(memory.run, ("digits",))
    assert name == "digits CNN"
    assert int(ours) > 0
    int(step)
    assert re.fullmatch(r"\d+\.\d\d", ratio)


def test_factors_are_those_of_kronfluence(capsys):
    with silence():
        factors.run()
    printed = capsys.readouterr().out
    if not has_ekfac():
        assert "kronfluence is not installed" in printed
        return
    found = [[float(cell) for cell in row[1:]] for row in rows(printed)]
    assert len(found) == 4
    assert max(map(max, found)) < 1e-5


def test_scoring(table):
    assert [row[0] for row in table(scoring.run, 300, 10, 64)] == [
        "H and its solution",
        "scores",
        "top 10 of the scores",
        "H, its solution and scores",
        "H, its solution and top 10",
        "products of sparse rows",
        "---",
        "of all examples with targets",
        "of 300 examples with each other",
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
    first, second, *_, costs = table(quality.run, ("diabetes",), 4, 1, tmp_path, tmp_path / "lds.png")
    assert first[:2] == ["diabetes, MLP regression", "last of 1 run"]
    assert second[:2] == ["diabetes, MLP regression", "2 of 1 run"]
    for row in (first, second):
        assert len(row) == 2 + len(quality.METHODS) + 3
        assert all(re.fullmatch(r"-?\d\.\d{3} \(±\d\.\d{3}\)", cell) for cell in [row[2], *row[4:-4]])
        assert row[3] == row[-4] == "–"
        lead, lower, upper = map(float, re.findall(r"[+-]\d\.\d{3}", row[-3]))
        assert lower <= upper
        assert lead == pytest.approx(float(row[2][:6]) - max(float(cell[:6]) for cell in row[6:8]), abs=2e-3)
        assert row[-1] == "–"
    assert costs[:4] == ["diabetes, MLP regression", "5764", "8192", "512"]
    assert costs[-2:] == ["2.00 / 1.00", "–"]
    assert all(1 <= float(passes) < 2 for passes in costs[4].split(" / "))
    assert (tmp_path / "lds.png").stat().st_size > 10_000


def resampled_lds(predictions, outputs, subsets, targets):
    """The LDS of a resample, target by target: ranks are those of all subsets."""
    ranks = [scipy.stats.rankdata(values, axis=0)[subsets] for values in (predictions, outputs)]
    found = [numpy.corrcoef(ranks[0][:, target], ranks[1][:, target])[0, 1] for target in targets]
    return numpy.mean(found)


def test_paired_difference():
    """Against one resample after the other, both methods with the same subsets and targets."""
    s, m, times = 12, 5, 30
    torch.manual_seed(0)
    outputs = torch.randn(s, m)
    one, other = outputs + torch.randn(s, m), outputs + 2 * torch.randn(s, m)
    found = difference(one, other, outputs, times=times, seed=3)
    generator = torch.Generator().manual_seed(3)
    draws = [torch.randint(size, (times, size), generator=generator).numpy() for size in (s, m)]
    differences = [
        resampled_lds(one, outputs, subsets, targets) - resampled_lds(other, outputs, subsets, targets)
        for subsets, targets in zip(*draws, strict=True)
    ]
    expected = numpy.quantile(differences, [0.025, 0.975])
    assert (found.lower, found.upper) == pytest.approx(tuple(expected), abs=1e-4)
    actual = [resampled_lds(predictions, outputs, range(s), range(m)) for predictions in (one, other)]
    assert found.value == pytest.approx(actual[0] - actual[1], abs=1e-5)


def test_what_two_methods_have_in_common_does_not_widen_the_paired_interval():
    torch.manual_seed(0)
    outputs = torch.randn(40, 20)
    one = outputs * torch.linspace(0, 2, 20) + torch.randn(40, 20)  # some targets are hard, for both
    assert difference(one, one, outputs) == Difference(0, 0, 0)
    found, reverse = difference(one, one.exp() + outputs, outputs), difference(one.exp() + outputs, one, outputs)
    assert (found.lower, found.upper) == pytest.approx((-reverse.upper, -reverse.lower), abs=1e-6)
    near = difference(one, one + 0.1 * torch.randn(40, 20), outputs)
    whole = LinearDatamodelingScore()
    whole.update(one, outputs)
    lower, upper = whole.interval()
    assert near.upper - near.lower < 0.5 * float(upper - lower)


def test_passes_are_counted():
    network, x = torch.nn.Linear(3, 1), torch.randn(10, 3)
    with counted(network) as count:
        network(x).sum().backward()
        network(x[:4]).sum().backward()
        with torch.no_grad():
            network(x[:5])
    network(x)
    assert count == Count(forward=19, backward=14)
    assert count.over(3, n_targets=4) == Passes(5, 10 / 3)


def test_linear_layers_compute_the_same():
    data, module = quality.TASKS["gpt2"].data(), quality.TASKS["gpt2"].make_module().eval()
    batch = data.train_set[:5]
    before = module.model_output(batch)
    quality.methods.linear_layers(module)
    torch.testing.assert_close(module.model_output(batch), before)
    assert sum(isinstance(layer, torch.nn.Linear) for layer in module.modules()) == 2 * 4 + 1


@pytest.mark.parametrize("n_tasks", [1, 2, 3, 8])
def test_figure_has_a_panel_for_each_task(n_tasks, tmp_path):
    masks, outputs = torch.rand(6, 9) < 0.5, torch.randn(6, 2, 4)
    evaluation = evaluate(torch.randn(9, 4), GroundTruth(masks, outputs))
    results = {("cell", name): Result(evaluation, outputs[:, 0], 2.0) for name in SHOWN}
    tables = {key: Table(0.5, results) for key in list(quality.TASKS)[:n_tasks]}
    draw(tables, tmp_path / "lds.png")
    assert (tmp_path / "lds.png").stat().st_size > 10_000


def test_another_task_leaves_the_folders_of_others_valid(monkeypatch):
    """The code of a task is its own module, and what all of them build on."""
    before = digest_of_code("diabetes")
    assert len({before, digest_of_code("gpt2"), digest_of_code("tags")}) == 3
    monkeypatch.setitem(quality.TASKS, "another", quality.TASKS["tags"])
    assert digest_of_code("diabetes") == before
    assert digest_of_code("another") == digest_of_code("tags")


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


def test_suspects(capsys):
    with silence():
        suspects.run(("diabetes", "noisy"), (0,), epochs=2)
    labels, copies, accuracy = capsys.readouterr().out.split("###")[1:]
    assert [row[0] for row in rows(labels)] == ["diabetes, MLP regression", "digits, MLP, memorised"]
    assert all(0 <= float(cell) <= 1 for row in rows(labels) for cell in row[1:5])
    assert [row[1] for row in rows(copies)] == ["exact copies", "noisy copies", "exact leaks", "noisy leaks"] * 2
    assert all(row[2] == "1.000" for row in rows(copies) if row[1].startswith("exact"))
    assert rows(accuracy)[-1][:3] == ["all wrong labels", "40", "40"]


@pytest.mark.parametrize("key", ["masks", "captions", "comparisons", "sentences"])
def test_suspects_of_other_tasks(key, capsys, monkeypatch):
    """On few examples."""
    case = suspects.CASES[key]

    def fewer():
        data = case.task.data()
        data.train_set, data.targets = TensorDataset(*data.train_set[:100]), TensorDataset(*data.targets[:20])
        return data

    monkeypatch.setitem(suspects.CASES, key, replace(case, task=replace(case.task, data=fewer)))
    with silence():
        suspects.run((key,), (0,), epochs=1)
    labels, copies = capsys.readouterr().out.split("###")[1:]
    ((name, *cells),) = rows(labels)
    assert name == case.name
    assert all(0 <= float(cell) <= 1 for cell in cells[:4])
    assert [row[1] for row in rows(copies)] == ["exact copies", "noisy copies", "exact leaks", "noisy leaks"]
    assert all(row[2:5] == ["1.000"] * 3 for row in rows(copies) if row[1].startswith("exact"))


def planted_in(key, *, wrong_labels=True):
    case = suspects.CASES[key]
    return suspects.plant(case.task.data(), case.faults, 3, wrong_labels=wrong_labels)


def equal(fields, others):
    """Return which examples are equal in all fields, (n,)."""
    return torch.stack([(a == b).reshape(len(a), -1).all(1) for a, b in zip(fields, others, strict=True)]).all(0)


@pytest.mark.parametrize("key", suspects.CASES)
def test_planted_faults_are_what_they_are_said_to_be(key):
    planted, right = planted_in(key), planted_in(key, wrong_labels=False)
    train, targets = planted.data.train_set.tensors, planted.data.targets.tensors
    own = (planted.copy_of < 0) & (planted.leaks < 0)
    assert torch.equal(own & ~equal(train, right.data.train_set.tensors), planted.wrong)
    for of, fields in ((planted.copy_of, train), (planted.leaks, targets)):
        rows = (of >= 0).nonzero()[:, 0]
        same = equal([field[rows] for field in train], [field[of[rows]] for field in fields])
        assert torch.equal(same, planted.exact[rows])


@pytest.mark.parametrize("key", suspects.CASES)
def test_losses_without_this_package_are_those_of_training(key):
    """Of the whole batch, as contrastive losses are."""
    case = suspects.CASES[key]
    module, batch = case.task.make_module().eval(), case.task.data().train_set[:30]
    with torch.no_grad():
        evaluated = case.evaluate(module, batch)
    torch.testing.assert_close(evaluated.losses.mean(), module.training_step(batch, 0).detach(), rtol=1e-4, atol=1e-6)
    assert len(evaluated.losses) == len(evaluated.embedded) == 30


def test_wrong_masks():
    """Each is of another class, or shifted, or that of another image; its image stays."""
    planted, right = planted_in("masks"), planted_in("masks", wrong_labels=False)
    kinds = set()
    (x, y), (same_x, before) = planted.data.train_set.tensors, right.data.train_set.tensors
    assert torch.equal(x[planted.wrong], same_x[planted.wrong])
    for mask, correct in zip(y[planted.wrong], before[planted.wrong], strict=True):
        if torch.equal(mask > 0, correct > 0):
            kinds.add("class")
        elif mask.max() == correct.max() and (mask > 0).sum() == (correct > 0).sum():
            kinds.add("shifted")
        else:
            kinds.add("of another image")
    assert kinds == {"class", "shifted", "of another image"}


def test_wrong_comparisons_are_the_wrong_way_round():
    planted, right = planted_in("comparisons"), planted_in("comparisons", wrong_labels=False)
    larger, smaller = planted.data.train_set[:]
    assert equal((larger, smaller), right.data.train_set[:][::-1])[planted.wrong].all()


def test_wrong_captions_name_another_digit():
    planted, right = planted_in("captions"), planted_in("captions", wrong_labels=False)
    numbers = [1 + WORDS.index(digit) for digit in DIGITS]
    for one, other in zip(planted.data.train_set[:][1], right.data.train_set[:][1], strict=True):
        named = [[number in caption.tolist() for number in numbers] for caption in (one, other)]
        assert sum(named[0]) == sum(named[1]) == 1
        assert (named[0] != named[1]) == (not torch.equal(one, other))


def test_diffusion(table, tmp_path):
    found = table(diffusion.run, 3, 1, tmp_path, 2)
    assert [row[0] for row in found][:2] == ["ours, last checkpoint", "ours, 2 checkpoints"]
    assert all(re.fullmatch(r"-?\d\.\d{3} \(±\d\.\d{3}\)", row[1]) for row in found[:-1])


def test_scale(table):
    found = table(scale.run, ((300, 20, 16, 2, None), (300, 20, 16, 1, 3)), (100, 10, 8, 1, None), 2)
    assert [row[:5] for row in found[:2]] == [["300", "20", "16", "2", "all"], ["300", "20", "16", "1", "3"]]
    for row in found:
        if re.fullmatch(r"[\d,]+", row[0]):
            assert isfinite(float(row[5]))
            assert row[7].endswith("%")
            assert row[8].endswith("MB")
