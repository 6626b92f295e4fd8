"""How badly an autoencoder reconstructs one image."""

import torch

from cytosae.sae.devices import widest_type


def unexplained_share(x: torch.Tensor, reconstruction: torch.Tensor, mean: torch.Tensor) -> float:
    """Share of an image's deviation from the mean token that its reconstruction does not explain.

    The mean is that of the reference, not the image's own: an image without contrast has no variance of its own.

    Args:
        x: Tokens of one image, shape `(t, D)`.
        reconstruction: Their reconstructions, shape `(t, D)`.
        mean: Mean token of the reference images, shape `(D,)`.

    Returns:
        `sum ||x - x^||^2 / sum ||x - mean||^2`, sums in float64 where the device has it; at least 0, and infinity if
        only the denominator is 0.
    """
    wide = widest_type(x.device)
    x, reconstruction = x.to(wide), reconstruction.to(wide)
    error = float((x - reconstruction).square().sum())
    deviation = float((x - mean.to(wide)).square().sum())
    return error / deviation if deviation else float("inf") if error else 0.0
