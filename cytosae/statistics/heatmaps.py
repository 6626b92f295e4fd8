"""Heat maps: where on an image latents are active, from stored activations alone."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cytosae.sae.base import Sae
from cytosae.statistics.ties import topk_with_ties

BYTE_LEVELS = 255
"""Levels of a map stored in bytes: 255 is its largest value."""


class LatentEncoder:
    """Activations of chosen latents, without computing the others if the architecture allows it.

    Args:
        sae: The autoencoder; its decoder is not used.
        latents: The chosen latents, int64, shape `(M,)`.

    Raises:
        ValueError: If a latent is out of range.
    """

    def __init__(self, sae: Sae, latents: npt.NDArray[np.int64]) -> None:
        n_latents = sae.W_enc.shape[1]
        if len(latents) and not 0 <= latents.min() <= latents.max() < n_latents:
            raise ValueError(f"latents must lie in 0..{n_latents - 1}, found {latents.min()}..{latents.max()}")
        self._sae = sae
        self._latents = torch.from_numpy(np.ascontiguousarray(latents)).to(sae.W_enc.device)
        if not sae.needs_whole_rows:
            self._weights = sae.W_enc.detach()[:, self._latents]
            self._bias = sae.b_enc.detach()[self._latents]

    @torch.no_grad()
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Latent activations, float32, shape `(..., M)`, from activations of shape `(..., D)`."""
        x = x.to(device=self._latents.device, dtype=torch.float32)
        if self._sae.needs_whole_rows:
            return self._sae.encode(x)[..., self._latents]
        pre = (x - self._sae.b_dec) @ self._weights + self._bias
        return self._sae.activate(pre, self._latents)


class ByteMaps(NamedTuple):
    """Maps of M latents over an image's patches, one byte per patch."""

    levels: npt.NDArray[np.uint8]
    """Shape `(M, n_patches)`: activation as a share of the map's peak, in steps of 1/255, rounded up above 0."""
    peaks: npt.NDArray[np.float32]
    """Largest activation of each map, shape `(M,)`; 0 if the latent is active on no patch."""


class ImageSummary(NamedTuple):
    """The strongest latents of an image and of its tokens."""

    latents: npt.NDArray[np.int64]
    """Active latents with the image's largest scores (docs/definitions.md, section 6), descending, shape `(M,)`."""
    scores: npt.NDArray[np.float32]
    """Their scores, shape `(M,)`."""
    token_latents: npt.NDArray[np.int64]
    """Latents with the largest activations on each token, descending, shape `(T, P)`; -1 if fewer are active."""
    token_values: npt.NDArray[np.float32]
    """Their activations, shape `(T, P)`; 0 if fewer are active."""


def make_byte_maps(acts: torch.Tensor) -> ByteMaps:
    """Maps of latents over an image's patches, from their activations of shape `(n_patches, M)`."""
    if not len(acts):
        return ByteMaps(np.zeros((acts.shape[1], 0), np.uint8), np.zeros(acts.shape[1], np.float32))
    peaks = acts.amax(dim=0)
    share = acts / peaks.clamp_min(torch.finfo(torch.float32).tiny)
    # Rounded up, so that every active patch is visible.
    levels = (share * BYTE_LEVELS).ceil_().clamp_(0, BYTE_LEVELS).to(torch.uint8)
    return ByteMaps(levels.T.contiguous().cpu().numpy(), peaks.float().cpu().numpy())


def summarize_image(acts: torch.Tensor, *, n_latents: int, n_per_token: int) -> ImageSummary:
    """The strongest latents of an image and of each of its tokens; ties go to the smaller latent.

    Args:
        acts: Activations of all latents on one image, float32, shape `(T, S)`.
        n_latents: Largest number of latents for the image.
        n_per_token: Largest number of latents for each token.
    """
    width = acts.shape[1]
    scores, latents = topk_with_ties(acts.mean(dim=0)[None], min(n_latents, width))
    values, token_latents = topk_with_ties(acts, min(n_per_token, width))
    active = scores[0] > 0
    return ImageSummary(
        latents=latents[0][active].cpu().numpy(),
        scores=scores[0][active].cpu().numpy(),
        token_latents=torch.where(values > 0, token_latents, -1).cpu().numpy(),
        token_values=values.cpu().numpy(),
    )
