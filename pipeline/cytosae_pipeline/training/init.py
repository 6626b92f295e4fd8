"""Data-dependent initialisation: a sample of tokens, the scale of the activations, the decoder's bias."""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from cytosae.sae.base import Sae
from cytosae.training.geometric_median import geometric_median
from cytosae_cache.format.spec import TokenLayout
from cytosae_cache.reading.concat import ConcatReader
from cytosae_cache.reading.permutation import spread_rows
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.config import TrainConfig

_MEDIAN_IMAGES = 256
_MEDIAN_TOKENS = 16_384
_FITTED_TOKENS = 1024
_CALIBRATED_TOKENS = 8192
_FEWEST_UNSEEN = 32
"""Images that were not trained on, from which they serve for calibration: fewer differ too much from others."""


class Scaling(NamedTuple):
    """Standardisation of activations: training sees `(x - mean) / scale`."""

    mean: torch.Tensor
    """Mean of every channel, float32, shape `(D,)`."""
    scale: float
    """Root of the mean of the channels' variances."""
    stds: torch.Tensor
    """Standard deviation of every channel, float32, shape `(D,)`."""

    def to(self, device: torch.device) -> "Scaling":
        """The same on a device."""
        return Scaling(self.mean.to(device), self.scale, self.stds.to(device))

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Activations of shape `(..., D)`, centred and scaled."""
        return (x - self.mean.to(x.device)) / self.scale


def find_scaling(stores: Sequence[ActivationStore]) -> Scaling:
    """The scaling of all stores together, from their exact moments over all tokens.

    Afterwards the mean squared norm of a token is D, as in Anthropic's and SAELens' scaling.
    """
    parts = [store.moments for store in stores]
    count = sum(float(part.count.sum()) for part in parts)
    mean = sum(part.sum.sum(axis=0) for part in parts) / count
    squares = sum(part.sum_sq.sum(axis=0) for part in parts) / count
    variances = np.maximum(squares - mean**2, 0)
    mean, stds = (torch.from_numpy(np.asarray(values, dtype=np.float32)) for values in (mean, np.sqrt(variances)))
    return Scaling(mean, float(variances.mean()) ** 0.5 or 1.0, stds)


def choose_tokens(x: torch.Tensor, choice: str, layout: TokenLayout) -> torch.Tensor:
    """The tokens to train on, `all`, `patches` or `cls`, of activations of shape `(B, T, D)`."""
    if choice == "cls":
        return x[:, : layout.n_cls]
    return x[:, layout.n_cls + layout.n_registers :] if choice == "patches" else x


def sample_tokens(
    images: ConcatReader,
    layout: TokenLayout,
    *,
    choice: str = "all",
    n_images: int = _MEDIAN_IMAGES,
    n_tokens: int = _MEDIAN_TOKENS,
) -> torch.Tensor:
    """Token vectors from a sample of images spread over all stores.

    Args:
        images: The images.
        layout: Kinds of their tokens.
        choice: Which tokens.
        n_images: Images to read at most.
        n_tokens: Tokens to return at most.

    Returns:
        Float32, shape `(n, D)`.
    """
    chosen = spread_rows(len(images), n_images)
    values = np.empty((len(chosen), *images.image_shape), dtype=images.dtype)
    images.read(chosen, values)
    tokens = choose_tokens(torch.from_numpy(values), choice, layout).flatten(0, 1)
    return tokens[torch.from_numpy(spread_rows(len(tokens), n_tokens))].float()


class DataInit:
    """Initial values that depend on the data, computed once for all autoencoders trained on the same images.

    Args:
        images: Training images.
        stores: The stores that contain them.
        choice: Which tokens.
        unseen: Images that are not trained on; None if there are none.
    """

    def __init__(
        self,
        images: ConcatReader,
        stores: Sequence[ActivationStore],
        *,
        choice: str,
        unseen: ConcatReader | None = None,
    ) -> None:
        self._images, self._stores, self._choice = images, stores, choice
        self._unseen = unseen if unseen is not None and len(unseen) >= _FEWEST_UNSEEN else None
        self._centres: dict[tuple[str, bool], torch.Tensor] = {}

    @cached_property
    def scaling(self) -> Scaling:
        """The stores' scaling."""
        return find_scaling(self._stores)

    @cached_property
    def _tokens(self) -> torch.Tensor:
        return sample_tokens(self._images, self._stores[0].spec.tokens, choice=self._choice)

    @torch.no_grad()
    def initialise_(self, sae: Sae, config: TrainConfig) -> None:
        """Initialise the decoder's bias, the encoder and what else the architecture fits to the data, in place.

        Args:
            sae: A new autoencoder.
            config: Options.
        """
        if config.encoder_init == "decoder":
            sae.tie_()
        if config.b_dec_init_method != "zeros":
            sae.b_dec.copy_(self._centre(config.b_dec_init_method, standardise=config.standardise))
        if sae.fits_to_tokens:
            tokens = self._tokens[torch.from_numpy(spread_rows(len(self._tokens), _FITTED_TOKENS))]
            tokens = self.scaling.apply(tokens) if config.standardise else tokens
            sae.fit_to_tokens_(tokens.to(sae.b_dec.device))

    @cached_property
    def _calibration_tokens(self) -> torch.Tensor:
        """Tokens of images that were not trained on, on which another number of latents is active, if there are any."""
        if self._unseen is None:
            return self._tokens[torch.from_numpy(spread_rows(len(self._tokens), _CALIBRATED_TOKENS))]
        layout = self._stores[0].spec.tokens
        return sample_tokens(self._unseen, layout, choice=self._choice, n_tokens=_CALIBRATED_TOKENS)

    def calibrate_(self, sae: Sae, *, standardise: bool) -> None:
        """Set what inference alone uses, in place, if the architecture has such; the sample is always the same."""
        if sae.calibrates:
            tokens = self._calibration_tokens
            tokens = self.scaling.apply(tokens) if standardise else tokens
            sae.calibrate_(tokens.to(sae.b_dec.device))

    def _centre(self, method: str, *, standardise: bool) -> torch.Tensor:
        """Geometric median or mean of the sample, float32, shape `(D,)`."""
        key = method, standardise
        if key not in self._centres:
            tokens = self.scaling.apply(self._tokens) if standardise else self._tokens
            centre = geometric_median(tokens) if method == "geometric_median" else tokens.double().mean(dim=0)
            self._centres[key] = centre.float()
        return self._centres[key]
