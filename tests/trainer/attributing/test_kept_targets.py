"""The store keeps the features of targets: a second call computes nothing again, unless something has changed."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak import FeatureStore
from tests.conftest import Blobs, Classifier, make_data
from tests.trainer.references import Noisy, feature_files, forget_scores, fresh

M = 40


class Counting(Classifier):
    """Counts the examples of its forward passes."""

    rows = 0

    def forward(self, x):
        Counting.rows += len(x)
        return super().forward(x)


def scores_of(root, targets, model=None, **kwargs):
    return fresh(root, **kwargs).attribute(model or Classifier(), DataLoader(targets, 4)).scores


def computed_again(root, targets):
    """Scores from the features that are stored."""
    forget_scores(root)
    return scores_of(root, targets)


def test_a_second_call_featurizes_no_target(finished):
    counts = []
    for _ in range(2):
        Counting.rows = 0
        scores = scores_of(finished, make_data(M, 2), Counting())
        counts.append(Counting.rows)
        torch.testing.assert_close(scores, computed_again(finished, make_data(M, 2)), rtol=0, atol=0)
    assert counts[0] - counts[1] > 2 * M  # of three checkpoints, less those that are checked
    assert len({path.parent for path in feature_files(finished)}) == 3


def test_checkpoints_that_are_added_are_all_that_is_computed(tmp_path, run):
    root, *_ = run
    first, *rest = sorted((root / "files").iterdir())
    times = []
    for chosen in ([first], [first, *rest]):
        targets = DataLoader(make_data(M, 2), 4)
        scores = fresh(tmp_path).attribute(Classifier(), targets, Blobs(), ckpt_path=chosen).scores
        files = [*tmp_path.glob("store/checkpoints/*/train/*.safetensors"), *feature_files(tmp_path)]
        times.append({path: path.stat().st_mtime_ns for path in files})
    assert len(times[1]) == 3 * len(times[0])
    assert times[0].items() <= times[1].items()
    alone = fresh(tmp_path / "alone")
    expected = alone.attribute(Classifier(), targets, Blobs(), ckpt_path=chosen).scores
    torch.testing.assert_close(scores, expected)
    assert len(feature_files(tmp_path)) == len(feature_files(tmp_path / "alone"))


@pytest.mark.parametrize("row", [0, 17, M - 1])
def test_targets_that_changed_in_one_number_are_others(finished, row):
    x, y = make_data(M, 2).tensors
    scores_of(finished, TensorDataset(x, y))
    kept = feature_files(finished)
    changed = x.clone()
    changed[row, 1] += 1e-3
    found = scores_of(finished, TensorDataset(changed, y))
    assert len(feature_files(finished)) == 2 * len(kept)
    shutil.rmtree(finished / "store" / "targets")
    torch.testing.assert_close(found, scores_of(finished, TensorDataset(changed, y)))


def test_another_order_is_another_set_of_targets(finished):
    x, y = make_data(M, 2).tensors
    one = scores_of(finished, TensorDataset(x, y))
    other = scores_of(finished, TensorDataset(x.flip(0), y.flip(0)))
    torch.testing.assert_close(one.flip(1), other, rtol=1e-4, atol=1e-6)


def test_damaged_features_of_targets_are_computed_again(finished):
    expected = scores_of(finished, make_data(M, 2))
    for path in feature_files(finished)[::9]:
        content = bytearray(path.read_bytes())
        content[-5] ^= 16
        path.write_bytes(content)
    files = feature_files(finished)
    train = {path: path.stat().st_mtime_ns for path in (finished / "store").glob("checkpoints/*/train/*.safetensors")}
    with pytest.warns(UserWarning, match=r"is damaged: .* files are computed again"):
        found = computed_again(finished, make_data(M, 2))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert feature_files(finished) == files
    assert train == {path: path.stat().st_mtime_ns for path in train}


def test_a_model_output_that_changed_is_an_error(finished):
    class Other(Classifier):
        def forward(self, x):
            return 2 * super().forward(x)

    scores_of(finished, make_data(M, 2))
    with pytest.raises(ValueError, match="of target rows .* model_output"):
        scores_of(finished, make_data(M, 2), Other())


def test_random_targets_are_not_kept(finished):
    with pytest.warns(UserWarning, match="Two reads of the same target examples differ"):
        assert scores_of(finished, Noisy(make_data(M, 2))).isfinite().all()
    assert not list((finished / "store").glob("targets/*/*"))


def test_a_store_that_cannot_be_written_gives_scores_all_the_same(finished):
    expected = scores_of(finished, make_data(M, 2))
    shutil.rmtree(finished / "store" / "targets")
    (finished / "store" / "targets").write_text("in the way")
    with pytest.warns(UserWarning, match="Features of targets could not be stored"):
        found = scores_of(finished, make_data(M, 2))
    torch.testing.assert_close(found, expected)


def test_the_targets_of_a_deleted_checkpoint_go_with_it(finished):
    scores_of(finished, make_data(M, 2))
    store = FeatureStore(finished / "store")
    first, *rest = store.digests
    store.discard(first)
    assert {path.parent.name for path in feature_files(finished)} == set(rest)


def test_starting_anew_leaves_no_targets(finished):
    scores_of(finished, make_data(M, 2))
    FeatureStore.remove(finished / "store")
    assert not list((finished / "store").glob("targets/*"))


def counted(root, targets):
    """Return the scores of some targets, and how many examples went through the model for them."""
    Counting.rows = 0
    found = scores_of(root, targets, Counting())
    return found, Counting.rows


def anew(root, targets):
    """Return the scores of some targets in a store that knows no others."""
    shutil.rmtree(root / "store" / "targets")
    return scores_of(root, targets)


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(range(M), id="added"),
        pytest.param(range(11, 30), id="some"),
        pytest.param(list(range(M))[::-1], id="another order"),
        pytest.param([5, 5, 39, 0, 5], id="repeated"),
    ],
)
def test_targets_of_another_set_are_not_featurized_again(finished, rows):
    data = make_data(M, 2)
    scores_of(finished, TensorDataset(*data[: M - 10] if isinstance(rows, range) and len(rows) == M else data[:]))
    counted(finished, data)  # tries engines, and computes what the checks of a call take
    found, computed = counted(finished, TensorDataset(*data[list(rows)]))
    _, alone = counted(finished, TensorDataset(*data[list(rows)]))
    torch.testing.assert_close(found, anew(finished, TensorDataset(*data[list(rows)])), rtol=1e-4, atol=1e-6)
    assert computed - alone <= 3 * 8  # the checks of what was copied, at three checkpoints


def test_added_targets_are_all_that_is_featurized(finished):
    data = make_data(M, 2)
    scores_of(finished, TensorDataset(*data[: M - 10]))
    found, computed = counted(finished, data)
    _, again = counted(finished, data)
    torch.testing.assert_close(found, anew(finished, data), rtol=1e-4, atol=1e-6)
    assert 3 * 10 <= computed - again <= 3 * (10 + 8)


def test_another_model_output_is_told_also_where_targets_are_copied(finished):
    class Other(Classifier):
        def forward(self, x):
            return super().forward(x) + (len(x) > 0) * x.sum(1, keepdim=True) * torch.tensor([1.0, 2.0, 3.0])

    data = make_data(M, 2)
    scores_of(finished, data)
    for path in (finished / "store").glob("checkpoints/*/train"):
        shutil.rmtree(path)
    with pytest.raises(ValueError, match="of target rows .* model_output"):
        fresh(finished).attribute(Other(), DataLoader(TensorDataset(*data[3:30]), 4), Blobs())


@pytest.mark.parametrize("damage", ["bit", "other targets"])
def test_damaged_digests_of_targets_copy_no_wrong_row(finished, damage):
    data = make_data(M, 2)
    expected = scores_of(finished, data).flip(1)
    (path,) = (finished / "store" / "targets").glob("*/examples.safetensors")
    content = bytearray(path.read_bytes())
    if damage == "bit":
        content[-20] ^= 4
        path.write_bytes(content)
    else:  # whole, but not of these features
        scores_of(finished, TensorDataset(*data[7:]))
        (other,) = set(path.parents[1].glob("*/examples.safetensors")) - {path}
        shutil.copyfile(other, path)
        shutil.rmtree(other.parent)
    found = scores_of(finished, TensorDataset(*(part.flip(0) for part in data[:])))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_curvature_that_is_gone_is_computed_again_also_where_no_target_is(finished):
    """The features of targets are of the former curvature, so they are computed again too."""
    expected = scores_of(finished, make_data(M, 2))
    store = FeatureStore(finished / "store")
    for digest in store.digests:
        store[digest].whitening_path.unlink()
    trainer = fresh(finished)
    with pytest.warns(UserWarning, match="is damaged: it belongs elsewhere"):
        found = trainer.attribute(Classifier(), DataLoader(make_data(M, 2), 4), Blobs()).scores
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_all_that_is_of_a_curvature_that_is_gone_is_deleted_at_once(finished):
    """However many checkpoints there are: each call mends three damages."""
    scores_of(finished, make_data(M, 2))
    entry, *others = FeatureStore(finished / "store")
    whole = {path for path in feature_files(finished) if path.parent.name != entry.digest}
    arrays, notes = entry.read_whitening(), entry.whitening_notes
    entry.whitening_path.unlink()
    entry.write_whitening(arrays, notes)  # the same numbers, but who knows?
    deleted = entry.delete_damaged(entry.whitening_path)
    assert set(feature_files(finished)) == whole
    assert {path.parent.name for path in deleted} == {"train", entry.digest}
    assert all(other.complete for other in others)
