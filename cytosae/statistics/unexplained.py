"""How badly an autoencoder reconstructs one image."""

import torch

from cytosae.sae.devices import widest_type


def unexplained_variance(x: torch.Tensor, reconstruction: torch.Tensor, variance: float) -> float:
    """Squared error of an image's tokens, in units of the variance of the reference's tokens.

    The unit is the reference's and not the image's own variance: an image without contrast has none, and a foreign one
    would hide its errors behind its distance from everything known. Over all reference images, the mean is 1 minus
    their explained variance (docs/definitions.md, section 9).

    Args:
        x: Tokens of one image, shape `(t, D)`.
        reconstruction: Their reconstructions, shape `(t, D)`.
        variance: Mean of `||x - mean||^2` over the tokens of the reference, above 0.

    Returns:
        `mean ||x - x^||^2 / variance`, sums in float64 where the device has it; at least 0.
    """
    wide = widest_type(x.device)
    return float((x.to(wide) - reconstruction.to(wide)).square().sum()) / len(x) / variance
