"""Retraining on parts of the train set against the same trainings done by hand."""

from __future__ import annotations

import random
import shutil

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset, WeightedRandomSampler

from lightning_trak import GroundTruth, counterfactuals, evaluate, retrain_subsets
from lightning_trak.evaluation.ground_truth import read_run, run_name, write_run
from lightning_trak.evaluation.retraining import draw_subset, seeded
from lightning_trak.results.attribution import Attribution
from lightning_trak.results.info import AttributionInfo
from lightning_trak.store.arrays import write_arrays
from lightning_trak.store.files import Damaged
from tests.conftest import Blobs, Classifier, make_data, make_trainer

N, M = 40, 7
QUIET = {"enable_checkpointing": False, "max_epochs": 1}


class Counting:
    """Makes trainers, and knows how many; stops like a crash after some."""

    def __init__(self, root, stop_after=None):
        self.root, self.made, self.stop_after = root, 0, stop_after

    def __call__(self):
        if self.made == self.stop_after:
            raise KeyError("the machine went down")
        self.made += 1
        return make_trainer(self.root, **QUIET)


def retrain(root, make=None, data=None, module=Classifier, **options):
    options = {"n_subsets": 3, "repeats": 2, "dirpath": root / "runs"} | options
    return retrain_subsets(module, Blobs() if data is None else data, make or Counting(root), **options)


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    return retrain(tmp_path_factory.mktemp("truth"))


def by_hand(root, mask, seed):
    """The user's own training on a Subset, and its outputs on the targets."""
    with seeded(seed):
        module, trainer = Classifier(), make_trainer(root, **QUIET)
        rows = mask.nonzero()[:, 0].tolist()
        data = Blobs()
        trainer.fit(
            module,
            DataLoader(Subset(make_data(N), rows), data.batch_size, shuffle=True, drop_last=True),
            DataLoader(make_data(12, 1), 6),
        )
    module.eval()
    with torch.no_grad():
        x, y = make_data(M, 2).tensors
        return module.model_output((x, y))


def test_subsets_and_outputs(tmp_path, truth):
    assert truth.masks.shape == (3, N)
    assert truth.masks.dtype == torch.bool
    assert truth.masks.sum(1).tolist() == [20, 20, 20]
    assert len({tuple(mask.tolist()) for mask in truth.masks}) == 3
    assert truth.repeats.shape == (3, 2, M)
    assert truth.outputs.shape == (3, M)
    torch.testing.assert_close(truth.outputs, (truth.repeats[:, 0] + truth.repeats[:, 1]) / 2)
    assert not torch.equal(truth.repeats[:, 0], truth.repeats[:, 1])
    from lightning_trak.evaluation.retraining import _number

    for subset, repeat in ((0, 0), (2, 1)):
        expected = by_hand(tmp_path, truth.masks[subset], _number(f"0:{subset}:{repeat}"))
        torch.testing.assert_close(truth.repeats[subset, repeat], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("fraction", "expected"), [(0.5, 5), (0.25, 2), (0.01, 1), (0.99, 10)])
def test_fraction(fraction, expected):
    assert draw_subset(10, fraction, seed=0, subset=3).sum() == expected


def test_every_example_is_drawn_as_often():
    counts = sum(draw_subset(20, 0.3, seed=1, subset=subset).float() for subset in range(2000)) / 2000
    assert (counts - 0.3).abs().max() < 5 * (0.3 * 0.7 / 2000) ** 0.5


def test_after_a_crash_only_what_is_missing_is_done(tmp_path, truth):
    with pytest.raises(KeyError, match="went down"):
        retrain(tmp_path, Counting(tmp_path, stop_after=4))
    with pytest.warns(UserWarning, match="has 4 runs of the 6 .* asked for; 3 subsets with 1 repeats each were read"):
        half = GroundTruth.load(tmp_path / "runs")
    torch.testing.assert_close(half.repeats, truth.repeats[:, :1])
    make = Counting(tmp_path)
    again = retrain(tmp_path, make)
    assert make.made == 2
    assert torch.equal(again.masks, truth.masks)
    torch.testing.assert_close(again.repeats, truth.repeats)
    more = retrain(tmp_path, make, n_subsets=4)
    assert make.made == 4
    torch.testing.assert_close(more.repeats[:3], truth.repeats)
    assert retrain(tmp_path, make, n_subsets=2, repeats=1).repeats.shape == (2, 1, M)
    assert make.made == 4


def test_exactly_the_runs_that_are_asked_for_are_returned(tmp_path, truth):
    """Whatever else the folder holds: a first trial had more repeats of fewer subsets."""
    make = Counting(tmp_path)
    retrain(tmp_path, make, n_subsets=2, repeats=2)
    for n_subsets, repeats, made in ((3, 1, 5), (1, 2, 5), (2, 1, 5), (3, 2, 6)):
        found = retrain(tmp_path, make, n_subsets=n_subsets, repeats=repeats)
        assert make.made == made
        assert torch.equal(found.masks, truth.masks[:n_subsets])
        assert torch.equal(found.repeats, truth.repeats[:n_subsets, :repeats])


def flipped(content, places):
    """Flip a bit of every byte at some places."""
    return bytes(byte ^ 0x10 if place in places else byte for place, byte in enumerate(content))


def test_a_damaged_file_is_never_read_as_another_run(tmp_path):
    """Whichever of its bytes is flipped, and wherever it is cut."""
    path, mask, outputs = tmp_path / "run.safetensors", torch.rand(50) < 0.5, torch.randn(7)
    write_run(path, mask, outputs)
    content, damaged = path.read_bytes(), 0
    contents = [flipped(content, {place}) for place in range(len(content))]
    for other in contents + [content[:length] for length in range(0, len(content), 7)]:
        path.write_bytes(other)
        try:
            found = read_run(path)
        except Damaged:
            damaged += 1
        else:
            assert torch.equal(found[0], mask)
            assert torch.equal(found[1], outputs)
    assert damaged > len(content) / 2


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path: path.write_bytes(b""),
    "flipped": lambda path: path.write_bytes(flipped(path.read_bytes(), range(100, 600))),
    "another": lambda path: write_run(path, ~read_run(path)[0], torch.zeros(M)),
    "without": lambda path: write_arrays(path, {"mask": np.zeros(N, bool)}, path.stem),
    "scalar": lambda path: write_run(path, read_run(path)[0], torch.zeros(())),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_named_and_done_again(tmp_path, truth, damage):
    retrain(tmp_path, n_subsets=2)
    path = tmp_path / "runs" / "runs" / f"{run_name(1, 1)}.safetensors"
    DAMAGES[damage](path)
    with pytest.raises(ValueError, match=rf"{run_name(1, 1)}.safetensors' is .*retrain_subsets\(.* runs it again"):
        GroundTruth.load(tmp_path / "runs")
    make = Counting(tmp_path)
    with pytest.warns(UserWarning, match=rf"{run_name(1, 1)}.safetensors' is .* It is run again"):
        mended = retrain(tmp_path, make, n_subsets=2)
    assert make.made == 1
    assert torch.equal(mended.repeats, truth.repeats[:2])
    assert torch.equal(GroundTruth.load(tmp_path / "runs").repeats, truth.repeats[:2])


def test_a_damaged_run_of_counterfactuals_is_done_again(tmp_path):
    _counterfactuals(tmp_path, Blobs(), Counting(tmp_path))
    paths = sorted((tmp_path / "counterfactuals" / "runs").glob("*.safetensors"))
    contents, outputs = [path.read_bytes() for path in paths], [read_run(path)[1] for path in paths]
    paths[0].write_bytes(contents[0][:50])
    paths[1].write_bytes(contents[2])  # of another run
    make = Counting(tmp_path)
    with pytest.warns(UserWarning, match="It is run again") as warned:
        _counterfactuals(tmp_path, Blobs(), make)
    assert [sum(path.name in str(warning.message) for warning in warned) for path in paths] == [1, 1, 0]
    assert make.made == 2
    assert all(torch.equal(read_run(path)[1], before) for path, before in zip(paths, outputs, strict=True))


def test_a_damaged_ground_truth_is_named(tmp_path, truth):
    truth.save(tmp_path / "truth.safetensors")
    DAMAGES["truncated"](tmp_path / "truth.safetensors")
    with pytest.raises(ValueError, match=r"truth.safetensors' is damaged: .* Save the ground truth again"):
        GroundTruth.load(tmp_path / "truth.safetensors")


def test_runs_of_other_targets_are_told_apart(tmp_path):
    retrain(tmp_path, n_subsets=1, repeats=1)
    with pytest.raises(ValueError, match=r"other targets: 'subset00000-repeat00' has outputs of 7 targets, .* 5"):
        retrain(tmp_path, data=Blobs(m=5), n_subsets=2, repeats=1)


def _share(root):
    retrain(root, n_subsets=4)


def test_two_processes_share_the_work(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=_share, args=(tmp_path,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
    assert [process.exitcode for process in processes] == [0, 0]
    make = Counting(tmp_path)
    shared = retrain(tmp_path, make, n_subsets=4)
    assert make.made == 0
    torch.testing.assert_close(shared.repeats, retrain(tmp_path / "alone", n_subsets=4).repeats)


class Drawing(Blobs):
    """Draws from a generator of its own."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(5)

    def train_dataloader(self):
        self.offset = torch.rand((), generator=self.generator)
        return super().train_dataloader()


def states_of(data):
    """What is to be the same afterwards."""
    numpy_state = np.random.get_state()
    own = data.generator.get_state().tolist()
    return dict(vars(data)), random.getstate(), numpy_state[1].tolist(), torch.get_rng_state().tolist(), own


def _counterfactuals(root, data, make):
    scores = torch.randn(N, M, generator=torch.Generator().manual_seed(0))
    where = {"targets": [0], "k": [3], "repeats": 1, "dirpath": root / "counterfactuals"}
    counterfactuals(attribution_of(scores), Classifier, data, make, **where)


@pytest.mark.parametrize(
    "use",
    [
        lambda root, data, make: retrain(root, make, data=data, n_subsets=1, repeats=1),
        _counterfactuals,
    ],
)
def test_nothing_else_is_touched(tmp_path, use):
    data = Drawing()
    before = states_of(data)
    with pytest.raises(KeyError, match="went down"):
        use(tmp_path, data, Counting(tmp_path, stop_after=0))
    assert states_of(data) == before
    use(tmp_path, data, Counting(tmp_path))
    assert states_of(data) == before


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
def test_a_datamodule_made_of_datasets(tmp_path):
    data = L.LightningDataModule.from_datasets(make_data(N), test_dataset=make_data(M, 2), batch_size=8)
    truth = retrain(tmp_path, data=data, n_subsets=1, module=NotValidated)
    assert truth.masks.sum() == 20
    assert truth.repeats.shape == (1, 2, M)


class NotValidated(Classifier):
    validation_step = L.LightningModule.validation_step


class Weighted(Blobs):
    def train_dataloader(self):
        return DataLoader(self.train_set, 8, sampler=WeightedRandomSampler(torch.ones(N), N))


class Growing(Blobs):
    grown = 0

    def setup(self, stage):
        if stage == "fit":
            Growing.grown += 1
            self.n = N + Growing.grown
        super().setup(stage)


class Diverging(Classifier):
    def model_output(self, batch):
        return super().model_output(batch) * torch.nan


def test_what_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="WeightedRandomSampler or a batch sampler"):
        retrain(tmp_path / "1", data=Weighted())
    with pytest.raises(ValueError, match=r"has 42 examples now, and had 41.*split it in the same way"):
        retrain(tmp_path / "2", data=Growing())
    with pytest.raises(ValueError, match="NaN or infinite for 7 targets: the training diverged"):
        retrain(tmp_path / "3", module=Diverging)
    for options in ({"n_subsets": 0}, {"repeats": 0}, {"fraction": 1.0}, {"fraction": 0}):
        with pytest.raises(ValueError, match="must be positive integers and fraction between 0 and 1"):
            retrain(tmp_path / "4", **options)
    with pytest.raises(FileNotFoundError, match="no finished runs"):
        GroundTruth.load(tmp_path / "1")


def test_a_directory_of_other_runs_is_refused(tmp_path):
    retrain(tmp_path, n_subsets=1, repeats=1)
    for options, message in (
        ({"fraction": 0.3}, "with fraction="),
        ({"seed": 1}, "with seed="),
        ({"data": Blobs(seed=5)}, "on another train set: as many examples as here, 40, with other content: .* row 0"),
        ({"data": Blobs(n=50)}, "on another train set: 40 examples, here 50, "),
    ):
        with pytest.raises(ValueError, match=f"holds runs {message}.*Use another dirpath"):
            retrain(tmp_path, **options)


def test_save_and_load(tmp_path, truth):
    truth.save(tmp_path / "truth.safetensors")
    loaded = GroundTruth.load(tmp_path / "truth.safetensors")
    assert torch.equal(loaded.masks, truth.masks)
    assert torch.equal(loaded.repeats, truth.repeats)
    with pytest.raises(ValueError, match=r"masks must be \(s, n\)"):
        GroundTruth(truth.masks, truth.outputs)
    assert run_name(3, 1) == "subset00003-repeat01"


def linear_world(noise, repeats, s=400, n=50, m=30, seed=0):
    """Outputs are sums of true scores, and noise in every training."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(n, m, generator=generator)
    masks = torch.rand(s, n, generator=generator) < 0.5
    clean = masks.float() @ scores
    return scores, GroundTruth(masks, clean[:, None] + noise * torch.randn(s, repeats, m, generator=generator))


@pytest.mark.parametrize("noise", [0.5, 2.0, 6.0])
@pytest.mark.parametrize("repeats", [2, 4])
def test_noise_ceiling_is_what_true_scores_reach(noise, repeats):
    scores, truth = linear_world(noise, repeats)
    evaluation = evaluate(scores, truth)
    assert evaluation.ceiling == pytest.approx(evaluation.lds, abs=0.02)
    assert abs(evaluation.random) < 0.05
    assert evaluation.interval.lower < evaluation.lds < evaluation.interval.upper
    assert evaluation.per_target.mean().item() == pytest.approx(evaluation.lds, abs=1e-6)


def test_evaluation_as_a_table():
    scores, truth = linear_world(2.0, 1)
    info = AttributionInfo(50, 30, ("a",), "sparse", 8, 0.3, True)
    evaluation = evaluate(Attribution(scores, info), truth)
    lines = str(evaluation).splitlines()
    assert [line.split("  ")[1] for line in lines[1:4]] == ["scores", "noise ceiling", "random scores"]
    assert f"{evaluation.lds:.3f}" in lines[1]
    predicted = truth.masks.double() @ scores.double() / truth.masks.double().mean(1, keepdim=True)
    centred = [(values - values.mean(0)).flatten() for values in (predicted, truth.outputs.double())]
    assert evaluation.slope == pytest.approx(np.polyfit(*centred, 1)[0], rel=1e-3)
    assert lines[4] == f"actual change / predicted change: {evaluation.slope:.2f}"
    assert "unknown (repeats=1)" in lines[2]
    with pytest.raises(ValueError, match=r"scores must be \(n, m\) and masks \(s, n\)"):
        evaluate(scores[:-1], truth)


# ------------------------------------------------------------------------------------------------ counterfactuals


def attribution_of(scores):
    return Attribution(scores, AttributionInfo(*scores.shape, ("a",), "sparse", 8, 0.3, True))


def test_counterfactuals(tmp_path):
    scores = torch.randn(N, M, generator=torch.Generator().manual_seed(0))
    make = Counting(tmp_path)

    def run(**options):
        options = {"targets": [1, 4], "k": [6, 3], "repeats": 2, "dirpath": tmp_path / "runs"} | options
        return counterfactuals(attribution_of(scores), Classifier, Blobs(), make, **options)

    result = run()
    assert make.made == 2 * (1 + 2 * (1 + 2))
    assert result.k == (3, 6)
    assert result.targets == (1, 4)
    from lightning_trak.evaluation.retraining import _number

    without = torch.ones(N, dtype=torch.bool)
    without[scores[:, 4].topk(3).indices] = False
    expected = by_hand(tmp_path, without, _number("0:1"))[4]
    torch.testing.assert_close(result.removed[0, 1, 1], expected, rtol=1e-4, atol=1e-5)
    before = by_hand(tmp_path, torch.ones(N, dtype=torch.bool), _number("0:0"))[[1, 4]]
    torch.testing.assert_close(result.before[0], before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.drop, result.before.mean(0) - result.removed.mean(1))
    assert result.random.shape == (2, 2, 2)
    again = run()
    assert make.made == 14
    torch.testing.assert_close(again.random, result.random)
    run(targets=[1, 4, 5])
    assert make.made == 14 + 4
    for options, message in (
        ({"k": [0, 3]}, "k must be numbers from 1 to 39"),
        ({"k": [40]}, "k must be numbers"),
        ({"k": []}, "k must be numbers"),
        ({"targets": [7]}, "columns of the scores, 0 to 6"),
        ({"targets": []}, "columns of the scores"),
        ({"seed": 1}, "holds runs with seed=0, not 1"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**options)


def test_counterfactual_table_and_picture():
    from lightning_trak.evaluation.counterfactuals import Counterfactuals

    before = torch.tensor([[1.0, 0.5], [3.0, 0.5]])
    removed = torch.tensor([[[1.0, -0.5], [2.0, -0.5]], [[-1.0, -2.0], [0.0, -2.0]]])
    result = Counterfactuals((0, 3), (5, 10), before, removed, torch.stack([before, before]))
    assert result.drop.tolist() == [[0.5, 1.0], [2.5, 2.5]]
    assert result.flipped.tolist() == [[False, True], [True, True]]
    assert not result.random_flipped.any()
    assert str(result).splitlines()[2].split() == ["5", "0.750", "0.000", "50%", "0%"]
    import matplotlib as mpl

    mpl.use("Agg")
    figure, axes = result.plot()
    assert [axis.get_ylabel() for axis in axes] == ["fall of the output", "share of targets flipped"]
    assert axes[0].lines[0].get_ydata().tolist() == [0.75, 2.5]
    assert axes[1].lines[0].get_ydata().tolist() == [0.5, 1]
    assert {axis.get_xlabel() for axis in axes} == {"training examples removed"}
    assert figure is axes[0].figure
    own, pair = mpl.pyplot.subplots(1, 2)
    found, drawn = result.plot(ax=pair)
    assert found is own
    assert [axis.lines[0].get_ydata().tolist() for axis in drawn] == [[0.75, 2.5], [0.5, 1]]
    with pytest.raises(ValueError, match=r"ax must have the shape \(2,\), for fall of the output and share"):
        result.plot(ax=pair[0])
    mpl.pyplot.close("all")


def test_runs_that_are_lost_are_missed(tmp_path, truth):
    """Without those of the last subset, the folder looks like a finished one."""
    retrain(tmp_path, Counting(tmp_path))
    for path in (tmp_path / "runs" / "runs").glob("subset00002-*"):
        path.unlink()
    with pytest.warns(UserWarning, match="has 4 runs of the 6 that retrain_subsets was asked for; 2 subsets with 2"):
        found = GroundTruth.load(tmp_path / "runs")
    assert torch.equal(found.masks, truth.masks[:2])
    torch.testing.assert_close(retrain(tmp_path, Counting(tmp_path)).repeats, truth.repeats)
    GroundTruth.load(tmp_path / "runs")


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"runs": -1}'])
def test_a_damaged_number_of_runs_is_named_and_written_anew(tmp_path, content):
    retrain(tmp_path, Counting(tmp_path))
    path = tmp_path / "runs" / "asked.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"asked.json' is damaged: .* Call retrain_subsets"):
        GroundTruth.load(tmp_path / "runs")
    retrain(tmp_path, Counting(tmp_path))
    assert len(GroundTruth.load(tmp_path / "runs").masks) == 3


def test_a_ground_truth_that_is_not_there_is_named_with_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no ground truth in '.*truth.safetensors'. Make it with retrain_"):
        GroundTruth.load(tmp_path / "truth.safetensors")


def test_a_manifest_that_another_file_took_the_place_of_is_named(tmp_path):
    retrain(tmp_path)
    shutil.copy(tmp_path / "runs" / "asked.json", tmp_path / "runs" / "manifest.json")
    with pytest.raises(ValueError, match=r"manifest.json' is damaged: it names no train set. Use another dirpath, or"):
        retrain(tmp_path)
