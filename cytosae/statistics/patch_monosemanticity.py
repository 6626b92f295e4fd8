"""How similar the patches are that activate a latent: the score of images, for patches of different images."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from cytosae.statistics.monosemanticity import Monosemanticity


class PatchMonosemanticityStatistics:
    """Accumulates the score of patches: S x D numbers in float64, whatever the number of images.

    With `v_i = sum_p a_p u_p` over the patches p of image i, `a_p` the activation on a patch and `u_p` its token scaled
    to norm 1, and `w_i = sum_p a_p`, the mean cosine of two patches of different images, weighted by both activations,
    is `(||sum_i v_i||^2 - sum_i ||v_i||^2) / ((sum_i w_i)^2 - sum_i w_i^2)`. Two patches of one image are no pair:
    neighbours are alike whatever a latent says.

    Args:
        n_latents: Latents S.
        width: Width D of the tokens.
        device: Device of the sums, which has float64.
    """

    def __init__(self, n_latents: int, width: int, *, device: torch.device | str = "cpu") -> None:
        options: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self._vectors, self._all = torch.zeros(n_latents, width, **options), torch.zeros(width, **options)
        self._own, self._sums, self._squares = torch.zeros(3, n_latents, **options)
        self._n_active = torch.zeros(n_latents, dtype=torch.int64, device=device)
        self._all_own, self._n_squared = 0.0, 0
        self.n_patches = 0
        """Patches so far."""

    def update(self, patches: torch.Tensor, acts: torch.Tensor) -> None:
        """Add the patches of one image.

        Args:
            patches: Their tokens, shape `(n, D)`; scaled to norm 1 here.
            acts: Activations of the latents on them, at least 0, shape `(n, S)`.
        """
        n = len(patches)
        if not n:
            return
        units = torch.nn.functional.normalize(patches.to(self._vectors), dim=1)
        wide = acts.to(self._vectors)
        vectors, weights, total = wide.T @ units, wide.sum(dim=0), units.sum(dim=0)
        self._vectors += vectors
        self._own += vectors.square().sum(dim=1)
        self._sums += weights
        self._squares += weights.square()
        self._n_active += weights > 0
        self._all += total
        self._all_own += float(total.square().sum())
        self._n_squared += n * n
        self.n_patches += n

    def merge(self, other: "PatchMonosemanticityStatistics") -> None:
        """Add what another one has accumulated on other images."""
        for name in ("_vectors", "_all", "_own", "_sums", "_squares", "_n_active"):
            getattr(self, name).add_(getattr(other, name).to(self._vectors.device))
        self._all_own += other._all_own
        self._n_squared += other._n_squared
        self.n_patches += other.n_patches

    def result(self) -> Monosemanticity:
        """The scores, on the CPU; NaN for latents that are active on such patches of fewer than two images."""
        pairs = self._sums.square() - self._squares
        scores = (self._vectors.square().sum(dim=1) - self._own) / pairs
        n_pairs = self.n_patches**2 - self._n_squared
        any_pair = (float(self._all.square().sum()) - self._all_own) / n_pairs if n_pairs else float("nan")
        return Monosemanticity(torch.where(self._n_active > 1, scores, torch.nan).cpu(), any_pair)


def patch_monosemanticity_by_pairs(images: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Monosemanticity:
    """The same pair by pair: the definition, for tests and for a few images.

    Args:
        images: Tokens of the patches, shape `(n, D)`, and activations, shape `(n, S)`, of each image.
    """
    n_latents = images[0][1].shape[1]
    top, bottom, total, n = torch.zeros(n_latents).double(), torch.zeros(n_latents).double(), 0.0, 0
    for (first, acts), (second, others) in itertools.permutations(images, 2):
        for x, a in zip(first.double(), acts.double(), strict=True):
            for y, b in zip(second.double(), others.double(), strict=True):
                cosine = float(torch.nn.functional.cosine_similarity(x, y, dim=0))
                top += a * b * cosine
                bottom += a * b
                total, n = total + cosine, n + 1
    return Monosemanticity(top / bottom, total / n if n else float("nan"))
