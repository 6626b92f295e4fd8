"""Measures the reference images of an atlas."""

import logging
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from cytosae.analysis.outside import unusual_share
from cytosae_cache.format.moments import Moments
from cytosae_cache.reading.permutation import IntArray, spread_rows
from cytosae_pipeline.atlas.contents import HIGH_LEVEL, LEVELS, Reference, SeenImages
from cytosae_pipeline.atlas.passes import JudgedImages, judge_images
from cytosae_pipeline.config import PassOptions
from cytosae_pipeline.errors import say_count
from cytosae_pipeline.evaluation.image_scores import Tokens
from cytosae_pipeline.runtime.progress import Progress
from cytosae_pipeline.statistics.features import Features
from cytosae_pipeline.statistics.inputs import Inputs
from cytosae_pipeline.training.holdout import held_out, is_trained_on, trained_unit

logger = logging.getLogger(__name__)

MOST_IMAGES = 10_000
"""Images, spread evenly over the store, of which quantiles and reconstructions are measured."""

_SCORE_BYTES = 1 << 28
"""Memory for the scores of these images, which a wide autoencoder fills with fewer of them."""

_FEWEST_IMAGES, _FEWEST_COMPARED = 1000, 200
_LATENTS_AT_ONCE = 256


def measure_reference(
    inputs: Inputs, features: Features, *, tokens: Tokens, threshold: float, options: PassOptions
) -> Reference:
    """What an atlas has to know about images, over at most twice `MOST_IMAGES` of them.

    Args:
        inputs: Autoencoder, with its decoder, and store.
        features: Their feature data.
        tokens: Tokens by which reconstruction is judged.
        threshold: Activation above which a token counts.
        options: How images are read and encoded.
    """
    store = inputs.store
    compared, rest, seen = _split(inputs)
    n_most = min(MOST_IMAGES, max(_FEWEST_IMAGES, _SCORE_BYTES // (4 * inputs.n_latents)))
    scored = rest[spread_rows(len(rest), n_most)]
    compared = compared[spread_rows(len(compared), MOST_IMAGES)]
    variance = token_variance(store.moments)
    scores = np.empty((len(scored), inputs.n_latents), dtype=np.float32)
    unexplained, unusual = np.empty(len(compared)), np.empty(len(compared))
    with Progress("reference", len(scored) + len(compared), "images") as bar:

        def judge(rows: IntArray) -> Iterator[tuple[slice, JudgedImages]]:
            start = 0
            for images in judge_images(
                inputs, rows, tokens=tokens, threshold=threshold, variance=variance, options=options,
                advance=bar.advance,
            ):  # fmt: skip
                yield slice(start, start := start + len(images.rows)), images

        for part, images in judge(scored):
            scores[part] = images.scores
        quantiles = score_quantiles(scores)
        for part, images in judge(compared):
            unexplained[part] = images.unexplained
            unusual[part] = unusual_share(images.scores, quantiles[:, HIGH_LEVEL])
    # The order of the rows is that of paths, which are not to be told.
    order = np.lexsort((unusual, unexplained))
    found = features.specificity
    n_labels = 0 if found is None else len(features.labels)
    return Reference(
        n_images=len(store.valid_rows),
        n_scored=len(scored),
        quantiles=quantiles,
        mean_acts=features.mean_acts,
        sparsity=features.sparsity,
        labels=features.labels[:n_labels],
        label_images=np.zeros(0, dtype=np.int64) if found is None else found.label_images,
        label_active=np.zeros((inputs.n_latents, 0), dtype=np.int64) if found is None else found.label_active,
        label_means=np.zeros((inputs.n_latents, 0), dtype=np.float32) if found is None else found.label_means,
        variance=variance,
        unexplained=unexplained[order],
        unusual=unusual[order],
        seen=seen,
    )


def score_quantiles(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Quantiles of each latent's scores at `LEVELS`, linear between neighbours, shape `(S, len(LEVELS))`.

    Args:
        scores: Shape `(n, S)`, n at least 1.
    """
    found = np.empty((scores.shape[1], len(LEVELS)), dtype=np.float32)
    for first in range(0, scores.shape[1], _LATENTS_AT_ONCE):
        part = slice(first, first + _LATENTS_AT_ONCE)
        found[part] = np.quantile(scores[:, part], LEVELS, axis=0).T
    return found


def token_variance(moments: Moments) -> float:
    """Mean of `||x - mean||^2` over all tokens of a store's readable images, above 0."""
    n = max(1, int(moments.count.sum()))
    mean = moments.sum.sum(axis=0) / n
    return max(float(moments.sum_sq.sum() / n - mean @ mean), float(np.finfo(np.float32).tiny))


def _split(inputs: Inputs) -> tuple[IntArray, IntArray, SeenImages]:
    """Images that new ones are compared with, and those that quantiles are of.

    They are different images, because a score is above a quantile less often among the images that the quantile is of.
    Images that were held out of training are compared with if there are enough of them, else every fifth.
    """
    store, cfg = inputs.store, inputs.sae_cfg
    here = is_trained_on(cfg, store)
    share, by = cfg.get("held_out"), trained_unit(cfg)
    if here and isinstance(share, int | float) and 0 < share < 1:
        is_held_out = held_out(store, float(share), by)
        compared, rest = np.flatnonzero(store.valid & is_held_out), np.flatnonzero(store.valid & ~is_held_out)
        n = say_count(len(compared), "image")
        if len(compared) >= _FEWEST_COMPARED and len(rest):
            logger.info(f"new images are compared with {n} that were held out of training")
            return compared, rest, "held out"
        logger.warning(
            f"training held out {n}, too few to compare new images with (at least {_FEWEST_COMPARED}): every fifth is "
            f"used, and the autoencoder was trained on most of these. {_CONSEQUENCE}"
        )
    elif here:
        logger.warning(f"the autoencoder was trained on images of the atlas. {_CONSEQUENCE}")
    rows = store.valid_rows
    n_compared = max(len(rows) // 5, min(_FEWEST_COMPARED, len(rows) // 2))
    chosen = np.zeros(len(rows), dtype=bool)
    chosen[spread_rows(len(rows), n_compared)] = True
    if len(rows) < 2:  # one image is both
        return rows, rows, "trained on" if here else "not recorded"
    return rows[chosen], rows[~chosen], "trained on" if here else "not recorded"


_CONSEQUENCE = (
    "It reconstructs new images less well, so that more of them count as outside than --outside says. To avoid that, "
    "train with --held_out 0.1 --held_out_by patient, or more for few images"
)
