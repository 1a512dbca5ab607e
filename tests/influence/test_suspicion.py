"""Numbers behind suspects, against slow and obvious ones."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from lightning_trak.features.sparse_matrix import SparseMatrix
from lightning_trak.influence import Sketch, findings, nearest, outliers


def nearest_one_by_one(rows, others=None):
    indices, cosines = [], []
    for i, row in enumerate(rows):
        among = rows[:i] if others is None else others
        values = [(float(row @ other), -j) for j, other in enumerate(among)]
        best = max(values, default=(-1.0, 1))
        indices.append(-best[1])
        cosines.append(best[0])
    return indices, cosines


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("n", [0, 1, 2, 90])
def test_nearest_is_that_of_a_loop(n, own):
    rows, others = (normalize(torch.randn(size, 5, generator=torch.Generator().manual_seed(size))) for size in (n, 33))
    done = []
    indices, cosines = nearest(rows, None if own else others, done.append)
    expected = nearest_one_by_one(rows, None if own else others)
    assert indices.tolist() == expected[0]
    assert cosines.tolist() == pytest.approx(expected[1], abs=1e-6)
    assert sum(done) == n


def test_nearest_across_blocks():
    """More rows than a block has: a copy far away is found, and never a later one."""
    rows = normalize(torch.randn(5000, 8, generator=torch.Generator().manual_seed(0)))
    rows[4999], rows[2100], rows[2047] = rows[3], rows[2099], rows[2046]
    indices, cosines = nearest(rows)
    assert [indices[row].item() for row in (4999, 2100, 2047)] == [3, 2099, 2046]
    products = (rows @ rows.T).tril(-1) - 2 * torch.ones(5000, 5000).triu()
    assert indices[1:].tolist() == products[1:].argmax(1).tolist()
    torch.testing.assert_close(cosines[1:], products[1:].amax(1).clamp(max=1))
    assert nearest(rows[:7], rows)[0].tolist() == [*range(7)]


def sketched(parts, dimension=512):
    sketch = Sketch(len(parts[0]), dimension)
    for checkpoint, features in enumerate(parts):
        sketch.add(slice(0, len(features)), features, checkpoint)
    return sketch.rows()


def test_cosines_of_sketches_are_the_mean_cosines_of_features():
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(40, 3000, generator=generator) * 10**scale for scale in (-3, 0, 3)]
    for part in parts:
        part[1] = part[0] + 0.1 * part.std() * torch.randn(3000, generator=generator)  # near
        part[2] = part[0] * 7  # of the same direction
    parts[0][3], parts[0][4] = parts[0][5], 0  # alike at one checkpoint of three, and zero there
    expected = torch.stack([normalize(part) @ normalize(part).T for part in parts]).mean(0)
    rows = sketched(parts)
    found = rows @ rows.T
    assert found[0, 2] == pytest.approx(1, abs=1e-5)
    assert found[0, 1] == pytest.approx(expected[0, 1].item(), abs=0.005)
    assert found[3, 5] == pytest.approx(expected[3, 5].item(), abs=0.1)
    apart = (found - expected)[~torch.eye(40, dtype=torch.bool) & (torch.arange(40) != 4)]
    assert apart.abs().max() < 0.25
    assert apart.std() < 0.06


def test_sketches_of_sparse_rows_are_those_of_dense_ones():
    generator = torch.Generator().manual_seed(1)
    columns = torch.stack([torch.randperm(900, generator=generator)[:20] for _ in range(6)])
    values = torch.randn(6, 20, generator=generator)
    dense = torch.zeros(6, 900).scatter_(1, columns, values)
    torch.testing.assert_close(sketched([SparseMatrix(columns, values)]), sketched([dense]))


def test_sketch_spreads_columns_evenly():
    """Of unit vectors: every place and both signs are as frequent, at every checkpoint differently."""
    sketch, other = Sketch(4096, 64), Sketch(4096, 64)
    sketch.add(slice(0, 4096), torch.eye(4096), 0)
    other.add(slice(0, 4096), torch.eye(4096), 1)
    rows = sketch.rows()
    assert (rows.abs().sum(0) - 64).abs().max() < 5 * 8
    assert rows.sum().abs() < 5 * 64
    assert (rows * other.rows()).sum().abs() < 5 * 8


def test_a_row_of_zeros_resembles_none():
    rows = sketched([torch.tensor([[0.0, 0.0], [1.0, 2.0], [0.0, 0.0]])])
    assert nearest(rows)[1].tolist() == [-1, 0, 0]


def test_sketch_refuses_other_dimensions():
    with pytest.raises(ValueError, match="power of two, got 100"):
        Sketch(3, 100)


def test_outliers_do_not_hide_each_other():
    bulk = torch.randn(900, generator=torch.Generator().manual_seed(0))
    planted = torch.cat([bulk, torch.full((90,), 9.0)])
    assert outliers(planted, 4.5).nonzero()[:, 0].tolist() == list(range(900, 990))
    assert not outliers(bulk, 4.5).any()
    assert torch.equal(outliers(planted * 1e-6 + 3, 4.5), outliers(planted, 4.5))


@pytest.mark.parametrize("values", [[], [1.0], [2.0] * 50, [0.0] * 99 + [1.0]])
def test_no_outliers_where_there_is_no_scale(values):
    assert not outliers(torch.tensor(values), 4.5).any()


def near(similarity, rows=None):
    similarity = torch.tensor(similarity)
    return (torch.arange(len(similarity)) - 1 if rows is None else torch.tensor(rows)), similarity


@pytest.mark.parametrize(
    ("usual", "cosine", "expected"),
    [(0.5, 0.975, True), (0.5, 0.965, False), (0.95, 0.975, False), (0.95, 0.9905, True), (1.0, 0.9995, True)],
)
def test_near_duplicates_are_closer_than_usual(usual, cosine, expected):
    similarity = [-1.0, *([usual] * 20), cosine]
    found = findings(torch.ones(22), torch.ones(22), near(similarity), near([usual] * 21 + [cosine]))
    assert (found.duplicate_of[21] == 20) == expected
    assert (found.leaks[21] == 20) == expected
    assert found.duplicate_of[0] == -1
    if usual < 1:
        assert found.wrong.sum() == expected


def test_harm_counts_only_where_it_is_harm():
    harm = torch.randn(200, generator=torch.Generator().manual_seed(0))
    harm[7] = 50.0
    loss, similar = torch.ones(200), near([-1.0] + [0.5] * 199)
    assert findings(loss, loss, similar, harm=harm).harmful.nonzero().tolist() == [[7]]
    assert not findings(loss, loss, similar, harm=harm - 100).harmful.any()
    assert not findings(loss, loss, similar).harmful.any()


def test_order_is_by_what_is_wrong_and_then_by_loss():
    loss = torch.rand(50, generator=torch.Generator().manual_seed(0))
    loss[3], loss[40] = 100.0, 0.0
    similarity = [-1.0] + [0.5] * 49
    similarity[40] = 1.0
    found = findings(loss, loss, near(similarity))
    rest = [row for row in loss.argsort(descending=True).tolist() if row not in (3, 40)]
    assert found.order().tolist() == [3, 40, *rest]
