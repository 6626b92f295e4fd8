"""How well an autoencoder reconstructs activations, over any number of batches and by group."""

from typing import NamedTuple, Self

import torch

from cytosae.sae.devices import widest_type
from cytosae.sae.world import World


class Fidelity(NamedTuple):
    """How well an autoencoder reconstructs some tokens (docs/definitions.md, section 9)."""

    explained_variance: float
    """`1 - sum ||x - x^||^2 / sum ||x - mean||^2`, with the mean over these tokens; 0 without tokens."""
    l0: float
    """Mean number of active latents per token."""
    dead_share: float
    """Share of latents that are active on none of these tokens."""
    cosine: float
    """Mean cosine similarity between tokens and their reconstructions."""
    n_tokens: int
    """Tokens."""


class FidelityStatistics:
    """Accumulates what `Fidelity` needs, in float64 where the device has it.

    Args:
        d_in: Width D.
        n_latents: Latents S.
        n_groups: Groups of tokens that are measured apart.
        device: Device of the sums.
    """

    def __init__(
        self, d_in: int, n_latents: int, n_groups: int = 0, *, device: torch.device | str | None = None
    ) -> None:
        self._wide = widest_type(device)
        # The last row is of tokens without a group.
        self._error, self._squares, self._cosine, self._n_active = (
            torch.zeros(n_groups + 1, dtype=self._wide, device=device) for _ in range(4)
        )
        self._total = torch.zeros(n_groups + 1, d_in, dtype=self._wide, device=device)
        self._fired = torch.zeros(n_groups + 1, n_latents, dtype=torch.bool, device=device)
        self._n_tokens = torch.zeros(n_groups + 1, dtype=torch.int64, device=device)

    @property
    def n_groups(self) -> int:
        """Groups of tokens that are measured apart."""
        return len(self._n_tokens) - 1

    @torch.no_grad()
    def update(
        self, x: torch.Tensor, n_fired: torch.Tensor, reconstruction: torch.Tensor, group: int | None = None
    ) -> None:
        """Count tokens of one group.

        Args:
            x: Tokens, shape `(n, D)`.
            n_fired: Tokens on which each latent is active, int64, shape `(S,)`.
            reconstruction: Their reconstructions, shape `(n, D)`.
            group: Their group; None for none.
        """
        row = self.n_groups if group is None else group
        self._fired[row] |= n_fired > 0
        self._n_active[row] += n_fired.sum().to(self._wide)
        self._error[row] += (x - reconstruction).to(self._wide).square().sum()
        self._squares[row] += x.to(self._wide).square().sum()
        self._total[row] += x.sum(dim=0, dtype=self._wide)
        self._cosine[row] += torch.nn.functional.cosine_similarity(x, reconstruction, dim=1).sum(dtype=self._wide)
        self._n_tokens[row] += len(x)

    def merge(self, other: Self) -> None:
        """Add what another one has counted."""
        self._fired |= other._fired
        for name in ("_n_active", "_error", "_squares", "_total", "_cosine", "_n_tokens"):
            getattr(self, name).add_(getattr(other, name))

    def gather(self, ranks: World) -> None:
        """Add what all ranks have counted, in place."""
        self._fired = ranks.sum(self._fired.to(torch.int32)) > 0
        for name in ("_n_active", "_error", "_squares", "_total", "_cosine", "_n_tokens"):
            setattr(self, name, ranks.sum(getattr(self, name)))

    def overall(self) -> Fidelity:
        """Of all tokens."""
        return self._result(slice(None))

    def of_group(self, group: int) -> Fidelity:
        """Of one group's tokens, with their own mean."""
        return self._result(slice(group, group + 1))

    def _result(self, rows: slice) -> Fidelity:
        n = int(self._n_tokens[rows].sum())
        if not n:
            return Fidelity(0.0, 0.0, 1.0, 0.0, 0)
        error, squares = self._error[rows].sum(), self._squares[rows].sum()
        variance = squares - self._total[rows].sum(dim=0).square().sum() / n
        return Fidelity(
            explained_variance=float(1 - error / variance.clamp_min(torch.finfo(self._wide).tiny)),
            l0=float(self._n_active[rows].sum()) / n,
            dead_share=float((~self._fired[rows].any(dim=0)).double().mean()),
            cosine=float(self._cosine[rows].sum()) / n,
            n_tokens=n,
        )
