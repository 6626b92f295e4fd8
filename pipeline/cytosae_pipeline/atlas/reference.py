"""Measures the reference images of an atlas."""

import logging

import numpy as np
import numpy.typing as npt

from cytosae_cache.reading.permutation import IntArray, spread_rows
from cytosae_pipeline.atlas.contents import LEVELS, Reference, SeenImages
from cytosae_pipeline.atlas.passes import judge_images
from cytosae_pipeline.config import PassOptions
from cytosae_pipeline.errors import say_count
from cytosae_pipeline.evaluation.image_scores import Tokens
from cytosae_pipeline.runtime.progress import Progress
from cytosae_pipeline.statistics.features import Features
from cytosae_pipeline.statistics.inputs import Inputs
from cytosae_pipeline.training.holdout import HeldOutBy, held_out

logger = logging.getLogger(__name__)

MOST_IMAGES = 10_000
"""Images, spread evenly over the store, of which quantiles and reconstructions are measured."""

_SCORE_BYTES = 1 << 28
"""Memory for the scores of these images, which a wide autoencoder fills with fewer of them."""

_FEWEST_IMAGES, _FEWEST_HELD_OUT = 1000, 100
_LATENTS_AT_ONCE = 256


def measure_reference(
    inputs: Inputs, features: Features, *, tokens: Tokens, threshold: float, options: PassOptions
) -> Reference:
    """What an atlas has to know about images, in one pass over at most twice `MOST_IMAGES` of them.

    Args:
        inputs: Autoencoder, with its decoder, and store.
        features: Their feature data.
        tokens: Tokens by which reconstruction is judged.
        threshold: Activation above which a token counts.
        options: How images are read and encoded.
    """
    store = inputs.store
    moments = store.moments
    mean_token = moments.sum.sum(axis=0) / max(1, int(moments.count.sum()))
    n_most = min(MOST_IMAGES, max(_FEWEST_IMAGES, _SCORE_BYTES // (4 * inputs.n_latents)))
    scored = store.valid_rows[spread_rows(len(store.valid_rows), n_most)]
    compared, seen = _choose_compared(inputs)
    compared = compared[spread_rows(len(compared), MOST_IMAGES)]
    scores, unexplained = np.empty((len(scored), inputs.n_latents), dtype=np.float32), np.empty(len(compared))
    rows = np.union1d(scored, compared)
    with Progress("reference", len(rows), "images") as bar:
        for images in judge_images(
            inputs, rows, tokens=tokens, threshold=threshold, mean_token=mean_token, options=options,
            advance=bar.advance,
        ):  # fmt: skip
            _, here, there = np.intersect1d(images.rows, scored, assume_unique=True, return_indices=True)
            scores[there] = images.scores[here]
            _, here, there = np.intersect1d(images.rows, compared, assume_unique=True, return_indices=True)
            unexplained[there] = images.unexplained[here]
    found = features.specificity
    n_labels = 0 if found is None else len(features.labels)
    return Reference(
        n_images=len(store.valid_rows),
        n_scored=len(scored),
        quantiles=score_quantiles(scores),
        mean_acts=features.mean_acts,
        sparsity=features.sparsity,
        labels=features.labels[:n_labels],
        label_images=np.zeros(0, dtype=np.int64) if found is None else found.label_images,
        label_active=np.zeros((inputs.n_latents, 0), dtype=np.int64) if found is None else found.label_active,
        label_means=np.zeros((inputs.n_latents, 0), dtype=np.float32) if found is None else found.label_means,
        mean_token=mean_token,
        unexplained=np.sort(unexplained),
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


def _choose_compared(inputs: Inputs) -> tuple[IntArray, SeenImages]:
    """Rows of the images with whose reconstruction that of new images is compared: those not trained on if possible."""
    store, cfg = inputs.store, inputs.sae_cfg
    every = store.valid_rows
    if cfg.get("list_digest") != store.provenance.list_digest:
        return every, "not recorded"
    share = cfg.get("held_out")
    by: HeldOutBy = "patient" if cfg.get("held_out_by") == "patient" else "image"
    if isinstance(share, int | float) and 0 < share < 1:
        rows = np.flatnonzero(store.valid & held_out(store, float(share), by))
        if len(rows) >= _FEWEST_HELD_OUT:
            n = say_count(len(rows), "image")
            logger.info(f"reconstruction is compared with that of {n} that were held out of training")
            return rows, "held out"
        logger.warning(
            f"training held out {say_count(len(rows), 'image')}, too few to compare new images with (at least "
            f"{_FEWEST_HELD_OUT}): all are used, most of which the autoencoder was trained on. {_CONSEQUENCE}"
        )
    else:
        logger.warning(f"the autoencoder was trained on all images of the atlas. {_CONSEQUENCE}")
    return every, "trained on"


_CONSEQUENCE = (
    "It reconstructs new images less well, so that more of them count as outside than --outside says. To avoid that, "
    "train with --held_out 0.1 --held_out_by patient"
)
