"""How much of the time of training featurizing may take, and what a checkpoint will take."""

from __future__ import annotations

import math
from contextlib import suppress
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_trak import FeatureStore, TRAKCallback
from lightning_trak.trainer.pace import Coming, Pace
from tests.conftest import Blobs, Classifier, make_trainer


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_featurizing_stays_within_its_share():
    """Every checkpoint takes 3 seconds, of 10 seconds of training between two: a loop of its own counts them."""
    clock = Clock()
    pace, trained, spent = Pace(0.2, 3.0, clock), 0.0, 0.0
    for _ in range(30):
        clock.now += 10
        trained += 10
        while pace.allows_another():
            with pace.featurizing():
                clock.now += 3
                spent += 3
        assert 0.2 * trained - 3 < spent <= 0.2 * trained


def test_what_featurizing_took_counts_for_the_next():
    clock = Clock()
    pace = Pace(1.0, 1.0, clock)
    clock.now += 5
    assert pace.allows_another()
    with suppress(ValueError), pace.featurizing():
        clock.now += 4  # more than expected, and it counts although it fails
        raise ValueError("fails")
    assert not pace.allows_another()  # 4 spent and 4 expected, of 5
    clock.now += 3
    assert pace.allows_another()


def test_no_share_is_no_limit():
    pace = Pace(None, 1e9, Clock())
    assert not pace.limited
    assert pace.allows_another()


@pytest.mark.parametrize(("steps", "told_after"), [(1, 1), (2, 2), (4, 4), (6, 6), (100, 6)])
def test_an_epoch_is_timed_without_its_first_step(steps, told_after):
    clock, told = Clock(), {}
    pace = Pace(None, 1.0, clock)
    for number in range(steps):
        pace.step_began()
        clock.now += 7 if number == 0 else 2
        seconds = pace.step_ended(steps)
        if seconds is not None:
            told[number + 1] = seconds
    assert told == {told_after: 7 if steps == 1 else 2 * steps}


def test_featurizing_between_steps_does_not_count_as_training():
    clock = Clock()
    pace = Pace(None, 1.0, clock)
    for number in range(3):
        pace.step_began()
        clock.now += 2
        seconds = pace.step_ended(3)
        if number == 1:
            with pace.featurizing():
                clock.now += 50
    assert seconds == 6


def test_an_endless_epoch_is_not_compared(tmp_path):
    coming = Coming(40, 1.5, 1000, whitened=True)
    store = SimpleNamespace(dirpath=tmp_path)
    assert "takes about 1.5 s, and 1 kB on the disk" in coming.text(math.inf, store)
    assert coming.text(math.inf, store).endswith(
        "checkpoints. Gradients are whitened by the curvature of each parameter."
    )
    assert "takes about 1.5 s, as long as 0.75 epochs of training, and" in coming.text(2.0, store)


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
    assert len(left) == (budget is not None)
    if budget == 0:
        assert left[0].startswith(
            "TRAKCallback: 4 checkpoints waited for the end of training, by budget=0. Featurizing"
        )


def test_a_file_that_is_deleted_while_it_waits_costs_nothing(tmp_path):
    kept = {"save_top_k": 1, "monitor": "epoch", "mode": "max"}
    assert len(fit(tmp_path / "all", None, **kept)[1]) == 4
    _, store, _ = fit(tmp_path / "few", 0, **kept)
    assert [entry.meta["epoch"] for entry in store] == [3]


def test_scores_do_not_depend_on_the_budget(tmp_path):
    (_, one, first), (_, other, second) = (fit(tmp_path / str(budget), budget) for budget in (None, 0))
    assert one.digests == other.digests  # training is the same too
    scores = [trainer.attribute(datamodule=Blobs()).scores for trainer in (first, second)]
    torch.testing.assert_close(*scores, rtol=1e-3, atol=1e-5)


def test_what_a_checkpoint_takes_is_told_beside_an_epoch(tmp_path, said):
    fit(tmp_path, None)
    (line,) = [line for line in said() if "at each checkpoint" in line]
    assert "featurizing 40 examples takes about" in line
    assert "epochs of training, and" in line
    assert "which has room for" in line


@pytest.mark.parametrize("budget", [-0.1, "much", True, float("nan")])
def test_a_budget_is_a_number(budget):
    with pytest.raises(ValueError, match="budget must be a number of at least 0"):
        TRAKCallback(budget=budget)


def test_a_budget_has_no_use_where_all_is_featurized_at_the_end():
    with pytest.raises(ValueError, match=r"nothing during training, so budget must be left out, got budget=0\.2"):
        TRAKCallback(featurize_on="fit_end", budget=0.2)
