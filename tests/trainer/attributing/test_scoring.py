"""Scores are computed in chunks, which the store keeps: a second call and other processes read them."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from safetensors.numpy import load_file
from torch.utils.data import DataLoader

from lightning_trak import FeatureStore, GroundTruth, calibrate
from lightning_trak.influence import Estimator, Options, TrainFeatures
from lightning_trak.store.arrays import read_with_notes, verified_place, write_arrays
from lightning_trak.store.files import read_json, write_json
from lightning_trak.trainer.attributing.scoring import Scoring
from lightning_trak.trainer.host.reports import Reports
from tests.conftest import Classifier, make_data, make_trainer
from tests.trainer.references import Noisy, forget_scores, fresh

M = 40
KINDS = [{}, {"top_k": 3}]


def attribution_of(root, targets=None, **kwargs):
    loader = DataLoader(make_data(M, 2) if targets is None else targets, 4)
    return fresh(root).attribute(Classifier(), loader, **kwargs)


def score_files(root):
    return sorted((root / "store" / "targets").glob("*/scores-*/*.safetensors"))


def numbers_of(attribution):
    """All numbers of an attribution that come from scores."""
    found = [*attribution.top(3), *attribution.bottom(3)]
    try:
        return [*found, attribution.scores, attribution.standard_error, attribution.convergence().agreement]
    except AttributeError:  # of the extremes alone
        return found


@pytest.mark.parametrize("kwargs", KINDS)
def test_a_second_call_gives_the_same_and_writes_nothing(finished, kwargs):
    first = attribution_of(finished, **kwargs)
    times = {path: path.stat().st_mtime_ns for path in score_files(finished)}
    assert times
    second = attribution_of(finished, **kwargs)
    for one, other in zip(numbers_of(first), numbers_of(second), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert times == {path: path.stat().st_mtime_ns for path in score_files(finished)}


@pytest.mark.parametrize("kwargs", KINDS)
def test_a_second_call_reads_what_is_stored(finished, kwargs):
    """Numbers that were exchanged by those that can write checksums, too, come back."""
    attribution_of(finished, **kwargs)
    for path in score_files(finished):
        place = verified_place(path)
        arrays, notes = read_with_notes(path, place)
        assert not notes
        path.unlink()
        write_arrays(
            path, {name: array + 1 if array.dtype == np.float32 else array for name, array in arrays.items()}, place
        )
    again = attribution_of(finished, **kwargs)
    shutil.rmtree(finished / "store" / "targets")
    anew = attribution_of(finished, **kwargs)
    torch.testing.assert_close(again.top(3).values, anew.top(3).values + 1, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kwargs", KINDS)
@pytest.mark.parametrize("damage", ["flipped", "cut", "other arrays", "other shape", "other rows"])
def test_damaged_scores_are_computed_again(finished, kwargs, damage):
    expected = numbers_of(attribution_of(finished, **kwargs))
    paths = score_files(finished)
    for path in paths:
        content = bytearray(path.read_bytes())
        if damage == "flipped":
            content[-5] ^= 16
            path.write_bytes(content)
        elif damage == "cut":
            path.write_bytes(content[:-7])
        else:
            place, arrays = verified_place(path), load_file(path)
            others = {
                "other arrays": {"other": np.zeros(3, "f4")},
                "other shape": {name: np.zeros((len(array), 1), "f4") for name, array in arrays.items()},
                "other rows": {name: array - 1 if name == "indices" else array[:-1] for name, array in arrays.items()},
            }
            path.unlink()
            write_arrays(path, others[damage], place)
    with pytest.warns(UserWarning, match=r"is damaged: .*\. It is computed again"):
        found = numbers_of(attribution_of(finished, **kwargs))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert score_files(finished) == paths
    found = numbers_of(attribution_of(finished, **kwargs))  # without a warning
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("change", ["temperature", "top_k", "checkpoints", "training time"])
def test_other_settings_are_other_scores(finished, change):
    attribution_of(finished, top_k=3)
    count, store, settings = len(score_files(finished)), FeatureStore(finished / "store"), {}
    if change == "checkpoints":
        store.discard(store.digests[0])
    elif change == "training time":  # λ may follow from it
        path = store[store.digests[0]].path / "meta.json"
        write_json(path, read_json(path) | {"training_time": {"time": 3.0, "steps": 2}})
    elif change == "temperature":
        settings = {"temperature": 2.0}
    fresh(finished, **settings).attribute(
        Classifier(), DataLoader(make_data(M, 2), 4), top_k=4 if change == "top_k" else 3
    )
    assert len(score_files(finished)) > count


@pytest.mark.parametrize("kwargs", KINDS)
def test_scores_of_random_targets_are_not_kept(finished, kwargs):
    with pytest.warns(UserWarning, match="Two reads of the same target examples differ"):
        attribution = attribution_of(finished, Noisy(make_data(M, 2)), **kwargs)
    assert attribution.top(3).values.isfinite().all()
    assert not score_files(finished)


def test_a_store_that_cannot_be_written_gives_scores_all_the_same(finished):
    expected = [numbers_of(attribution_of(finished, **kwargs)) for kwargs in KINDS]
    for folder in (finished / "store" / "targets").glob("*/scores-*"):
        shutil.rmtree(folder)
        folder.write_text("in the way")
    for kwargs, numbers in zip(KINDS, expected, strict=True):
        with pytest.warns(UserWarning, match="Scores could not be stored"):
            found = numbers_of(attribution_of(finished, **kwargs))
        for one, other in zip(found, numbers, strict=True):
            torch.testing.assert_close(one, other)


class Counting(Estimator):
    """Notes for which training examples it computes scores."""

    computed = ()

    def scores(self, solved, *args, rows, **kwargs):
        self.computed = (*self.computed, rows)
        return super().scores(solved, *args, rows=rows, **kwargs)

    def extremes(self, solved, k, *args, rows):
        self.computed = (*self.computed, rows)
        return super().extremes(solved, k, *args, rows=rows)


def scoring(root, n, m, k, checkpoints, *, memory_limit=4e9, loss_grad=1.0):
    """Scores of random features, and these features: (n, k) and (m, k) at each checkpoint."""
    rng = np.random.default_rng(0)
    trains = [
        TrainFeatures(*(rng.normal(size=shape).astype("f4") for shape in ((n, k), n)), np.ones(n, "f4"))
        for _ in range(checkpoints)
    ]
    trains = [replace(train, loss_grad=train.loss_grad * np.float32(loss_grad)) for train in trains]
    phi = [torch.from_numpy(rng.normal(size=(m, k)).astype("f4")) for _ in trains]
    manifest = {"n_train": n, "parameters": {}, "projection": {}, "chunk_rows": 64}
    store = FeatureStore(root / "store") if (root / "store").exists() else FeatureStore.create(root / "store", manifest)
    entries = [SimpleNamespace(place=str(number), created=1, derived=root, meta={}) for number in range(checkpoints)]
    trainer = make_trainer(root)
    job = SimpleNamespace(store=store, entries=entries, memory_limit=memory_limit, trainer=trainer)
    estimator = Counting(trains, Options(damping=0.1))
    reader = SimpleNamespace(reports=Reports(), trainer=trainer)
    targets = SimpleNamespace(digest="0" * 32, kept=True, outputs=torch.zeros(m), reader=reader)

    def solve():
        return [estimator.solve(train, one) for train, one in zip(trains, phi, strict=True)]

    return Scoring(job, estimator, targets, solve), trains, phi


def reference(trains, phi):
    """τ at each checkpoint, in float64."""
    found = []
    for train, one in zip(trains, phi, strict=True):
        features = train.features.astype("f8")
        gram = features.T @ features
        damped = gram + 0.1 * np.diag(gram).mean() * np.eye(len(gram))
        found.append(features @ np.linalg.solve(damped, one.numpy().T.astype("f8")) * train.loss_grad[:, None])
    return np.stack(found)


@pytest.mark.parametrize(
    ("n", "m", "memory_limit", "chunks"),
    [
        pytest.param(2700, 2000, 4e9, 3, id="16 MiB in a chunk"),
        pytest.param(2000, 3000, 0, 3, id="8 MiB on disk"),
        pytest.param(65, 4, 4e9, 1, id="one chunk"),
    ],
)
def test_scores_against_float64(tmp_path, n, m, memory_limit, chunks):
    own, trains, phi = scoring(tmp_path, n=n, m=m, k=5, checkpoints=2, memory_limit=memory_limit)
    expected = reference(trains, phi)
    scores, spread = own.scores()
    assert len(score_files(tmp_path)) == chunks
    np.testing.assert_allclose(scores[:], expected.mean(0), rtol=1e-3, atol=1e-5)
    again = own.spread()  # by itself
    for found in filter(None, [spread, again]):
        np.testing.assert_allclose(found.standard_error[:], expected.std(0, ddof=1) / 2**0.5, rtol=1e-3, atol=1e-5)
        rows = np.linspace(0, n - 1, 64).round().astype(int)
        np.testing.assert_allclose(found.sample, expected[:, rows], rtol=1e-3, atol=1e-5)
    assert (spread is None) == (memory_limit == 0)


def test_extremes_of_several_parts_against_float64(tmp_path):
    """In parts of 2048 and 104 training examples."""
    own, trains, phi = scoring(tmp_path, n=4200, m=4000, k=2048, checkpoints=1)
    expected = torch.from_numpy(reference(trains, phi)[0])
    found = own.extremes(4)
    assert len(score_files(tmp_path)) == 3
    for side, largest in ((found.top, True), (found.bottom, False)):
        values, _ = expected.topk(4, dim=0, largest=largest)
        torch.testing.assert_close(side.values.double(), values.T, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(expected.gather(0, side.indices.T), values, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["scores", "extremes"])
def test_two_at_a_time_share_the_work(tmp_path, kind):
    size = {"n": 4000, "m": 3000, "k": 5} if kind == "scores" else {"n": 4200, "m": 4000, "k": 2048}
    limit = 0 if kind == "scores" else 4e9
    both = [scoring(tmp_path, **size, checkpoints=1, memory_limit=limit)[0] for _ in range(2)]
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda own: own.scores()[0][:] if kind == "scores" else own.extremes(4).top.values, both))
    assert torch.equal(*found)
    computed = sorted((rows.start, rows.stop) for own in both for rows in own.estimator.computed)
    assert len(computed) > 1
    assert all(own.estimator.computed for own in both)
    assert [*computed[0][:1], *(stop for _, stop in computed)] == [*(start for start, _ in computed), size["n"]]


def test_scores_of_another_gradient_are_others(tmp_path):
    own = scoring(tmp_path, n=65, m=4, k=5, checkpoints=2)[0]
    other = scoring(tmp_path, n=65, m=4, k=5, checkpoints=2, loss_grad=3.0)[0]
    torch.testing.assert_close(other.scores()[0], 3 * own.scores()[0])


class LastLayer(Classifier):
    """Has the same outputs, but no gradient for the first layers."""

    def forward(self, x):
        return self.net[-1](self.net[:-1](x).detach())


def test_a_checkpoint_that_was_added_again_has_other_scores(tmp_path, run):
    """It may have another gradient: what compared it with the model was deleted with it."""
    root, _, _, data = run
    files = sorted((root / "files").iterdir())

    def scores_of(folder, model):
        own = fresh(folder, preconditioner="none", damping=0.1)
        return own.attribute(model, datamodule=data, ckpt_path=files, top_k=3).top(3).values

    first = scores_of(tmp_path, Classifier())
    store = FeatureStore(tmp_path / "store")
    for digest in list(store.digests):
        store.discard(digest)
    found, expected = scores_of(tmp_path, LastLayer()), scores_of(tmp_path / "new", LastLayer())
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, first, rtol=1e-2)


def test_each_calibration_has_scores_of_its_own(finished):
    attribution = attribution_of(finished)
    masks = torch.rand(12, 40, generator=torch.Generator().manual_seed(0)) < 0.5
    truths = [GroundTruth(masks, factor * (masks.float() @ attribution.scores)[:, None]) for factor in (1, 3)]
    first = [calibrate(attribution, truth).scores for truth in truths]
    assert not torch.allclose(*first, rtol=1e-2)
    forget_scores(finished)
    for found, truth in zip(first, truths, strict=True):
        torch.testing.assert_close(found, calibrate(attribution, truth).scores)


@pytest.mark.parametrize("kept", [True, False])
def test_a_process_that_is_told_to_end_stops_within_a_chunk(tmp_path, kept):
    own = scoring(tmp_path, n=65, m=4, k=5, checkpoints=2)[0]
    own.targets.kept = kept
    own.job.trainer._signal_connector.received_sigterm = True
    for compute in (own.scores, own.spread, lambda: own.extremes(2)):
        with pytest.raises(SIGTERMException):
            compute()
    assert not score_files(tmp_path)
    own.job.trainer._signal_connector.received_sigterm = False
    assert own.scores()[0].isfinite().all()


def test_a_damaged_chunk_that_cannot_be_replaced_is_in_nobodys_way(finished):
    expected = numbers_of(attribution_of(finished))
    for path in score_files(finished):
        path.unlink()
        (path / "in the way").mkdir(parents=True)
    not_stored = pytest.warns(UserWarning, match="Scores could not be stored")
    with not_stored, pytest.warns(UserWarning, match=r"is damaged: .*\. It is computed again"):
        found = numbers_of(attribution_of(finished))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
