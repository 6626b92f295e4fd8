"""A permutation of any size that is computed where it is asked for: no memory, any slice alone, the same everywhere."""

import numpy as np
import numpy.typing as npt

_ROUNDS = 8
"""Even, so that both halves have their widths again. Part of the order: another number gives other orders."""

_PIECE = 1 << 16
"""Positions that are computed together, so that what is computed stays in the processor's cache."""


class KeyedOrder:
    """A pseudo-random bijection of `range(n)`: a Feistel network on the bits of a position, with cycle walking.

    The network permutes the numbers of as many bits as `n - 1` has. A number that is not below `n` is put through it
    again until one is: on average less than twice, and two positions never arrive at the same number. All is
    arithmetic on unsigned integers, so the order depends on no version of a library.

    Args:
        n: Numbers to permute; at least 1 and below 2^62.
        words: What determines the order, such as seed and epoch; 0 or more.
    """

    def __init__(self, n: int, *words: int) -> None:
        self._n = n
        n_bits = max(2, (n - 1).bit_length())
        self._widths = n_bits // 2, n_bits - n_bits // 2
        self._keys = np.random.Philox(np.random.SeedSequence(words)).random_raw(_ROUNDS)

    def __call__(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """The numbers at positions `start` to `stop`, int64, shape `(stop - start,)`."""
        order = np.empty(stop - start, dtype=np.int64)
        for at in range(start, stop, _PIECE):
            end = min(at + _PIECE, stop)
            order[at - start : end - start] = self._walk(np.arange(at, end, dtype=np.uint64))
        return order

    def _walk(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """Numbers below `n`, each the first one that its walk meets."""
        values = self._permute(values)
        left = np.flatnonzero(values >= self._n)
        while len(left):
            values[left] = self._permute(values[left])
            left = left[values[left] >= self._n]
        return values

    def _permute(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """One pass through the network, on numbers of all its bits."""
        high, low = (np.uint64(width) for width in self._widths)
        left, right = values >> low, values & _ones(low)
        for key in self._keys:
            # `left` has as many bits as `high`; the halves change places, and so do their widths.
            left, right = right, left ^ (_mix(right ^ key) & _ones(high))
            high, low = low, high
        return (left << low) | right


def _ones(width: np.uint64) -> np.uint64:
    """A number of so many set bits."""
    return (np.uint64(1) << width) - np.uint64(1)


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Mix all bits of each number into all others: the last steps of SplitMix64 (Steele, Lea and Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
