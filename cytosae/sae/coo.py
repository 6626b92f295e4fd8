"""MatmulConfig with matrices that are mostly zeros, for latent activations of which few are active.

Each costs in proportion to the entries that are not zero, and sums in a fixed order, so that results repeat to the
last bit. Plain meanings: `decode(W)` is `A @ W`, `dots(g, W)` the entries of `g @ W.T` at A's places, and
`by_column().decode(g)` is `A.T @ g`.
"""

import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

_ROWS_AT_ONCE = 2048
"""Rows whose products are small beside a weight matrix."""


class CooMatrix(NamedTuple):
    """The entries of a matrix A, shape `(N, S)`, that are not zero, row by row."""

    rows: torch.Tensor
    """Row of each, int64, rising, shape `(n,)`."""
    columns: torch.Tensor
    """Column of each, int64, rising within a row, shape `(n,)`."""
    values: torch.Tensor
    """Value of each, shape `(n,)`."""
    shape: tuple[int, int]
    """N and S."""

    @classmethod
    def of(cls, matrix: torch.Tensor) -> "CooMatrix":
        """The entries of a dense matrix, shape `(N, S)`."""
        rows, columns = matrix.nonzero(as_tuple=True)
        return cls(rows, columns, matrix[rows, columns], (matrix.shape[0], matrix.shape[1]))

    def with_values(self, values: torch.Tensor) -> "CooMatrix":
        """Other values at the same places, shape `(n,)`."""
        return self._replace(values=values)

    def decode(self, weights: torch.Tensor) -> torch.Tensor:
        """`A @ weights`, shape `(N, D)`, of weights of shape `(S, D)`."""
        return _sum_rows(weights, self.columns, self.values, _offsets(self.rows, self.shape[0]))

    def dots(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """`left[row] . right[column]` for every entry, shape `(n,)`.

        Args:
            left: Shape `(N, D)`.
            right: Shape `(S, D)`, of the same type.
        """
        ends = torch.cat([_offsets(self.rows, self.shape[0]), self.rows.new_tensor([len(self.rows)])])
        with warnings.catch_warnings():  # torch says once a program that its sparse tensors are young
            warnings.filterwarnings("ignore", "Sparse CSR tensor support", UserWarning)
            places = torch.sparse_csr_tensor(
                ends, self.columns, left.new_zeros(len(self.rows)), self.shape, check_invariants=False
            )
        products: torch.Tensor = torch.sparse.sampled_addmm(places, left, right.t(), beta=0.0).values()
        return products

    def iter_rows(self, n_rows: int = _ROWS_AT_ONCE) -> Iterator[tuple[slice, "CooMatrix"]]:
        """The matrix in blocks of rows, with where each lies."""
        for start in range(0, self.shape[0], n_rows):
            end = min(start + n_rows, self.shape[0])
            first, last = torch.searchsorted(self.rows, self.rows.new_tensor([start, end])).tolist()
            rows, columns, values = self.rows[first:last] - start, self.columns[first:last], self.values[first:last]
            yield slice(start, end), CooMatrix(rows, columns, values, (end - start, self.shape[1]))

    def transposed_product(self, weights: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
        """`(A @ weights).T`, shape `(D, N)`.

        In blocks: the product comes out turned, and a whole one would stand beside the result.

        Args:
            weights: Shape `(S, D)`.
            onto: What it is added to, in place; shape `(D, N)`, of the same type.
        """
        out = weights.new_empty(weights.shape[1], self.shape[0]) if onto is None else onto
        for rows, block in self.iter_rows():
            product = block.decode(weights).t()
            if onto is None:
                out[:, rows] = product
            else:
                out[:, rows] += product
        return out

    def row_sums(self) -> torch.Tensor:
        """Sum of every row, in float64, shape `(N,)`."""
        sums = torch.bincount(self.rows, self.values.double(), minlength=self.shape[0])
        return sums.double()  # whole numbers where there are no entries

    def by_column(self) -> "CooMatrix":
        """The entries of the transposed matrix."""
        order = self.columns.argsort(stable=True)
        return CooMatrix(self.columns[order], self.rows[order], self.values[order], (self.shape[1], self.shape[0]))


def _offsets(rows: torch.Tensor, n_rows: int) -> torch.Tensor:
    """Where each row's entries begin, int64, shape `(n_rows,)`."""
    counts = torch.bincount(rows, minlength=n_rows)
    return counts.cumsum(0) - counts


def _sum_rows(table: torch.Tensor, numbers: torch.Tensor, weights: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Weighted sums of a table's rows, one for every stretch of numbers."""
    return F.embedding_bag(numbers, table, offsets, mode="sum", per_sample_weights=weights.to(table.dtype))
