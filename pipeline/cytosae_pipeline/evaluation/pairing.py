"""Latents of two autoencoders paired by what they do on the same images: any encoders, any numbers of latents."""

import logging
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from cytosae.analysis.matching import PairCollector, TooManyPairsError, match, similarity_of
from cytosae.statistics.cross_correlations import BestPartners, CrossCorrelations, ScoreMoments
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.evaluation.image_scores import ImageScores
from cytosae_pipeline.runtime.devices import accumulator_device
from cytosae_pipeline.runtime.memory import available_ram
from cytosae_pipeline.runtime.progress import Progress

logger = logging.getLogger(__name__)

_MOST_BYTES = 2 << 30
"""Memory of the correlations that are summed in one pass, at most; a quarter of the free memory if that is less."""
_SHARE_OF_RAM = 4
RARE = 5
"""A latent that is active on fewer images is rare: two that are active on the same image alone have correlation 1."""
_MANY_RARE = 0.25
"""Share of rare latents from which it is said."""
_BYTES_OF_ENTRY = 16
"""Of a correlation: its sum, and what is made of it at the end."""


@dataclass(frozen=True, eq=False)
class ActivationPairs:
    """Live latents of two autoencoders and the correlations of their scores (docs/definitions.md, section 12)."""

    first_active: npt.NDArray[np.int64]
    """Images on which each latent of the first autoencoder is active, shape `(S,)`."""
    second_active: npt.NDArray[np.int64]
    """The same of the second, shape `(S',)`."""
    partner: npt.NDArray[np.int64]
    """Partner of each latent of the first in the one-to-one matching, shape `(S,)`; -1 for none."""
    correlation: npt.NDArray[np.float64]
    """Correlation with the partner, shape `(S,)`; 0 without one."""
    first_best: BestPartners
    """The most correlated latent of the second for each of the first, whoever else has it."""
    second_best: BestPartners
    """The same for each latent of the second."""

    @property
    def n_first(self) -> int:
        """Live latents of the first."""
        return int((self.first_active > 0).sum())

    @property
    def n_second(self) -> int:
        """Live latents of the second."""
        return int((self.second_active > 0).sum())

    @property
    def n_rare(self) -> int:
        """Live latents of the first that are active on so few images that high correlations are common by chance."""
        return int(((self.first_active > 0) & (self.first_active < RARE)).sum())

    @property
    def n_matched(self) -> int:
        """Latents of the first that have a partner."""
        return int((self.partner >= 0).sum())


def pair_by_activation(first: ImageScores, second: ImageScores, *, above: float, what: str) -> ActivationPairs:
    """Pair live latents by the correlation of their scores over the images.

    One pass finds which latents are live, and their means; then the correlations are summed for as many latents of the
    first autoencoder at a time as fit into memory, in a pass each. No array has images and latents as axes.

    Args:
        first: Scores of the first autoencoder.
        second: Scores of the second on the same images, in the same order.
        above: Correlation above which two latents can be partners.
        what: Name of the work, shown with the progress.

    Raises:
        UserError: If so many pairs are above the threshold that they do not fit into memory.
    """
    device = accumulator_device(first.inputs.sae.W_enc.device)
    moments = [ScoreMoments(one.n_latents, device=device) for one in (first, second)]
    with Progress(what, len(first), "images") as bar:
        for images in zip(first, second, strict=True):
            for found, one in zip(moments, images, strict=True):
                found.update(one.scores)
            bar.advance(len(images[0].scores))
    live = [torch.nonzero(found.n_active > 0)[:, 0] for found in moments]
    bests = [BestPartners.empty(one.n_latents) for one in (first, second)]
    collector = PairCollector()
    size = _rows_at_once(len(live[1]))
    blocks = [live[0][at : at + size] for at in range(0, len(live[0]), size)] if len(live[1]) else []
    with Progress(f"{what}: correlations", len(blocks) * len(first), "images") as bar:
        for block in blocks:
            sums = CrossCorrelations(moments[0], moments[1], block, live[1])
            for one, other in zip(first, second, strict=True):
                sums.update(one.scores, other.scores)
                bar.advance(len(one.scores))
            _take(sums.result(), block, live[1], bests, collector, above)
    pairs = collector.result()
    partner = match(pairs, first.n_latents, second.n_latents)
    active = [found.n_active.cpu().numpy() for found in moments]
    return ActivationPairs(active[0], active[1], partner, similarity_of(pairs, partner), *bests)


def warn_of_rare(found: ActivationPairs, n_images: int, advice: str) -> None:
    """Say that correlations over so few images are high by chance, if that concerns many latents.

    Args:
        found: What was found.
        n_images: Images.
        advice: What to do about it.
    """
    if found.n_rare > _MANY_RARE * found.n_first:
        logger.warning(
            f"{found.n_rare:,} of {found.n_first:,} live latents are active on fewer than {RARE} of {n_images:,} "
            f"images: many of their correlations are high by chance. {advice}"
        )


def explain_too_many(error: TooManyPairsError, above: float) -> UserError:
    """The message for more pairs above a threshold than fit into memory."""
    return UserError(
        f"more than {error.n_most:,} pairs of latents are above {above:g}: most latents are like each other, perhaps "
        "because there are few images. Give a --match_above nearer to 1, or more images"
    )


def _rows_at_once(n_columns: int) -> int:
    """Latents of the first autoencoder in one pass."""
    ram = available_ram()
    n_bytes = _MOST_BYTES if ram is None else min(_MOST_BYTES, ram // _SHARE_OF_RAM)
    return max(1, n_bytes // (_BYTES_OF_ENTRY * max(1, n_columns)))


def _take(
    correlation: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    bests: list[BestPartners],
    collector: PairCollector,
    above: float,
) -> None:
    """Keep the best partners and the pairs above the threshold of a block of correlations."""
    first, second = bests
    row_best, column_best = correlation.max(dim=1), correlation.max(dim=0)
    first.latent[rows.cpu()] = columns[row_best.indices].cpu()
    first.similarity[rows.cpu()] = row_best.values.cpu()
    second.improve(columns.cpu(), rows[column_best.indices], column_best.values)
    one, other = torch.nonzero(correlation > above, as_tuple=True)
    try:
        collector.add(rows[one].cpu().numpy(), columns[other].cpu().numpy(), correlation[one, other])
    except TooManyPairsError as error:
        raise explain_too_many(error, above) from error
