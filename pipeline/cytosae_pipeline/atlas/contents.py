"""What an atlas contains, and the names of its files."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from cytosae.sae.base import Sae
from cytosae_cache.format.spec import StoreSpec
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.evaluation.image_scores import Tokens
from cytosae_pipeline.statistics.notes import FILE_NAME as NOTES
from cytosae_pipeline.statistics.notes import LatentNote

FORMAT, VERSION = "cytosae-cache atlas", 1
"""How a manifest begins."""

MANIFEST, SAE, REFERENCE = "manifest.json", "sae.safetensors", "reference.safetensors"
FILES = (SAE, REFERENCE, NOTES)
"""Files beside the manifest, which has their sizes and digests."""

LEVELS = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0)
"""Levels of the quantiles of scores."""

HIGH_LEVEL = LEVELS.index(0.999)
"""Position of the level above which a score is unusual."""

Unit = Literal["patient", "subject"]
SeenImages = Literal["held out", "trained on", "not recorded"]


class AtlasError(UserError):
    """A folder is not an atlas, or a damaged one; the message says what was found and what was expected."""


class GroupQuality(NamedTuple):
    """How well the groups of the atlas' own patients are predicted, by models that did not see them."""

    names: tuple[str, ...]
    """Groups of at least two patients, which alone are predicted."""
    balanced_accuracy: float
    """Mean over these groups of the share of their patients predicted correctly, by cross-validation."""


@dataclass(frozen=True, eq=False)
class Barcodes:
    """The reference patients: P of them, in the order of their pseudonyms."""

    unit: Unit
    """What one of them is: a patient of the store, or a subject with all its patients."""
    names: tuple[str, ...]
    """Pseudonyms."""
    counts: npt.NDArray[np.int64]
    """Tokens above the threshold, shape `(P, S)`."""
    n_images: npt.NDArray[np.int64]
    """Readable images of each, at least 1, shape `(P,)`."""
    group_names: tuple[str, ...]
    """Names of the groups, sorted; empty if there are none."""
    groups: npt.NDArray[np.int64]
    """Group of each, shape `(P,)`; -1 for none."""

    @property
    def per_image(self) -> npt.NDArray[np.float64]:
        """Counts per image, shape `(P, S)`."""
        return self.counts / np.maximum(self.n_images, 1)[:, None]


@dataclass(frozen=True, eq=False)
class Reference:
    """What is known about the reference images."""

    n_images: int
    """Readable images of the store."""
    n_scored: int
    """Images that the quantiles are of, spread evenly over those that new images are not compared with."""
    quantiles: npt.NDArray[np.float32]
    """Quantiles of each latent's scores, shape `(S, len(LEVELS))`."""
    mean_acts: npt.NDArray[np.float32]
    """Mean score over the images where the latent is active, shape `(S,)`."""
    sparsity: npt.NDArray[np.float32]
    """Share of images where it is active, shape `(S,)`."""
    labels: tuple[str, ...]
    """Names of the labels."""
    label_images: npt.NDArray[np.int64]
    """Readable images of each label, shape `(L,)`."""
    label_active: npt.NDArray[np.int64]
    """Those of them on which the latent is active, shape `(S, L)`."""
    label_means: npt.NDArray[np.float32]
    """Mean score over the images of each label, shape `(S, L)`."""
    variance: float
    """Mean of `||x - mean||^2` over the tokens of all images, the unit of `unexplained`."""
    unexplained: npt.NDArray[np.float64]
    """Unexplained variance of the images that new ones are compared with, rising, shape `(n,)`."""
    unusual: npt.NDArray[np.float64]
    """Share of unusual latents of the same images, shape `(n,)`."""
    seen: SeenImages
    """Whether the autoencoder was trained on these images; `not recorded` if it was trained on other data, or its file
    does not say."""


@dataclass(frozen=True, eq=False)
class Atlas:
    """An atlas in memory."""

    spec: StoreSpec
    """Spec of the activations that it applies to."""
    sae: Sae
    """The autoencoder, with its decoder."""
    tokens: Tokens
    """Tokens by which reconstruction is judged: those that the autoencoder was trained on."""
    threshold: float
    """Activation above which a token counts."""
    reference: Reference
    """The reference images."""
    barcodes: Barcodes
    """The reference patients."""
    quality: GroupQuality | None
    """Of the groups; None where there are too few patients."""
    notes: dict[int, LatentNote]
    """Names and notes of latents."""

    @property
    def n_latents(self) -> int:
        """Latents S."""
        return int(self.sae.W_enc.shape[1])

    def name_of(self, latent: int) -> str:
        """Name of a latent; '' without one."""
        note = self.notes.get(latent)
        return "" if note is None else note["name"]
