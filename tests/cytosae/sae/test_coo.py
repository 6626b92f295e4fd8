"""Products of sparse matrices against dense ones."""

import itertools

import pytest
import torch

from cytosae.sae import coo
from cytosae.sae.coo import CooMatrix
from cytosae.sae.devices import runs_ahead, widest_type

N, S, D = 7, 11, 5


def make_matrix(density: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(N, S, generator=generator, dtype=torch.float64)
    return matrix * (torch.rand(N, S, generator=generator) < density)


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
def test_products_are_those_of_the_dense_matrix(density):
    matrix = make_matrix(density)
    left, right = torch.randn(N, D, dtype=torch.float64), torch.randn(S, D, dtype=torch.float64)
    entries = CooMatrix.from_dense(matrix)
    torch.testing.assert_close(entries.matmul(right), matrix @ right)
    torch.testing.assert_close(entries.sampled_matmul(left, right), (left @ right.T)[matrix != 0])
    transposed = entries.transpose()
    assert transposed.shape == (S, N)
    torch.testing.assert_close(transposed.matmul(left), matrix.T @ left)
    torch.testing.assert_close(transposed.values, matrix.T[matrix.T != 0])
    torch.testing.assert_close(entries.row_sums(), matrix.sum(dim=1))


@pytest.mark.parametrize("density", [0.0, 0.5])
@pytest.mark.parametrize("bounds", [[0, N], [0, 3, N], [2, 5], [0, 0, 4, 4, N, N], [3], [0, *range(1, N), N]])
def test_matrices_are_split_by_rows_and_columns(bounds, density):
    matrix = make_matrix(density)
    rows, columns = CooMatrix.from_dense(matrix), CooMatrix.from_dense(matrix.T)
    parts = [matrix[start:end] for start, end in itertools.pairwise(bounds)]
    cases = list(zip(rows.split_rows(bounds), parts, strict=True))
    if bounds[0] == 0:
        cases += zip(columns.split_columns(bounds), [part.T for part in parts], strict=True)
    for found, wanted in cases:
        assert found.shape == wanted.shape
        again = torch.zeros_like(wanted)
        again[found.rows, found.columns] = found.values
        assert torch.equal(again, wanted)
        assert torch.equal(found.row_lengths(), (wanted != 0).sum(dim=1))


@pytest.mark.parametrize(
    "shape", [(7, 11), (3, 1 << 15), (3, (1 << 15) + 1), (1 << 16, (1 << 15) + 1), (1 << 20, 1 << 33)]
)
def test_entries_are_sorted_and_transposed_whatever_the_size_of_the_matrix(shape):
    rows = torch.tensor([0, 0, 1, 1, shape[0] - 1, shape[0] - 1])
    columns = torch.tensor([0, shape[1] - 1, 1, shape[1] - 2, 0, shape[1] - 1])
    wanted = CooMatrix(rows, columns, torch.arange(6.0), shape)
    found = wanted.take(torch.tensor([3, 5, 0, 4, 2, 1])).sort()
    assert all(torch.equal(one, other) for one, other in zip(found[:3], wanted[:3], strict=True))
    across = wanted.transpose()
    assert across.values.tolist() == [0, 4, 2, 3, 1, 5]
    assert torch.equal(across.rows, columns[[0, 4, 2, 3, 1, 5]])


def test_zeros_can_be_dropped():
    matrix = make_matrix(0.5)
    entries = CooMatrix.from_dense(matrix)
    fewer = entries.with_values(torch.where(entries.values > 0, entries.values, 0.0)).drop_zeros()
    assert torch.equal(fewer.rows, torch.relu(matrix).nonzero(as_tuple=True)[0])
    assert (fewer.values > 0).all()


def test_results_repeat_to_the_last_bit():
    matrix, right = torch.randn(64, 300).relu_(), torch.randn(300, 40)
    first, again = (CooMatrix.from_dense(matrix).matmul(right) for _ in range(2))
    assert torch.equal(first, again)


def test_values_can_be_replaced():
    entries = CooMatrix.from_dense(make_matrix(0.5))
    doubled = entries.with_values(entries.values * 2)
    right = torch.randn(S, D, dtype=torch.float64)
    torch.testing.assert_close(doubled.matmul(right), 2 * entries.matmul(right))


def test_sums_are_in_float32_where_a_device_has_no_float64(monkeypatch):
    entries = CooMatrix.from_dense(make_matrix(0.5).float())
    wide = entries.row_sums()
    assert wide.dtype == torch.float64
    monkeypatch.setattr(coo, "widest_type", lambda device: torch.float32)
    assert torch.equal(entries.row_sums(), wide.float())


def test_what_devices_have():
    assert widest_type(None) == widest_type("cpu") == widest_type(torch.device("cuda", 1)) == torch.float64
    assert widest_type("mps") == widest_type(torch.device("mps")) == torch.float32
    assert not runs_ahead(torch.device("cpu"))
    assert runs_ahead(torch.device("cuda"))
    assert runs_ahead(torch.device("mps"))


@pytest.mark.parametrize("density", [0.0, 0.3])
def test_sums_of_segments_are_those_of_bincount(density):
    entries = CooMatrix.from_dense(make_matrix(density))
    assert torch.equal(coo._sum_segments(entries.values, entries.bounds()), entries.row_sums())


def test_bounds_that_are_kept_are_those_of_the_same_entries():
    entries = CooMatrix.from_dense(make_matrix(0.3))
    kept = entries.with_bounds()
    assert kept.known_bounds is not None
    assert torch.equal(kept.known_bounds, entries.bounds())
    assert kept.with_values(2 * kept.values).known_bounds is kept.known_bounds
    for other in (kept.take(torch.tensor([0, 1])), kept.drop_zeros(), kept.transpose(), kept.split_rows([0, 2, N])[0]):
        assert other.known_bounds is None
    assert torch.equal(kept.take(torch.tensor([0])).bounds().diff().sum(), torch.tensor(1))
