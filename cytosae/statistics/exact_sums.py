"""Sums that are the same to the last bit for any order of the summands."""

from typing import Any

import torch

_COARSE_BITS, _FINE_BITS = 12, 48
_LIMIT = 2.0 ** (63 - _COARSE_BITS)
_ROWS_AT_ONCE = 4096


class Portable:
    """State that is copied and sent to other processes on the CPU: they may have no GPU, or another one."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in vars(self).items()}


class ExactSums(Portable):
    """Float32 numbers of at least 0, summed in two words of int64: multiples of 2^-12, and of 2^-60 below them.

    Each number is rounded once, to a multiple of 2^-60. What follows is exact.

    Args:
        *shape: Shape of the sums, `(S,)` or `(G, S)`.
        device: Device of the state.
    """

    def __init__(self, *shape: int, device: torch.device | str = "cpu") -> None:
        self._coarse = torch.zeros(shape, dtype=torch.int64, device=device)
        self._fine = torch.zeros(shape, dtype=torch.int64, device=device)
        self._largest = torch.zeros((), device=device)
        self._n = 0

    def add(self, values: torch.Tensor) -> None:
        """Add numbers, float32, shape `(n, S)`; the sums have shape `(S,)`."""
        for part in torch.split(values, _ROWS_AT_ONCE):
            coarse, fine = self._to_words(part)
            self._coarse += coarse.sum(dim=0)
            self._fine += fine.sum(dim=0)
            self._carry()

    def add_to(self, groups: torch.Tensor, values: torch.Tensor, latents: slice = slice(None)) -> None:
        """Add numbers to the sums of groups, which have shape `(G, S)`.

        Args:
            groups: Group of each row, int64, shape `(n,)`.
            values: Float32, shape `(n, m)`.
            latents: Which m of the S columns these are.
        """
        for at, part in zip(torch.split(groups, _ROWS_AT_ONCE), torch.split(values, _ROWS_AT_ONCE), strict=True):
            coarse, fine = self._to_words(part)
            self._coarse[:, latents].index_add_(0, at, coarse)
            self._fine[:, latents].index_add_(0, at, fine)
            self._carry(latents)

    def merge(self, other: "ExactSums") -> None:
        """Add other sums."""
        device = self._coarse.device
        self._coarse += other._coarse.to(device)
        self._fine += other._fine.to(device)
        self._largest = torch.maximum(self._largest, other._largest.to(device))
        self._n += other._n
        self._carry()

    def result(self) -> torch.Tensor:
        """The sums, float64, on the device.

        Raises:
            ValueError: If a number was not finite, or numbers were so large that sums may have overflowed.
        """
        largest = self._largest.item()
        if not largest * self._n < _LIMIT:
            raise ValueError(f"numbers up to {largest:.3g} are too large to sum {self._n:,} of them exactly")
        return self._coarse.double() * 2.0**-_COARSE_BITS + self._fine.double() * 2.0 ** -(_COARSE_BITS + _FINE_BITS)

    def _to_words(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both words of each number; they hold nonsense where it is too large, which `result` refuses."""
        self._n += len(values)
        if values.numel():
            self._largest = torch.maximum(self._largest, values.amax().float())
        scaled = values.double().mul_(2.0**_COARSE_BITS)
        coarse = scaled.floor()
        return coarse.to(torch.int64), scaled.sub_(coarse).mul_(2.0**_FINE_BITS).round_().to(torch.int64)

    def _carry(self, latents: slice = slice(None)) -> None:
        """Move whole multiples of 2^-12 from the fine word, so that equal sums have equal words."""
        coarse, fine = self._coarse[..., latents], self._fine[..., latents]
        coarse += fine >> _FINE_BITS
        fine &= (1 << _FINE_BITS) - 1
