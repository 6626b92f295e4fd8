"""How much latents depend on position: whether their maps on different images are the same."""

import torch

from cytosae.statistics.exact_sums import Portable

_UNIT = 2.0**-20
"""Standardised values are rounded to multiples of it. Sums of whole numbers are exact in float64 for any order."""

MIN_IMAGES = 10
"""Fewest images with a varying map from which a position share is computed."""


class PositionMaps(Portable):
    """Accumulates the standardised maps of latents, and gives the position share of docs/definitions.md, section 10.

    Args:
        n_latents: Latents S.
        n_patches: Patches P of an image.
        device: Device of the state.
    """

    def __init__(self, n_latents: int, n_patches: int, *, device: torch.device | str = "cpu") -> None:
        self._sums = torch.zeros(n_patches, n_latents, dtype=torch.float64, device=device)
        self._n_images = torch.zeros(n_latents, dtype=torch.int64, device=device)

    def add(self, acts: torch.Tensor, latents: slice) -> None:
        """Add images.

        Args:
            acts: Activations of some of the latents on the patches, float32, shape `(n, P, m)`, all at least 0.
            latents: Which m of the S latents these are.

        Raises:
            ValueError: If the shapes do not fit.
        """
        sums, n_images = self._sums[:, latents], self._n_images[latents]
        if acts.ndim != 3 or acts.shape[1:] != sums.shape:
            raise ValueError(f"acts must be (n, {len(sums)}, {sums.shape[1]}), found {tuple(acts.shape)}")
        if not acts.shape[1]:
            return
        # One image at a time, in the same two buffers: they stay in the processor's cache.
        centred, squares = torch.empty(2, *sums.shape, device=sums.device, dtype=torch.float32)
        for image in acts.to(sums.device):
            mean = image.mean(dim=0)
            torch.sub(image, mean, out=centred)
            spread = torch.mul(centred, centred, out=squares).mean(dim=0).sqrt_()
            # A map that is the same everywhere has no position; rounding alone gives it a tiny spread.
            varies = spread > 1e-6 * mean
            sums += centred.mul_(torch.where(varies, spread.reciprocal(), 0).div_(_UNIT)).round_()
            n_images += varies

    def merge(self, other: "PositionMaps") -> None:
        """Add another accumulator's state for other images."""
        self._sums += other._sums.to(self._sums.device)
        self._n_images += other._n_images.to(self._n_images.device)

    def result(self) -> torch.Tensor:
        """Mean correlation of a latent's maps on two different images, float32, shape `(S,)`, at most 1, on the CPU.

        -1 where fewer than `MIN_IMAGES` images have a map that varies.
        """
        n, sums = self._n_images.cpu().double(), self._sums.cpu()
        if not len(sums):
            return torch.full((len(n),), -1.0)
        # The sum over all pairs of images, each with itself included, is the squared length of the sum of the maps.
        pairs = (sums * _UNIT).square().mean(dim=0)
        share = (pairs - n) / (n * (n - 1)).clamp(min=1)
        return torch.where(n >= MIN_IMAGES, share.clamp(-0.99, 1.0), -1.0).float()
