"""How much of the time of training featurizing may take, and what a checkpoint will take."""

from __future__ import annotations

from contextlib import suppress
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_trak import FeatureStore, TRAKCallback
from lightning_trak.curvature import Whitening
from lightning_trak.trainer.featurizing.featurization import FeaturizationLoop
from lightning_trak.trainer.fit.pace import Coming, Pace
from tests.conftest import Blobs, Classifier, make_trainer


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_featurizing_stays_within_its_share():
    """Every checkpoint takes 3 seconds, of 10 seconds of training between two: a loop of its own counts them."""
    clock = Clock()
    pace, trained, spent = Pace(0.2, 3.0, clock=clock), 0.0, 0.0
    for _ in range(30):
        clock.now += 10
        trained += 10
        while pace.allows_another():
            with pace.featurizing():
                clock.now += 3
                spent += 3
        assert 0.2 * trained - 3 < spent <= 0.2 * trained


def test_time_that_failed_counts_and_foretells_nothing():
    clock = Clock()
    pace = Pace(1.0, 3.0, clock=clock)
    clock.now += 5
    assert pace.allows_another()
    with suppress(ValueError), pace.featurizing():
        clock.now += 1
        raise ValueError("fails at once")
    assert pace.expected == 3
    clock.now -= 2
    assert not pace.allows_another()  # 1 spent and 3 expected, of 3
    pace.took(2.0)
    assert pace.allows_another()


def test_no_share_is_no_limit():
    pace = Pace(None, 1e9, clock=Clock())
    assert not pace.limited
    assert pace.allows_another()


@pytest.mark.parametrize(("steps", "told_after"), [(1, 1), (2, 2), (4, 4), (6, 4), (100, 4)])
def test_an_epoch_is_timed_without_its_first_step(steps, told_after):
    clock, told = Clock(), {}
    pace = Pace(None, 1.0, clock=clock)
    for number in range(steps):
        pace.step_began()
        clock.now += 7 if number == 0 else 2
        seconds = pace.step_ended(steps)
        if seconds is not None:
            told[number + 1] = seconds
    assert told == {told_after: 7 if steps == 1 else 2 * steps}


def test_featurizing_between_steps_does_not_count_as_training():
    clock = Clock()
    pace = Pace(None, 1.0, clock=clock)
    for number in range(3):
        pace.step_began()
        clock.now += 2
        seconds = pace.step_ended(3)
        if number == 1:
            with pace.featurizing():
                clock.now += 50
    assert seconds == 6


def test_what_comes_in_words(tmp_path):
    coming = Coming(40, 1.5, 1000, whitened=True)
    line = coming.text(SimpleNamespace(dirpath=tmp_path))
    assert "takes about 1.5 s, and 1 kB on the disk" in line
    assert line.endswith("checkpoints. Gradients are whitened by the curvature of each parameter.")
    assert coming.beside(2.0) == "featurizing at a checkpoint takes as long as 0.75 epochs of training."


def test_the_device_is_waited_for_at_the_ends_of_what_is_timed():
    """A device that works for 4 seconds on each step, and is only told to."""
    clock, queued = Clock(), [0]

    def wait():
        clock.now += 4 * queued[0]
        queued[0] = 0

    pace = Pace(None, 1.0, wait, clock)
    for _ in range(4):
        pace.step_began()
        queued[0] += 1
        seconds = pace.step_ended(10)
    assert seconds == 40
    queued[0] += 1
    with pace.featurizing():
        clock.now += 1
    assert pace.spent == pytest.approx(1 / 20)


class Complete(L.Callback):
    """Notes how many checkpoints have all features when training ends."""

    def __init__(self, path):
        self.path = path

    def on_train_end(self, trainer, pl_module):
        self.seen = sum(entry.complete for entry in FeatureStore(self.path))


def fit(root, budget, **kept):
    torch.manual_seed(0)
    complete = Complete(root / "store")
    saving = ModelCheckpoint(root / "files", **{"save_top_k": -1, **kept})
    trak = TRAKCallback(root / "store", budget=budget)
    trainer = make_trainer(root, trak, complete, saving, max_epochs=4)
    trainer.fit(Classifier(), datamodule=Blobs())
    return complete.seen, FeatureStore(root / "store"), trainer


@pytest.mark.parametrize(("budget", "during"), [(None, 3), (1e6, 3), (0, 0)])
def test_what_exceeds_the_budget_is_featurized_at_the_end(tmp_path, budget, during, said):
    """The checkpoint that the last epoch saves always is."""
    seen, store, trainer = fit(tmp_path, budget)
    assert seen == during
    assert [entry.complete for entry in store] == [True] * 4
    assert trainer.attribute(datamodule=Blobs()).scores.shape == (40, 7)
    left = [line for line in said() if "waited for the end" in line]
    assert len(left) == (budget == 0)  # the last one always is featurized then
    if budget == 0:  # the fourth was saved when no step followed
        assert left[0].startswith(
            "TRAKCallback: 3 checkpoints waited for the end of training, by budget=0. Featurizing"
        )


def test_a_file_that_is_deleted_while_it_waits_costs_nothing(tmp_path, said):
    kept = {"save_top_k": 1, "monitor": "epoch", "mode": "max"}
    assert len(fit(tmp_path / "all", None, **kept)[1]) == 4
    _, store, _ = fit(tmp_path / "few", 0, **kept)
    assert [entry.meta["epoch"] for entry in store] == [3]
    (line,) = [line for line in said() if "were deleted" in line]
    assert "3 checkpoints were deleted while they waited, by budget=0, and are not averaged. Model" in line


def test_scores_do_not_depend_on_the_budget(tmp_path):
    (_, one, first), (_, other, second) = (fit(tmp_path / str(budget), budget) for budget in (None, 0))
    assert one.digests == other.digests  # training is the same too
    scores = [trainer.attribute(datamodule=Blobs()).scores for trainer in (first, second)]
    torch.testing.assert_close(*scores, rtol=1e-3, atol=1e-5)


def test_what_a_checkpoint_takes_is_told(tmp_path, said):
    fit(tmp_path, None)
    (line,) = [line for line in said() if "at each checkpoint" in line]
    assert "featurizing 40 examples takes about" in line
    assert "which has room for" in line
    (line,) = [line for line in said() if "epochs of training" in line]
    assert "featurizing at a checkpoint takes as long as" in line


class Ends(L.Callback):
    """Ends training in the third epoch."""

    def __init__(self, error):
        self.error = error

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 12:
            raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("of the user")])
def test_what_waits_when_training_is_stopped_is_told_and_done_later(tmp_path, said, error):
    torch.manual_seed(0)
    trak, saving = TRAKCallback(tmp_path / "store", budget=0), ModelCheckpoint(tmp_path / "files", save_top_k=-1)
    trainer, module = make_trainer(tmp_path, trak, Ends(error), saving), Classifier()
    with pytest.raises((SystemExit, ValueError)):
        trainer.fit(module, datamodule=Blobs())
    assert [entry.complete for entry in FeatureStore(tmp_path / "store")] == [False, False]
    assert "2 checkpoints of this run waited to be featurized" in said()[-1]
    last = max((tmp_path / "files").iterdir(), key=lambda path: path.stat().st_mtime)
    again = TRAKCallback(tmp_path / "store", budget=0)
    trainer = make_trainer(tmp_path, again, ModelCheckpoint(tmp_path / "files", save_top_k=-1))
    trainer.fit(Classifier(), datamodule=Blobs(), ckpt_path=last)
    assert [entry.complete for entry in FeatureStore(tmp_path / "store")] == [True] * 3


class Timed(L.Callback):
    """Advances a clock by ten seconds a training step, and notes how many checkpoints are featurized at each."""

    def __init__(self, clock, path):
        self.clock, self.path, self.seen = clock, path, []

    def on_train_batch_end(self, *_):
        self.clock.now += 10
        self.seen.append(sum(entry.complete for entry in FeatureStore(self.path)))


def test_a_checkpoint_has_its_turn_when_there_is_time(tmp_path, monkeypatch):
    """Saved after 5 steps of 10 s; one takes no time here, and is expected to take 100 s at first, of a share of 1."""
    clock = Clock()
    monkeypatch.setattr("lightning_trak.trainer.callback.Pace", lambda share, _, wait: Pace(share, 100.0, wait, clock))
    torch.manual_seed(0)
    trak, timed = TRAKCallback(tmp_path / "store", budget=1), Timed(clock, tmp_path / "store")
    saving = ModelCheckpoint(tmp_path / "files", save_top_k=-1)
    make_trainer(tmp_path, trak, timed, saving, accumulate_grad_batches=2).fit(Classifier(), datamodule=Blobs())
    assert timed.seen == [0] * 10 + [2] * 5


@pytest.mark.parametrize("budget", [-0.1, "much", True, float("nan")])
def test_a_budget_is_a_number(budget):
    with pytest.raises(ValueError, match="budget must be a number of at least 0"):
        TRAKCallback(budget=budget)


def test_a_budget_has_no_use_where_all_is_featurized_at_the_end():
    with pytest.raises(ValueError, match=r"nothing during training, so budget must be left out, got budget=0\.2"):
        TRAKCallback(featurize_on="fit_end", budget=0.2)


@pytest.mark.parametrize(("preconditioner", "whitened"), [("kronecker", True), ("none", False)])
def test_gradients_are_measured_as_they_will_be_featurized(tmp_path, monkeypatch, preconditioner, whitened):
    measured, seen = FeaturizationLoop.measured, []

    def noting(self, weights, digest, projector=None):
        seen.append(isinstance(projector, Whitening))
        return measured(self, weights, digest, projector)

    monkeypatch.setattr(FeaturizationLoop, "measured", noting)
    callback = TRAKCallback(tmp_path / "store", preconditioner=preconditioner)
    make_trainer(tmp_path, callback, max_epochs=1).fit(Classifier(), datamodule=Blobs())
    assert seen == [whitened]


def test_a_first_batch_that_cannot_be_featurized_is_told_and_training_goes_on(tmp_path, monkeypatch):
    def fails(self, *_):
        raise RuntimeError("no kernel for this")

    monkeypatch.setattr(FeaturizationLoop, "measured", fails)
    trainer = make_trainer(tmp_path, TRAKCallback(tmp_path / "store"), max_epochs=1)
    with pytest.warns(
        UserWarning, match="cannot be featurized now; it is tried again at the first checkpoint: no kern"
    ):
        trainer.fit(Classifier(), datamodule=Blobs())
    assert all(entry.complete for entry in FeatureStore(tmp_path / "store"))
