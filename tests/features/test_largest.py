"""The largest entries, and the sparse matrices of them, against dense arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_trak.features.largest import SparseRows, difference, entry_bytes, largest_entries, matrix_of


def dense(kept, p):
    """A slow loop."""
    result = np.zeros((len(kept["scale"]), p))
    for row, scale in enumerate(kept["scale"]):
        for index, value in zip(kept["indices"][row], kept["values"][row], strict=True):
            result[row, index] = float(value) * float(scale)
    return result


def test_the_largest_entries_are_kept():
    features = torch.randn(9, 50, generator=torch.Generator().manual_seed(0))
    kept = dense(largest_entries(features, 8), 50)
    for row, values in zip(kept, features.numpy(), strict=True):
        largest = np.argsort(-np.abs(values))[:8]
        assert {*np.flatnonzero(row)} == {*largest}
        np.testing.assert_allclose(row[largest], values[largest], rtol=1e-3)


@pytest.mark.parametrize("p", [1, 31, 32, 1000, 1001, 5003])
def test_long_rows(p):
    """Also with many equal entries."""
    features = torch.randn(3, p, generator=torch.Generator().manual_seed(0))
    features[1] = 1.0
    features[2, p // 2 :] = 0.0
    k = min(p, 3)
    for row, indices in zip(features.abs().numpy(), largest_entries(features, k)["indices"], strict=True):
        assert len({*indices.tolist()}) == k
        np.testing.assert_array_equal(np.sort(row[indices]), np.sort(row)[-k:])


def test_squares_are_of_all_entries():
    features = torch.randn(4, 30)
    np.testing.assert_allclose(largest_entries(features, 3)["squares"], features.double().square().sum(1), rtol=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1.0, 1e12, 1e18])
def test_float16_is_relative_to_the_largest(size):
    features = torch.tensor([[3.0, -2.0, 1.0, 0.0]]) * size
    np.testing.assert_allclose(dense(largest_entries(features, 3), 4), features.double(), rtol=1e-3)


def test_the_largest_entries_of_a_long_row_may_be_anywhere():
    """Rows are searched in 16 k chunks, and what is left after them."""
    row = torch.zeros(2 * 16 * 40 * 3 + 37)
    places = torch.randperm(len(row), generator=torch.Generator().manual_seed(0))[:30]
    places = torch.cat([places, torch.arange(len(row) - 10, len(row))]).unique()
    row[places] = torch.linspace(1, 2, len(places))
    record = largest_entries(row[None], 40)
    assert set(places.tolist()) <= set(record["indices"][0].tolist())
    np.testing.assert_allclose(dense(record, len(row))[0], row, rtol=1e-3)


def test_an_example_without_entries():
    record = largest_entries(torch.zeros(2, 5), 2)
    assert not dense(record, 5).any()
    assert np.isfinite(record["values"]).all()
    assert difference(record, record) == 0


def test_as_many_as_there_are():
    features = torch.randn(3, 4)
    np.testing.assert_allclose(dense(largest_entries(features, 4), 4), features, rtol=1e-3)


@pytest.mark.parametrize("block", [1, 4, 100])
def test_products_of_sparse_rows_are_those_of_dense_ones(block):
    features = torch.randn(11, 40, generator=torch.Generator().manual_seed(1))
    targets = torch.randn(5, 40, generator=torch.Generator().manual_seed(2))
    stored, others = largest_entries(features, 5), largest_entries(targets, 9)

    def read(rows):
        return {name: array[rows.start : rows.stop] for name, array in stored.items()}

    rows, matrix = SparseRows(read, (11, 40)), matrix_of(others)
    assert (rows.shape, matrix.shape, len(matrix)) == ((11, 40), (5, 9), 5)
    found = torch.cat([rows[start : start + block] @ (matrix * 0.5).T for start in range(0, 11, block)])
    expected = dense(stored, 40) @ dense(others, 40).T / 2
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    assert (expected == 0).any()  # of rows without a common entry


def test_difference_is_that_of_dense_arrays():
    one, other = (largest_entries(torch.randn(5, 20), 4) for _ in range(2))
    mine, others = dense(one, 20), dense(other, 20)
    expected = np.linalg.norm(mine - others) / np.linalg.norm(others)
    np.testing.assert_allclose(difference(one, other), expected, rtol=1e-6)
    assert difference(one, one) == 0
    assert difference(one, largest_entries(torch.zeros(5, 20), 4)) == 1


def test_many_parameters_have_longer_indices():
    assert entry_bytes(2, 2**31 - 1) == 2 * (4 + 2) + 8
    assert entry_bytes(2, 2**31) == 2 * (8 + 2) + 8
    features = torch.zeros(1, 1).expand(1, 4)
    kept = largest_entries(features, 2)
    assert entry_bytes(2, 4) == sum(array.nbytes for array in kept.values())
