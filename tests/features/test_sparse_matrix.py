"""Products of sparse matrices, against dense ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_trak.features.sparse_matrix import SparseMatrix

P = 40
GENERATOR = torch.Generator().manual_seed(0)


def matrix(rows, entries, columns=P):
    """Rows with entries in different columns each."""
    chosen = [torch.randperm(columns, generator=GENERATOR)[:entries] for _ in range(rows)]
    return SparseMatrix(torch.stack(chosen), torch.randn(rows, entries, generator=GENERATOR))


def dense(one, columns=P):
    return torch.zeros(len(one), columns, dtype=torch.float64).scatter_(1, one.columns, one.values.double())


@pytest.mark.parametrize("first", [0, 2**27])  # so many columns are not looked up in a table
def test_products_are_those_of_dense_rows(first):
    one, other = matrix(11, 5), matrix(7, 9)
    found = SparseMatrix(one.columns + first, one.values) @ SparseMatrix(other.columns + first, other.values).T
    np.testing.assert_allclose(found, dense(one) @ dense(other).T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("first", [0, 2**27])
def test_linear_combinations_are_those_of_dense_rows(first):
    one, other, weights = matrix(11, 5), matrix(7, 9), torch.randn(3, 7, generator=GENERATOR)
    sample = SparseMatrix(other.columns + first, other.values)
    found = SparseMatrix(one.columns + first, one.values) @ sample.combined(weights)
    np.testing.assert_allclose(found, dense(one) @ (weights.double() @ dense(other)).T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("first", [0, 2**27])
@pytest.mark.parametrize("rows", [0, 1, 64, 150])  # of some, several tables are made
def test_the_inner_products_of_rows_with_each_other(rows, first):
    one = matrix(rows, 7) if rows else SparseMatrix(torch.zeros(0, 7).long(), torch.zeros(0, 7))
    found = SparseMatrix(one.columns + first, one.values).gram()
    np.testing.assert_allclose(found, dense(one) @ dense(one).T, rtol=1e-5, atol=1e-5)


def test_rows_whose_columns_have_no_room_in_one_table():
    p = 2**15
    one, other, weights = matrix(150, 2**14, p), matrix(7, 2**14, p), torch.randn(3, 150, generator=GENERATOR)
    assert [len(columns) <= p for columns, _ in one.T.tables()] == [True] * 3
    rows, others = dense(one, p), dense(other, p)
    np.testing.assert_allclose(one.gram(), rows @ rows.T, rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(other @ one.T, others @ rows.T, rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(other @ one.combined(weights), others @ (weights.double() @ rows).T, rtol=1e-4, atol=0.1)


def test_rows_without_a_common_column():
    one = SparseMatrix(torch.tensor([[0, 5], [10**9, 7]]), torch.ones(2, 2))
    other = SparseMatrix(torch.tensor([[1, 2]]), torch.ones(1, 2))
    assert not (one @ other.T).any()
    assert not (one @ other.combined(torch.ones(3, 1))).any()


def test_matrices_without_rows():
    empty, one = SparseMatrix(torch.zeros(0, 4).long(), torch.zeros(0, 4)), matrix(3, 4)
    assert (one @ empty.combined(torch.zeros(2, 0))).tolist() == [[0, 0]] * 3
    assert (empty @ one.T).shape == (0, 3)


def test_many_rows_come_in_several_tables():
    entries = 2**20
    columns = torch.stack([torch.arange(entries) + 2 * row for row in range(9)])
    matrix = SparseMatrix(columns, torch.ones(9, entries))
    assert [len(columns) for columns, _ in matrix.T.tables()] == [entries + 14, entries]
    one = SparseMatrix(torch.tensor([[0, 3, entries + 1, 10**9]]), torch.tensor([[1.0, 2.0, 4.0, 8.0]]))
    assert (one @ matrix.T).tolist() == [[3.0, 6.0, *[4.0] * 7]]


def test_many_combinations_come_in_several_tables():
    entries, weights = 2**23, torch.arange(10.0)[:, None]
    matrix = SparseMatrix(torch.arange(entries)[None], torch.ones(1, entries))
    ((_, tables),) = matrix.combined(weights).tables()
    assert [table.shape[1] for table in tables] == [7, 3]
    one = SparseMatrix(torch.tensor([[0, entries]]), torch.ones(1, 2))
    assert (one @ matrix.combined(weights)).tolist() == [list(range(10))]
