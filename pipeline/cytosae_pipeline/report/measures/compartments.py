"""Activation of latents by compartment of the masks, over the images that have one."""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cytosae.analysis.compartments import CompartmentScores, compare_compartments
from cytosae.statistics.heatmaps import LatentEncoder
from cytosae_pipeline.images.masks import Masks
from cytosae_pipeline.report.data.report_data import ReportData
from cytosae_pipeline.report.measures.score_file import ScoreFile
from cytosae_pipeline.runtime.progress import Progress
from cytosae_pipeline.statistics.inputs import Inputs
from cytosae_pipeline.statistics.streaming import iter_parts, split_evenly

_IMAGES_AT_ONCE = 16


def measure_compartments(data: ReportData, latents: npt.NDArray[np.int64], masks: Masks) -> list[CompartmentScores]:
    """Compare every latent's activation on patches with the masks; one latent's patches are in memory at once.

    Args:
        data: Store and autoencoder.
        latents: The latents, shape `(M,)`.
        masks: The masks.
    """
    n_patches = masks.shares.shape[1]
    function = functools.partial(_encode, masks.rows, latents, data.n_prefix, not data.config.no_verify)
    parts = split_evenly(len(masks.rows), _IMAGES_AT_ONCE)
    shares = masks.shares.reshape(-1, masks.shares.shape[2])
    with ScoreFile(data.inputs.folder, len(shares), len(latents)) as file:
        with Progress("compartments", len(masks.rows), "images") as bar:
            for part, acts in zip(parts, iter_parts(data.inputs, data.config, function, parts), strict=True):
                file.write(part.start * n_patches, acts)
                bar.advance(len(part))
        return [compare_compartments(file.column(place), shares) for place in range(len(latents))]


def compartments_record(masks: Masks, found: CompartmentScores) -> dict[str, Any]:
    """What the page of a latent shows."""
    return {
        "n_images": len(masks.rows),
        "n_without": masks.n_without,
        "compartments": [
            {
                "name": name,
                "share": _number(found.share[at]),
                "area": _number(found.area[at]),
                "precision": _number(found.precision[at]),
                "inside": _number(found.inside[at]),
            }
            for at, name in enumerate(("background", *masks.names))
        ],
    }


def _encode(
    rows: npt.NDArray[np.int64],
    latents: npt.NDArray[np.int64],
    n_prefix: int,
    verify: bool,
    inputs: Inputs,
    parts: Sequence[range],
) -> Iterator[npt.NDArray[np.float32]]:
    """Activations of all patches of the images of each part, shape `(n x n_patches, M)`."""
    encoder = LatentEncoder(inputs.sae, latents)
    with inputs.store.open_reader(verify=verify) as reader:
        for part in parts:
            # One image at a time: a product rounds differently with its shape.
            found = [encoder(torch.from_numpy(reader.read(rows[at : at + 1]))[0, n_prefix:]).cpu() for at in part]
            yield torch.cat(found).numpy()


def _number(value: float) -> float | None:
    """A number; None for NaN."""
    return None if math.isnan(value) else float(value)
