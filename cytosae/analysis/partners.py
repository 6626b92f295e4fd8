"""The most similar latent in another autoencoder."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

BLOCK = 1024
"""Latents compared at once, on both sides: memory does not grow with the square of their number."""


class Partners(NamedTuple):
    """The nearest latent of another autoencoder; both arrays have shape `(S,)`."""

    latent: npt.NDArray[np.int64]
    """Its number, the smaller of equals; -1 where a decoder row is zero."""
    cosine: npt.NDArray[np.float32]
    """Cosine of the two decoder rows; 0 without a partner."""


def nearest_partners(decoder: torch.Tensor, other: torch.Tensor) -> Partners:
    """For each latent the one of another autoencoder whose decoder row has the largest cosine, computed in blocks.

    Args:
        decoder: Decoder rows, shape `(S, D)`.
        other: Those of the other autoencoder, shape `(S', D)`.

    Raises:
        ValueError: If the widths differ.
    """
    if decoder.shape[1] != other.shape[1]:
        raise ValueError(f"decoder rows have {decoder.shape[1]} and {other.shape[1]} numbers, expected equal numbers")
    found, values = [], []
    for rows in torch.split(decoder.detach().float(), BLOCK):
        mine = torch.nn.functional.normalize(rows, dim=1)
        best = torch.full((len(rows),), -2.0, device=rows.device)
        at = torch.full((len(rows),), -1, dtype=torch.int64, device=rows.device)
        for number, theirs in enumerate(torch.split(other.detach().to(rows.device).float(), BLOCK)):
            cosine = mine @ torch.nn.functional.normalize(theirs, dim=1).T
            cosine[:, ~theirs.any(dim=1)] = -2
            largest = cosine.amax(dim=1)
            # argmax may return any of equals.
            first = (cosine == largest[:, None]).to(torch.uint8).argmax(dim=1) + number * BLOCK
            better = largest > best
            best, at = torch.where(better, largest, best), torch.where(better, first, at)
        nothing = ~rows.any(dim=1) | (best == -2)
        found.append(torch.where(nothing, -1, at))
        values.append(torch.where(nothing, 0.0, best.clamp(-1, 1)))
    return Partners(torch.cat(found).cpu().numpy(), torch.cat(values).cpu().numpy())
