"""How similar the images are that activate a latent: the score of Pach et al. 2025 in closed form."""

from typing import NamedTuple

import torch


class Monosemanticity(NamedTuple):
    """Scores of docs/definitions.md, section 12."""

    scores: torch.Tensor
    """Mean cosine of two different images, weighted by both activations, float64, shape `(S,)`; NaN for latents that
    are above their smallest score on fewer than two images."""
    any_pair: float
    """Mean cosine of any two different images: what a latent without any meaning has; NaN for fewer than two."""


class MonosemanticityStatistics:
    """Accumulates what `Monosemanticity` needs: S x D numbers in float64, whatever the number of images.

    With weights `w_i = a_i - min a` of images with embeddings `u_i` of norm 1, the sum over pairs
    `sum_{i != j} w_i w_j u_i.u_j` is `||sum_i w_i u_i||^2 - sum_i w_i^2`, and without cosines `(sum w)^2 - sum w^2`.

    Args:
        n_latents: Latents S.
        width: Width D of the embeddings.
        device: Device of the sums, which has float64.
    """

    def __init__(self, n_latents: int, width: int, *, device: torch.device | str = "cpu") -> None:
        self._weighted = torch.zeros(n_latents, width, dtype=torch.float64, device=device)
        self._vectors = torch.zeros(width, dtype=torch.float64, device=device)
        self._sums, self._squares = torch.zeros(2, n_latents, dtype=torch.float64, device=device)
        self._least = torch.full((n_latents,), torch.inf, dtype=torch.float64, device=device)
        self._n_least = torch.zeros(n_latents, dtype=torch.int64, device=device)
        self.n_images = 0
        """Images so far."""

    def update(self, embeddings: torch.Tensor, scores: torch.Tensor) -> None:
        """Add images.

        Args:
            embeddings: Shape `(n, D)`; scaled to norm 1 here.
            scores: Activations of the latents, shape `(n, S)`.
        """
        if not len(scores):
            return
        units = torch.nn.functional.normalize(embeddings.to(self._weighted), dim=1)
        wide = scores.to(self._weighted)
        self._weighted.addmm_(wide.T, units)
        self._vectors += units.sum(dim=0)
        self._sums += wide.sum(dim=0)
        self._squares += wide.square().sum(dim=0)
        self._lower(wide.amin(dim=0), wide)
        self.n_images += len(scores)

    def merge(self, other: "MonosemanticityStatistics") -> None:
        """Add what another one has accumulated on other images."""
        for name in ("_weighted", "_vectors", "_sums", "_squares"):
            getattr(self, name).add_(getattr(other, name).to(self._weighted.device))
        theirs, n_theirs = other._least.to(self._least.device), other._n_least.to(self._least.device)
        least = torch.minimum(self._least, theirs)
        self._n_least = self._n_least * (self._least == least) + n_theirs * (theirs == least)
        self._least = least
        self.n_images += other.n_images

    def result(self) -> Monosemanticity:
        """The scores, on the CPU."""
        n, least = self.n_images, torch.where(self._least.isfinite(), self._least, 0.0)
        sums = self._sums - n * least
        squares = self._squares - 2 * least * self._sums + n * least.square()
        vectors = self._weighted - least[:, None] * self._vectors
        pairs = sums.square() - squares
        scores = (vectors.square().sum(dim=1) - squares) / pairs
        n_above = n - self._n_least
        any_pair = (float(self._vectors.square().sum()) - n) / (n * (n - 1)) if n > 1 else float("nan")
        return Monosemanticity(torch.where(n_above > 1, scores, torch.nan).cpu(), any_pair)

    def _lower(self, least: torch.Tensor, scores: torch.Tensor) -> None:
        """Take a smaller smallest score, and count the images that have it."""
        least = torch.minimum(self._least, least)
        self._n_least = self._n_least * (self._least == least) + (scores == least).sum(dim=0)
        self._least = least


def monosemanticity_by_pairs(embeddings: torch.Tensor, scores: torch.Tensor) -> Monosemanticity:
    """The same with a loop over all pairs: the definition, for tests and for a few images.

    Args:
        embeddings: Shape `(n, D)`.
        scores: Shape `(n, S)`.
    """
    units = torch.nn.functional.normalize(embeddings.double(), dim=1)
    weights = scores.double() - scores.double().amin(dim=0)
    top, bottom, total = torch.zeros_like(weights[0]), torch.zeros_like(weights[0]), 0.0
    n = len(units)
    for i in range(n):
        for j in range(n):
            if i != j:
                cosine = float(units[i] @ units[j])
                top += weights[i] * weights[j] * cosine
                bottom += weights[i] * weights[j]
                total += cosine
    return Monosemanticity(top / bottom, total / (n * (n - 1)) if n > 1 else float("nan"))
