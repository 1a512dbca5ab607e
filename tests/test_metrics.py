"""The linear datamodeling score against SciPy, one column at a time."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.stats import spearmanr

from lightning_trak.metrics import LinearDatamodelingScore, linear_datamodeling_score, spearman


def spearman_reference(preds, target):
    """Column by column; SciPy has no number for a column that does not vary, and it orders nothing."""
    found = []
    for one, other in zip(preds.T, target.T, strict=True):
        varies = len(set(one.tolist())) > 1 and len(set(other.tolist())) > 1
        found.append(spearmanr(one, other).statistic if varies else 0.0)
    return np.array(found)


def lds_reference(scores, masks, outputs):
    """Subset by subset, target by target."""
    s, (n, m) = len(masks), scores.shape
    predicted = np.zeros((s, m))
    for t in range(s):
        for i in range(n):
            if masks[t, i]:
                predicted[t] += scores[i]
    return spearman_reference(predicted, outputs)


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 9), st.integers(1, 4), st.data())
def test_spearman_against_scipy_with_ties(s, m, data):
    few = st.integers(-2, 2)
    preds, target = (data.draw(arrays.arrays(np.float32, (s, m), elements=few)) for _ in range(2))
    got = spearman(torch.tensor(preds), torch.tensor(target))
    np.testing.assert_allclose(got.numpy(), spearman_reference(preds, target), atol=1e-6)


def make(s=40, n=30, m=5, noise=2.0, seed=0):
    rng = np.random.default_rng(seed)
    scores, masks = rng.normal(size=(n, m)), rng.uniform(size=(s, n)) < 0.5
    outputs = masks @ scores + noise * rng.normal(size=(s, m))
    return scores, masks, outputs


def tensors(*values):
    return [torch.tensor(value) for value in values]


def test_lds_against_loops():
    scores, masks, outputs = make()
    got = linear_datamodeling_score(*tensors(scores, masks, outputs))
    expected = lds_reference(scores, masks, outputs).mean()
    assert got.shape == ()
    assert got.item() == pytest.approx(expected, abs=1e-6)
    assert 0.5 < expected < 0.95
    assert linear_datamodeling_score(*tensors(-scores, masks, outputs)).item() == pytest.approx(-expected, abs=1e-6)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_metric_batch_by_batch():
    scores, masks, outputs = make()
    preds, target = tensors(masks.astype(float) @ scores, outputs)
    metric = LinearDatamodelingScore()
    for part in torch.arange(40).split(7):
        metric.update(preds[part], target[part])
    np.testing.assert_allclose(metric.per_target().numpy(), lds_reference(scores, masks, outputs), atol=1e-6)
    assert metric.compute().item() == pytest.approx(lds_reference(scores, masks, outputs).mean(), abs=1e-6)
    again = pickle.loads(pickle.dumps(metric))
    assert again.compute() == metric.compute()
    assert again.interval() == metric.interval()
    metric.reset()
    with pytest.raises(ValueError, match="no subsets yet"):
        metric.compute()


def bootstrap_reference(preds, target, times, rng):
    """Ranks stay those of the sample; subsets and targets are drawn again."""
    ranks = [np.stack([np.argsort(np.argsort(column)) for column in values.T], 1) for values in (preds, target)]
    means = []
    for _ in range(times):
        rows, columns = rng.integers(len(preds), size=len(preds)), rng.integers(preds.shape[1], size=preds.shape[1])
        drawn = [values[rows][:, columns] for values in ranks]
        means.append(np.mean([np.corrcoef(*(values[:, j] for values in drawn))[0, 1] for j in range(len(columns))]))
    return np.quantile(means, [0.025, 0.975])


def test_interval_against_a_loop():
    scores, masks, outputs = make()
    preds = masks.astype(float) @ scores
    metric = LinearDatamodelingScore(n_bootstrap=4000)
    metric.update(*tensors(preds, outputs))
    expected = bootstrap_reference(preds, outputs, 4000, np.random.default_rng(1))
    np.testing.assert_allclose([bound.item() for bound in metric.interval()], expected, atol=0.01)
    lower, upper = metric.interval()
    assert lower < metric.compute() < upper
    narrow = LinearDatamodelingScore(confidence=0.5)
    narrow.update(*tensors(preds, outputs))
    assert lower < narrow.interval().lower < narrow.interval().upper < upper


def test_interval_is_exact_where_nothing_varies():
    preds = torch.arange(10.0)[:, None].repeat(1, 3)
    metric = LinearDatamodelingScore()
    metric.update(preds, preds**3)
    assert [bound.item() for bound in metric.interval()] == pytest.approx([1, 1], abs=1e-5)


def test_plot():
    import matplotlib as mpl

    mpl.use("Agg")
    metric = LinearDatamodelingScore()
    metric.update(*tensors(*make()[::2][:1], make()[0]))
    _, axis = metric.plot()
    assert axis.get_ylim()[0] <= -1


def _process(rank, folder, queue):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/sync", rank=rank, world_size=2)
    scores, masks, outputs = make()
    preds, target = tensors(masks.astype(float) @ scores, outputs)
    metric = LinearDatamodelingScore()
    metric.update(preds[rank::2], target[rank::2])
    queue.put((metric.compute().item(), metric.per_target().tolist(), [bound.item() for bound in metric.interval()]))
    torch.distributed.destroy_process_group()


def test_two_processes_see_all_subsets(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    processes = [context.Process(target=_process, args=(rank, tmp_path, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    results = [queue.get() for _ in processes]
    expected = lds_reference(*make())
    order = torch.cat([torch.arange(0, 40, 2), torch.arange(1, 40, 2)])
    scores, masks, outputs = make()
    whole = LinearDatamodelingScore()
    whole.update(*(value[order] for value in tensors(masks.astype(float) @ scores, outputs)))
    for mean, per_target, interval in results:
        assert mean == pytest.approx(expected.mean(), abs=1e-6)
        np.testing.assert_allclose(per_target, expected, atol=1e-6)
        assert interval == pytest.approx([bound.item() for bound in whole.interval()], abs=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"masks": torch.ones(4, 3)}, "masks must be bool, got torch.float32"),
        ({"masks": torch.ones(4, 2, dtype=torch.bool)}, r"scores must be \(n, m\) and masks \(s, n\)"),
        ({"scores": torch.ones(3)}, r"got \(3,\)"),
        ({"outputs": torch.ones(5, 2)}, r"must both be \(subsets, targets\), got \(4, 2\) and \(5, 2\)"),
        ({"outputs": torch.full((4, 2), torch.nan)}, "outputs have NaN or infinite values in 8 places"),
        ({"scores": torch.full((3, 2), torch.inf)}, "scores have NaN or infinite"),
        ({"masks": torch.ones(1, 3, dtype=torch.bool), "outputs": torch.ones(1, 2)}, "at least 2 of them, got 1"),
    ],
)
def test_what_does_not_fit(change, message):
    good = {"scores": torch.ones(3, 2), "masks": torch.ones(4, 3, dtype=torch.bool), "outputs": torch.ones(4, 2)}
    with pytest.raises(ValueError, match=message):
        linear_datamodeling_score(**(good | change))


def test_arguments_out_of_range():
    for options in ({"n_bootstrap": 0}, {"confidence": 1.0}):
        with pytest.raises(ValueError, match="n_bootstrap must be a positive integer and confidence between"):
            LinearDatamodelingScore(**options)
