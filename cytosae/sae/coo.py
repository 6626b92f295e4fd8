"""Sparse matrices in coordinate format and their products, for latent activations of which few are active.

The cost of a product is proportional to the number of non-zero entries, and sums have a fixed order, so that results
repeat to the last bit. In dense terms: `matmul(W)` is `A @ W`, `sampled_matmul(g, W)` is `g @ W.T` at A's entries, and
`transpose().matmul(g)` is `A.T @ g`.
"""

import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F


class CooMatrix(NamedTuple):
    """The non-zero entries of a matrix A, shape `(N, S)`, row by row."""

    rows: torch.Tensor
    """Row of each entry, int64, ascending, shape `(n,)`."""
    columns: torch.Tensor
    """Column of each entry, int64, ascending within a row, shape `(n,)`."""
    values: torch.Tensor
    """Value of each entry, shape `(n,)`."""
    shape: tuple[int, int]
    """N and S."""

    @classmethod
    def from_dense(cls, matrix: torch.Tensor) -> "CooMatrix":
        """The non-zero entries of a dense matrix, shape `(N, S)`."""
        rows, columns = matrix.nonzero(as_tuple=True)
        return cls(rows, columns, matrix[rows, columns], (matrix.shape[0], matrix.shape[1]))

    def with_values(self, values: torch.Tensor) -> "CooMatrix":
        """The same entries with other values, shape `(n,)`."""
        return self._replace(values=values)

    def matmul(self, weights: torch.Tensor) -> torch.Tensor:
        """`A @ weights`, shape `(N, D)`, for weights of shape `(S, D)`."""
        return _sum_rows(weights, self.columns, self.values, _offsets(self.rows, self.shape[0]))

    def sampled_matmul(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """`left @ right.T` at the entries alone, shape `(n,)`: `left[row] . right[column]` for each.

        Args:
            left: Shape `(N, D)`.
            right: Shape `(S, D)`, of the same type.
        """
        if not len(self.rows):  # cuSPARSE takes no matrix without entries
            return left.new_zeros(0)
        ends = torch.cat([_offsets(self.rows, self.shape[0]), self.rows.new_tensor([len(self.rows)])])
        with warnings.catch_warnings():  # torch warns once per process that sparse CSR is in beta
            warnings.filterwarnings("ignore", "Sparse CSR tensor support", UserWarning)
            pattern = torch.sparse_csr_tensor(
                ends,
                self.columns,
                left.new_zeros(len(self.rows)),
                self.shape,
                device=left.device,
                check_invariants=False,
            )
        products: torch.Tensor = torch.sparse.sampled_addmm(pattern, left, right.t(), beta=0.0).values()
        return products

    def sort(self) -> "CooMatrix":
        """The same matrix from entries in any order."""
        order = (self.rows * self.shape[1] + self.columns).argsort()
        return CooMatrix(self.rows[order], self.columns[order], self.values[order], self.shape)

    def drop_zeros(self) -> "CooMatrix":
        """The same matrix without entries of value 0."""
        at = self.values.nonzero().squeeze(1)
        return CooMatrix(self.rows[at], self.columns[at], self.values[at], self.shape)

    def row_range(self, start: int, end: int) -> "CooMatrix":
        """The matrix of the rows from `start` to `end`."""
        first, last = torch.searchsorted(self.rows, self.rows.new_tensor([start, end])).tolist()
        rows, columns, values = self.rows[first:last] - start, self.columns[first:last], self.values[first:last]
        return CooMatrix(rows, columns, values, (end - start, self.shape[1]))

    def column_range(self, start: int, end: int) -> "CooMatrix":
        """The matrix of the columns from `start` to `end`."""
        inside = ((self.columns >= start) & (self.columns < end)).nonzero().squeeze(1)
        shape = self.shape[0], end - start
        return CooMatrix(self.rows[inside], self.columns[inside] - start, self.values[inside], shape)

    def row_sums(self) -> torch.Tensor:
        """Sum of every row, in float64, shape `(N,)`."""
        values = self.values.double()
        if values.device.type == "cpu":
            sums = torch.bincount(self.rows, values, minlength=self.shape[0])
            return sums.double()  # bincount returns integers if there are no entries
        return _sum_segments(values, torch.bincount(self.rows, minlength=self.shape[0]))

    def transpose(self) -> "CooMatrix":
        """The transposed matrix, shape `(S, N)`."""
        order = self.columns.argsort(stable=True)
        return CooMatrix(self.columns[order], self.rows[order], self.values[order], (self.shape[1], self.shape[0]))


def _offsets(rows: torch.Tensor, n_rows: int) -> torch.Tensor:
    """Index of each row's first entry, int64, shape `(n_rows,)`."""
    counts = torch.bincount(rows, minlength=n_rows)
    return counts.cumsum(0) - counts


def _sum_segments(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Sums of consecutive runs of values, in a fixed order on a GPU, too, where `bincount` adds in any order.

    Args:
        values: Shape `(n,)`.
        lengths: Length of each run, int64; they sum to n.
    """
    return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True, initial=0)


def _sum_rows(table: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Weighted sums of rows of a table, one sum per run of indices."""
    return F.embedding_bag(indices, table, offsets, mode="sum", per_sample_weights=weights.to(table.dtype))
