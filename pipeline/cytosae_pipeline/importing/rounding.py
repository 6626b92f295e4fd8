"""Embeddings in the type of a store: what it cannot hold, and what it holds with few digits."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from cytosae_cache.store import ActivationStore
from cytosae_pipeline.errors import UserError, quote, say_count

_SMALLEST = 2.0**-14
"""Smallest number that float16 holds with all its digits."""


class Rounding:
    """Converts rows to the type of a store, and counts what is lost.

    Args:
        store: The store.
        source: Where the rows come from, for messages.
    """

    def __init__(self, store: ActivationStore, source: Path) -> None:
        self._store, self._source = store, source
        self._n_values = self._n_vanished = self._n_small_rows = 0

    def convert(self, rows: npt.NDArray[np.float32], first: int) -> npt.NDArray[np.generic]:
        """Rows in the type of the store.

        Args:
            rows: Rows, float32, shape `(n, T, D)`.
            first: Number of the first of them in the store.

        Returns:
            The same shape in the store's `dtype`; NaN for rows with NaN or infinity.

        Raises:
            UserError: If a finite row has numbers beyond the type's range.
        """
        is_finite = find_finite(rows)
        with np.errstate(over="ignore"):  # reported below
            converted = rows.astype(self._store.dtype)
        beyond = np.flatnonzero(is_finite & ~find_finite(converted))
        if len(beyond):
            row, largest = first + int(beyond[0]), np.abs(rows[beyond[0]]).max()
            raise UserError(
                f"row {quote(self._store.images.path[row])} of '{self._source}' contains {largest:.4g}, beyond the "
                f"range of {self._store.dtype} (65504). Use --store_dtype float32, or scale the embeddings"
            )
        if self._store.dtype == np.float16:
            kept = np.abs(rows[is_finite])
            self._n_values += kept.size
            self._n_vanished += int(((kept != 0) & (converted[is_finite] == 0)).sum())
            largest = kept.max(axis=(1, 2), initial=0)
            self._n_small_rows += int(((largest > 0) & (largest < _SMALLEST)).sum())
        converted[~is_finite] = np.nan
        return converted

    def describe(self) -> str:
        """What was lost, as a message; '' if nothing was."""
        lost = []
        if self._n_vanished:
            n = f"of {self._n_values:,} values"
            small = say_count(self._n_vanished, f"{n} is so small that it", f"{n} are so small that they")
            lost.append(f"{small} became 0")
        if self._n_small_rows:
            rows = say_count(self._n_small_rows, "row is", "rows are")
            lost.append(f"{rows} below {_SMALLEST:.1g} throughout, where few digits are left")
        return f"in float16 {', and '.join(lost)}. To keep them, use --store_dtype float32" if lost else ""


def find_finite(rows: npt.NDArray[np.floating]) -> npt.NDArray[np.bool_]:
    """Which rows of shape `(n, T, D)` contain neither NaN nor infinity, shape `(n,)`."""
    is_finite: npt.NDArray[np.bool_] = np.isfinite(rows).all(axis=(1, 2))
    return is_finite
