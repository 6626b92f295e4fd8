"""Profiles of chosen latents over a whole store, in this process or on a cluster."""

import functools
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from cytosae.statistics.heatmaps import LatentEncoder
from cytosae.statistics.histograms import LatentProfiles, ProfileResult
from cytosae_cache.reading.loader import iter_row_blocks
from cytosae_cache.reading.reader import StoreReader
from cytosae_pipeline.report.data.report_data import ReportData
from cytosae_pipeline.runtime.cluster import connect, count_workers, map_ranges, plan_ranges
from cytosae_pipeline.runtime.progress import Progress
from cytosae_pipeline.statistics.encode import rows_of
from cytosae_pipeline.statistics.inputs import Inputs
from cytosae_pipeline.statistics.label_index import number_names
from cytosae_pipeline.statistics.sharing import SharedInputs, share

_IMAGES_READ = 16

PROFILE_IMAGES = 1000
"""Images, spread over the store, from which a latent's profile is computed."""

_MIN_PROFILE_IMAGES = 24
_PROFILE_OPERATIONS = 1e12
"""Multiplications and additions that a profile may take on a CPU: about ten seconds."""


def profile_all(data: ReportData, latents: npt.NDArray[np.int64]) -> ProfileResult:
    """Profiles of latents over all readable images of the store, in one pass over it."""
    inputs, config, labels = data.inputs, data.config, data.features.labels
    store = inputs.store
    with Progress("latents", store.n_images, "images") as bar:
        if config.dask is None:
            every = range(store.n_shards)
            return _profile(inputs, latents, labels, every, verify=not config.no_verify, advance=bar.advance).result()
        function = functools.partial(
            _profile_range, share(inputs, config.device), latents, labels, not config.no_verify
        )
        with connect(config.dask) as client:
            ranges = plan_ranges(store.n_shards, count_workers(client))
            return map_ranges(
                client, function, ranges, _merge, lambda part: bar.advance(len(rows_of(inputs, part)))
            ).result()


def _profile(
    inputs: Inputs,
    latents: npt.NDArray[np.int64],
    labels: Sequence[str],
    shards: range,
    *,
    verify: bool,
    advance: Callable[[int], None] = lambda n_images: None,
) -> LatentProfiles:
    """Profiles over the readable images of some shards."""
    encoder, profiles = LatentEncoder(inputs.sae, latents), LatentProfiles(len(latents), len(labels))
    rows = rows_of(inputs, shards)
    numbers = torch.from_numpy(number_names(inputs.store.images.label, labels))
    with StoreReader(inputs.store, verify=verify) as reader:
        for block in iter_row_blocks(reader, block_rows=_IMAGES_READ, start=rows.start, stop=rows.stop):
            # One image at a time: a product rounds differently with its shape.
            for slot in block.valid.nonzero()[0].tolist():
                acts = encoder(torch.from_numpy(block.activations[slot : slot + 1]))
                profiles.update(acts, numbers[block.first + slot : block.first + slot + 1])
            advance(len(block.valid))
    return profiles


def _profile_range(
    shared: SharedInputs, latents: npt.NDArray[np.int64], labels: Sequence[str], verify: bool, shards: range
) -> LatentProfiles:
    """What a worker does for a range of shards."""
    return _profile(shared.open(), latents, labels, shards, verify=verify)


def _merge(into: LatentProfiles, other: LatentProfiles) -> LatentProfiles:
    into.merge(other)
    return into


def profile_images(n_tokens: int, encoder_size: int) -> int:
    """Images of a profile if a CPU must compute all latents to get one: fewer, so that it takes seconds, not minutes.

    Args:
        n_tokens: Tokens of an image.
        encoder_size: Numbers in the encoder's matrix.
    """
    affordable = int(_PROFILE_OPERATIONS / (2 * n_tokens * encoder_size))
    return min(PROFILE_IMAGES, max(_MIN_PROFILE_IMAGES, affordable))
