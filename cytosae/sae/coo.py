"""Sparse matrices in coordinate format and their products, for latent activations of which few are active.

The cost of a product is proportional to the number of non-zero entries, and sums have a fixed order, so that results
repeat to the last bit. In dense terms: `matmul(W)` is `A @ W`, `sampled_matmul(g, W)` is `g @ W.T` at A's entries, and
`transpose().matmul(g)` is `A.T @ g`.
"""

import itertools
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from cytosae.sae.devices import widest_type
from cytosae.sae.kernels import find_kernels


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
    known_bounds: torch.Tensor | None = None
    """What `bounds` returns, if `with_bounds` computed it before."""

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
        bounds = self.bounds()
        kernels = find_kernels(weights, self.values)
        if kernels is not None:
            sums: torch.Tensor = kernels.sum_rows(self.rows, self.columns, self.values, bounds, weights)
            return sums
        return F.embedding_bag(
            self.columns, weights, bounds, mode="sum", per_sample_weights=self.values.to(weights.dtype),
            include_last_offset=True,
        )  # fmt: skip

    def sampled_matmul(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """`left @ right.T` at the entries alone, shape `(n,)`: `left[row] . right[column]` for each.

        Args:
            left: Shape `(N, D)`.
            right: Shape `(S, D)`, of the same type.
        """
        if not len(self.rows):  # cuSPARSE takes no matrix without entries
            return left.new_zeros(0)
        products: torch.Tensor
        kernels = find_kernels(left, right)
        if kernels is not None:
            products = kernels.multiply_sampled(self.rows, self.columns, left, right)
            return products
        with warnings.catch_warnings():  # torch warns once per process that CSR is in beta, and that it checks nothing
            warnings.filterwarnings("ignore", "Sparse (CSR tensor support|invariant checks)", UserWarning)
            pattern = torch.sparse_csr_tensor(
                self.bounds(),
                self.columns,
                left.new_zeros(len(self.rows)),
                self.shape,
                device=left.device,
                check_invariants=False,
            )
        products = torch.sparse.sampled_addmm(pattern, left, right.t(), beta=0.0).values()
        return products

    def sort(self) -> "CooMatrix":
        """The same matrix from entries in any order."""
        n_places = self.shape[0] * self.shape[1]
        return self.take(_sort_order(self.rows * self.shape[1] + self.columns, n_places))

    def take(self, at: torch.Tensor) -> "CooMatrix":
        """Some of the entries, in the order of their indices, int64."""
        return CooMatrix(self.rows[at], self.columns[at], self.values[at], self.shape)

    def drop_zeros(self) -> "CooMatrix":
        """The same matrix without entries of value 0."""
        # CPU-GPU sync point: their number decides a shape.
        return self.take(self.values.nonzero().squeeze(1))

    def split_rows(self, bounds: Sequence[int]) -> "list[CooMatrix]":
        """The matrices of the rows between consecutive bounds, which ascend."""
        if list(bounds) == [0, self.shape[0]]:
            return [self]
        # CPU-GPU sync point, one for all parts: the numbers of entries decide shapes.
        ends = torch.searchsorted(self.rows.contiguous(), self.rows.new_tensor(bounds)).tolist()
        return [
            CooMatrix(self.rows[at] - start, self.columns[at], self.values[at], (end - start, self.shape[1]))
            for (start, end), at in zip(itertools.pairwise(bounds), _slices(ends), strict=True)
        ]

    def split_columns(self, bounds: Sequence[int]) -> "list[CooMatrix]":
        """The matrices of the columns between consecutive bounds, which ascend from 0 to S."""
        if len(bounds) == 2:
            return [self]
        part = torch.bucketize(self.columns.contiguous(), self.columns.new_tensor(bounds[1:-1]), right=True)
        part, order = part.sort(stable=True)
        # CPU-GPU sync point, one for all parts: the numbers of entries decide shapes.
        ends = torch.searchsorted(part, torch.arange(len(bounds), device=part.device)).tolist()
        return [
            CooMatrix(self.rows[at], self.columns[at] - start, self.values[at], (self.shape[0], end - start))
            for (start, end), at in zip(itertools.pairwise(bounds), (order[one] for one in _slices(ends)), strict=True)
        ]

    def row_lengths(self) -> torch.Tensor:
        """Number of entries of every row, int64, shape `(N,)`."""
        return self.bounds().diff()

    def row_sums(self) -> torch.Tensor:
        """Sum of every row, in float64 where the device has it, shape `(N,)`."""
        if self.values.device.type == "cuda":
            return _sum_segments(self.values.double(), self.bounds())
        sums = torch.bincount(self.rows.cpu(), self.values.cpu().double(), minlength=self.shape[0])
        # bincount returns integers if there are no entries.
        return sums.to(widest_type(self.values.device)).to(self.values.device)

    def transpose(self) -> "CooMatrix":
        """The transposed matrix, shape `(S, N)`."""
        order = _sort_order(self.columns, self.shape[1])
        return CooMatrix(self.columns[order], self.rows[order], self.values[order], (self.shape[1], self.shape[0]))

    def with_bounds(self) -> "CooMatrix":
        """A copy that keeps its bounds, for callers that need them several times; `with_values` keeps them, too."""
        return self._replace(known_bounds=self.bounds())

    def bounds(self) -> torch.Tensor:
        """Index of each row's first entry, and the number of entries, int64, shape `(N + 1,)`.

        They are searched for, not counted: `bincount` makes a GPU wait.
        """
        if self.known_bounds is not None:
            return self.known_bounds
        return torch.searchsorted(self.rows.contiguous(), torch.arange(self.shape[0] + 1, device=self.rows.device))


def _sort_order(keys: torch.Tensor, n: int) -> torch.Tensor:
    """The stable order of keys from 0 to n - 1; in a type of few bytes, each of which costs a pass."""
    narrow = next((kind for kind in (torch.int16, torch.int32) if n - 1 <= torch.iinfo(kind).max), torch.int64)
    return keys.to(narrow).argsort(stable=True)


def _slices(ends: Sequence[int]) -> Iterator[slice]:
    """Slices between consecutive numbers."""
    return itertools.starmap(slice, itertools.pairwise(ends))


def _sum_segments(values: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """Sums of consecutive runs of values, in a fixed order on a GPU, too, where `bincount` adds in any order.

    Args:
        values: Shape `(n,)`.
        bounds: First index of each run, and n, int64.
    """
    return torch.segment_reduce(values, "sum", offsets=bounds, unsafe=True, initial=0)
