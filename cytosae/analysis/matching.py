"""Latents of two autoencoders matched one to one by a similarity, such as the cosine of their decoder rows."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components, min_weight_full_bipartite_matching

_ROWS_AT_ONCE = 1024
"""Decoder rows whose cosines with all others are computed together: 192 MiB of float32 for 49,152 latents."""
_PAIRS_AT_ONCE = 1 << 14
"""Candidates whose cosines are computed again together in float64."""
_ROUNDING = 1e-4
"""How far a float32 cosine may be from the float64 one by which it is decided."""
_MOST_DENSE = 1 << 24
"""Entries of a component's matrix up to which it is solved as a dense one (128 MiB); a larger one stays sparse."""
MOST_PAIRS = 50_000_000
"""Pairs above the threshold that are kept in memory: 1.2 GB."""


class TooManyPairsError(ValueError):
    """More pairs are above the threshold than are kept in memory."""

    def __init__(self) -> None:
        self.n_most = MOST_PAIRS
        """Pairs that are kept at most."""
        super().__init__(f"more than {self.n_most:,} pairs of latents are above the threshold")


class Pairs(NamedTuple):
    """Pairs of latents that are similar enough to be partners."""

    first: npt.NDArray[np.int64]
    """Latents of the first autoencoder, shape `(n,)`."""
    second: npt.NDArray[np.int64]
    """Latents of the second, shape `(n,)`."""
    similarity: npt.NDArray[np.float64]
    """Their similarity, above 0, shape `(n,)`."""


class PairCollector:
    """Collects pairs a part at a time.

    Raises:
        TooManyPairsError: In `add`, if there are more than `MOST_PAIRS`.
    """

    def __init__(self) -> None:
        self._parts: list[Pairs] = []
        self._n = 0

    def add(self, first: npt.NDArray[np.integer], second: npt.NDArray[np.integer], similarity: torch.Tensor) -> None:
        """Add pairs, each at most once in all; arrays of shape `(n,)`."""
        self._n += len(first)
        if self._n > MOST_PAIRS:
            raise TooManyPairsError
        self._parts.append(Pairs(first.astype(np.int64), second.astype(np.int64), similarity.double().cpu().numpy()))

    def result(self) -> Pairs:
        """All pairs."""
        if not self._parts:
            return Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))
        return Pairs(*(np.concatenate(parts) for parts in zip(*self._parts, strict=True)))


def match(pairs: Pairs, n_first: int, n_second: int) -> npt.NDArray[np.int64]:
    """The partner of each latent of the first autoencoder in the one-to-one matching of the largest total similarity.

    Only the given pairs may become partners, so this is the assignment of the Hungarian method on the dense matrix in
    which all other entries are 0. Latents that no chain of pairs connects cannot compete for a partner: each connected
    component of the graph of pairs is solved by itself, which is exact and takes memory for the pairs alone.

    Args:
        pairs: The pairs, each once, with similarities above 0.
        n_first: Latents of the first autoencoder.
        n_second: Latents of the second.

    Returns:
        The partner, int64, shape `(n_first,)`; -1 for none. Of several matchings with the same total, one.
    """
    partner = np.full(n_first, -1, dtype=np.int64)
    if not len(pairs.first):
        return partner
    component = _components(pairs, n_first, n_second)
    is_alone = np.bincount(component)[component] == 1
    partner[pairs.first[is_alone]] = pairs.second[is_alone]
    for first, second, similarity in _matrices(pairs, component, np.flatnonzero(~is_alone)):
        rows, columns = _solve(similarity)
        partner[first[rows]] = second[columns]
    return partner


def similarity_of(pairs: Pairs, partner: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Similarity of each latent of the first autoencoder and its partner, float64, shape `(n_first,)`; 0 for none."""
    found = np.zeros(len(partner))
    chosen = partner[pairs.first] == pairs.second
    found[pairs.first[chosen]] = pairs.similarity[chosen]
    return found


def pairs_by_cosine(first: torch.Tensor, second: torch.Tensor, above: float) -> Pairs:
    """Pairs of rows whose cosine is above a threshold; memory does not grow with the product of the numbers of rows.

    Args:
        first: Decoder rows, shape `(m, D)`.
        second: Decoder rows, shape `(n, D)`, on the same device.
        above: The threshold, at least 0. Float64 cosines decide; those in float32 only find candidates.
    """
    one, other = (_unit_rows(rows.detach()) for rows in (first, second))
    found = PairCollector()
    for start in range(0, len(one), _ROWS_AT_ONCE):
        block = one[start : start + _ROWS_AT_ONCE]
        rows, columns = torch.nonzero(block @ other.T > above - _ROUNDING, as_tuple=True)
        rows += start
        for at in range(0, len(rows), _PAIRS_AT_ONCE):
            part = slice(at, at + _PAIRS_AT_ONCE)
            exact = cosines_of(first, second, rows[part], columns[part])
            kept = (exact > above).cpu().numpy()
            found.add(rows[part].cpu().numpy()[kept], columns[part].cpu().numpy()[kept], exact.cpu()[kept])
    return found.result()


def cosines_of(first: torch.Tensor, second: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Cosine of some pairs of rows in float64 (on Apple's GPUs on the CPU), shape `(n,)`; 0 where a row is 0.

    Args:
        first: Shape `(m, D)`.
        second: Shape `(n, D)`.
        rows: Rows of `first`, int64, shape `(n,)`.
        columns: Rows of `second`, int64, shape `(n,)`.
    """
    one, other = first.detach()[rows], second.detach()[columns]
    if one.device.type == "mps":
        one, other = one.cpu(), other.cpu()
    one, other = one.double(), other.double()
    norms = one.norm(dim=1) * other.norm(dim=1)
    return torch.where(norms > 0, (one * other).sum(dim=1) / norms.clamp(min=1e-300), 0.0)


def _unit_rows(rows: torch.Tensor) -> torch.Tensor:
    """Rows of norm 1 in float32; rows of norm 0 stay 0."""
    return torch.nn.functional.normalize(rows.float(), dim=1)


def _components(pairs: Pairs, n_first: int, n_second: int) -> npt.NDArray[np.int32]:
    """The connected component of each pair, shape `(n,)`."""
    n = n_first + n_second
    graph = csr_array((np.ones(len(pairs.first), np.int8), (pairs.first, n_first + pairs.second)), shape=(n, n))
    found: npt.NDArray[np.int32] = connected_components(graph, directed=False)[1]
    return found[pairs.first]


def _matrices(
    pairs: Pairs, component: npt.NDArray[np.int32], which: npt.NDArray[np.int64]
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], csr_array]]:
    """Latents of the first, latents of the second and the matrix of similarities of each connected component.

    Args:
        pairs: The pairs.
        component: Component of each, shape `(n,)`.
        which: Pairs whose components are wanted.
    """
    order = which[np.argsort(component[which], kind="stable")]
    ends = np.flatnonzero(np.diff(component[order])) + 1
    for here in np.split(order, ends) if len(order) else ():
        first, rows = np.unique(pairs.first[here], return_inverse=True)
        second, columns = np.unique(pairs.second[here], return_inverse=True)
        yield first, second, csr_array((pairs.similarity[here], (rows, columns)), shape=(len(first), len(second)))


def _solve(similarity: csr_array) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.integer]]:
    """Matched rows and columns of one component."""
    n_rows, n_columns = similarity.shape
    if n_rows * n_columns <= _MOST_DENSE:
        dense = similarity.toarray()
        rows, columns = linear_sum_assignment(dense, maximize=True)
        is_pair = dense[rows, columns] > 0
    else:
        rows, columns = _solve_sparse(similarity)
        is_pair = columns < n_columns
    return rows[is_pair], columns[is_pair]


def _solve_sparse(similarity: csr_array) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.integer]]:
    """The same without a dense matrix: a column of its own stands for `no partner` of each row."""
    n_rows, n_columns = similarity.shape
    entries = similarity.tocoo()
    # Costs must differ from 0. All rows are matched, so a constant more on every entry changes no choice.
    top = 1.0 + float(entries.data.max())
    own = np.arange(n_rows)
    costs = np.concatenate([top - entries.data, np.full(n_rows, top)])
    places = np.concatenate([entries.row, own]), np.concatenate([entries.col, n_columns + own])
    rows, columns = min_weight_full_bipartite_matching(csr_array((costs, places), shape=(n_rows, n_columns + n_rows)))
    return rows, columns
