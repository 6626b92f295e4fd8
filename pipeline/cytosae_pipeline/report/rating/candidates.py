"""Images that raters may be shown, and the scores of latents on them."""

import numpy as np
import numpy.typing as npt
import torch

from cytosae.statistics.heatmaps import LatentEncoder
from cytosae_cache.reading.permutation import spread_rows
from cytosae_cache.reading.reader import RowReader
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.rating.items import Candidates
from cytosae_pipeline.report.data.report_data import ReportData
from cytosae_pipeline.report.records.latents import images_at_once
from cytosae_pipeline.runtime.progress import Progress

SAMPLE_IMAGES = 2000
"""Images of which the quantiles of activations are taken, spread evenly over the store."""

MOST_RATED = 1000
"""Latents of one rating."""

_LENDERS = 64


def find_candidates(data: ReportData, reader: RowReader, latents: npt.NDArray[np.int64]) -> Candidates:
    """The top images of the latents and of 64 others, a sample of the store, and scores on all of them.

    Args:
        data: Store, autoencoder and statistics.
        reader: Reader of the store.
        latents: Latents to be rated, shape `(M,)`.

    Raises:
        UserError: If these are more than 1,000.
    """
    if len(latents) > MOST_RATED:
        raise UserError(
            f"a rating has at most {MOST_RATED:,} latents, found {len(latents):,}: name fewer with --latents or "
            "--n_latents"
        )
    # Others lend intruders and decoys: a latent on its own has none.
    others = np.setdiff1d(np.flatnonzero(data.features.sparsity > 0), latents)
    every = np.concatenate([latents, others[spread_rows(len(others), _LENDERS)]])
    valid = data.store.valid_rows
    sample = valid[spread_rows(len(valid), SAMPLE_IMAGES)]
    top_rows = data.top_rows[every]
    rows = np.union1d(sample, top_rows[top_rows >= 0])
    tops = np.zeros((len(every), len(rows)), dtype=np.bool_)
    for at, top in enumerate(top_rows):
        tops[at, np.searchsorted(rows, top[top >= 0])] = True
    scores = np.zeros((len(every), len(rows)), dtype=np.float32)
    encoder = LatentEncoder(data.inputs.sae, every)
    at_once = images_at_once(data, len(every))
    with Progress("images of the rating", len(rows), "images") as bar:
        for start in range(0, len(rows), at_once):
            part = rows[start : start + at_once]
            acts = encoder(torch.from_numpy(reader.read(part)))
            scores[:, start : start + len(part)] = acts.mean(dim=1).T.cpu().numpy()
            bar.advance(len(part))
    return Candidates(every, rows, scores, np.isin(rows, sample), tops)
