"""Scores beyond the memory limit are those within it; they are computed once, and by several processes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from lightning_trak import Attribution, FeatureStore, calibrate
from lightning_trak.evaluation.ground_truth import GroundTruth
from lightning_trak.results.stored_scores import StoredScores
from tests.conftest import Classifier
from tests.trainer.references import fresh


@pytest.fixture(scope="module", params=["auto", "none"])
def both(request, run, tmp_path_factory):
    """An attribution within the limit, and one beyond it."""
    root, _, _, data = run
    files = sorted((root / "files").iterdir())
    folder = tmp_path_factory.mktemp("large")
    return [
        fresh(folder, memory_limit=limit, preconditioner=request.param).attribute(
            Classifier(), datamodule=data, ckpt_path=files
        )
        for limit in (4e9, 0)
    ]


def test_scores_are_the_same(both):
    within, beyond = both
    assert isinstance(within.scores, torch.Tensor)
    assert isinstance(beyond.scores, StoredScores)
    torch.testing.assert_close(beyond.scores[:], within.scores)
    assert beyond.info == within.info
    assert torch.equal(beyond.top(3).indices, within.top(3).indices)


def test_the_standard_error_is_computed_when_it_is_asked_for(both):
    within, beyond = both
    assert isinstance(beyond.standard_error, StoredScores)
    torch.testing.assert_close(beyond.standard_error[:], within.standard_error, rtol=1e-3, atol=1e-6)
    assert beyond.convergence().agreement == pytest.approx(within.convergence().agreement, abs=1e-3)


def test_questions_are_answered_from_the_features(both):
    within, beyond = both
    torch.testing.assert_close(beyond.without([0, 3]), within.without([0, 3]))
    masks = torch.rand(12, 40, generator=torch.Generator().manual_seed(0)) < 0.5
    truth = GroundTruth(masks, (masks.float() @ within.scores)[:, None])
    one, other = calibrate(beyond, truth), calibrate(within, truth)
    torch.testing.assert_close(one.scores[:], other.scores, rtol=1e-3, atol=1e-5)


def chunks_of(root):
    return {path: path.stat().st_mtime_ns for path in (root / "store").glob("targets/*/scores-*/*.safetensors")}


def test_they_are_computed_once_unless_something_changed(run, tmp_path):
    root, _, _, data = run
    files = sorted((root / "files").iterdir())

    def scores(**kwargs):
        own = fresh(tmp_path, memory_limit=0, preconditioner="none", **kwargs)
        return own.attribute(Classifier(), datamodule=data, ckpt_path=files, name="large").scores

    first = scores(damping=0.1)
    kept = chunks_of(tmp_path)
    assert len(kept) == 1
    assert torch.equal(scores(damping=0.1)[:], first[:])
    assert chunks_of(tmp_path) == kept
    for number, options in enumerate(
        ({"damping": 0.2}, {"damping": 0.1, "curvature": False}, {"damping": 0.1, "temperature": 2.0}), 2
    ):
        assert not torch.allclose(scores(**options)[:], first[:])
        assert len(chunks_of(tmp_path)) == number
    store = FeatureStore(tmp_path / "store")
    assert isinstance(Attribution.load(store.scores_dir("large")).scores, StoredScores)


def test_fewer_checkpoints_are_other_scores(run, tmp_path):
    root, _, _, data = run
    files = sorted((root / "files").iterdir())
    for number, chosen in enumerate((files, files[:1]), 1):
        fresh(tmp_path, memory_limit=0).attribute(Classifier(), datamodule=data, ckpt_path=chosen)
        assert len(chunks_of(tmp_path)) == number


@pytest.mark.parametrize("limit", [-1, True, "1 GB", float("nan")])
def test_limits_that_are_none(tmp_path, limit):
    with pytest.raises(ValueError, match="memory_limit must be a number of at least 0"):
        fresh(tmp_path, memory_limit=limit)


MANY = """
import resource, sys
import numpy as np, torch
from lightning_trak import FeatureStore
from lightning_trak.influence import Estimator, Options
from lightning_trak.trainer.featurizing.train_features import train_features
store = FeatureStore.create(sys.argv[1], {"n_train": 6, "parameters": {}, "projection": {}, "chunk_rows": 2})
rng = np.random.default_rng(0)
for number in range(int(sys.argv[2])):
    entry = store.add(f"{number:04d}", {}, {"w": torch.zeros(1)})
    for start in (0, 2, 4):
        names = ("loss_grad", "curvature", "outputs")
        numbers = {name: rng.uniform(0.1, 1, 2).astype("f4") for name in names}
        entry.train.write(start, {"features": rng.normal(size=(2, 3)).astype("f4"), **numbers})
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
trains = [train_features(entry, None) for entry in store]
found = Estimator(trains, Options(damping=0.1))([torch.ones(2, 3)] * len(trains))
print(len(trains), bool(found.mean.isfinite().all()))
"""


def test_hundreds_of_checkpoints_need_no_more_open_files(tmp_path):
    command = [sys.executable, "-c", MANY, str(tmp_path), "350"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "350 True\n", done.stderr[-2000:]
