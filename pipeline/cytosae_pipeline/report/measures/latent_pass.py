"""Profiles and scores of chosen latents over a whole store, in one pass, in this process or on a cluster."""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cytosae.statistics.heatmaps import LatentEncoder
from cytosae.statistics.histograms import LatentProfiles, ProfileResult
from cytosae_cache.reading.loader import iter_row_blocks
from cytosae_pipeline.report.data.report_data import ReportData
from cytosae_pipeline.report.measures.score_file import ScoreFile
from cytosae_pipeline.report.measures.sites import Sites
from cytosae_pipeline.runtime.progress import Progress
from cytosae_pipeline.statistics.encode import rows_of
from cytosae_pipeline.statistics.inputs import Inputs
from cytosae_pipeline.statistics.label_index import number_names
from cytosae_pipeline.statistics.streaming import iter_parts

_IMAGES_READ = 16


class PassResult(NamedTuple):
    """What a pass has found, beside the scores."""

    profiles: ProfileResult
    """Profiles of the latents."""
    site_counts: npt.NDArray[np.int64] | None
    """Tokens above the threshold by site, shape `(n_sites, M)`; None without sites."""


class _Part(NamedTuple):
    """The same of a part of the store."""

    scores: npt.NDArray[np.float32]
    profiles: LatentProfiles
    site_counts: npt.NDArray[np.int64]


def measure_latents(
    data: ReportData, latents: npt.NDArray[np.int64], scores: ScoreFile, sites: Sites | None = None
) -> PassResult:
    """Profiles of latents over all readable images of the store, in one pass over it, which also writes the scores.

    Args:
        data: Store, autoencoder and statistics.
        latents: The latents, shape `(M,)`.
        scores: Takes the scores of all readable images, in order of the row.
        sites: Sites of the images.

    Raises:
        WriteError: If the disk of the scores is full or fails.
        ClusterError: If the cluster cannot be used.
    """
    store = data.store
    of_site = np.full(store.n_images, -1) if sites is None else sites.of_image
    n_sites = 0 if sites is None else len(sites.names)
    function = functools.partial(
        _measure, latents, data.features.labels, of_site, n_sites, data.threshold, not data.config.no_verify
    )
    parts = [rows_of(data.inputs, range(shard, shard + 1)) for shard in range(store.n_shards)]
    profiles = LatentProfiles(len(latents), len(data.features.labels))
    site_counts, first = np.zeros((n_sites, len(latents)), dtype=np.int64), 0
    with Progress("latents", store.n_images, "images") as bar:
        for part, found in zip(parts, iter_parts(data.inputs, data.config, function, parts), strict=True):
            scores.write(first, found.scores)
            first += len(found.scores)
            profiles.merge(found.profiles)
            site_counts += found.site_counts
            bar.advance(len(part))
    return PassResult(profiles.result(), None if sites is None else site_counts)


def _measure(
    latents: npt.NDArray[np.int64],
    labels: Sequence[str],
    of_site: npt.NDArray[np.int64],
    n_sites: int,
    threshold: float,
    verify: bool,
    inputs: Inputs,
    parts: Sequence[range],
) -> Iterator[_Part]:
    """What is found on the readable images of ranges of rows."""
    encoder = LatentEncoder(inputs.sae, latents)
    numbers = torch.from_numpy(number_names(inputs.store.images.label, labels))
    with inputs.store.open_reader(verify=verify) as reader:
        for part in parts:
            profiles = LatentProfiles(len(latents), len(labels))
            site_counts = np.zeros((n_sites, len(latents)), dtype=np.int64)
            scores = [np.zeros((0, len(latents)), dtype=np.float32)]
            for block in iter_row_blocks(reader, block_rows=_IMAGES_READ, start=part.start, stop=part.stop):
                # One image at a time: a product rounds differently with its shape.
                for slot in block.valid.nonzero()[0].tolist():
                    row = block.first + slot
                    acts = encoder(torch.from_numpy(block.activations[slot : slot + 1]))
                    profiles.update(acts, numbers[row : row + 1])
                    scores.append(acts.mean(dim=1).cpu().numpy())
                    if of_site[row] >= 0:
                        site_counts[of_site[row]] += (acts[0] > threshold).sum(dim=0).cpu().numpy()
            yield _Part(np.concatenate(scores), profiles, site_counts)
