"""Short cards of all latents: labels and top images by number, for latents without a page of their own."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from cytosae_pipeline.report.data.report_data import LatentData
from cytosae_pipeline.report.records.encoding import pack

CARDS_PER_FILE = 1024
"""Latents in one file."""

_TOP_IMAGES = 6


def card_files(data: LatentData, numbers: npt.NDArray[np.int64] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and record of every file of cards.

    Args:
        data: Feature data.
        numbers: Number of each row on the page, shape `(n_images,)`; None if the rows are unknown images.
    """
    for number, first in enumerate(range(0, data.n_latents, CARDS_PER_FILE)):
        yield f"cards/{number}", _cards(data, slice(first, first + CARDS_PER_FILE), numbers)


def _cards(data: LatentData, latents: slice, numbers: npt.NDArray[np.int64] | None) -> dict[str, Any]:
    """Cards of consecutive latents.

    Means are shares of the latent's largest mean of a label, and rates shares of the label's images on which the latent
    is active, both in steps of 1/255.
    """
    rows = data.top_rows[latents, :_TOP_IMAGES]
    shown = rows if numbers is None else np.where(rows >= 0, numbers[np.maximum(rows, 0)], -1)
    record: dict[str, Any] = {
        "top_rows": pack(shown.astype(np.int32)),
        "top_values": pack(data.features.top_values[latents, :_TOP_IMAGES]),
        "means": None,
        "largest": None,
        "rates": None,
    }
    found = data.features.specificity
    if found is None or not data.features.labels:
        return record
    means = found.label_means[latents]
    largest = means.max(axis=1)
    rates = found.label_active[latents] / np.maximum(found.label_images, 1)
    levels = 255 * means / np.where(largest > 0, largest, 1)[:, None]
    return {
        **record,
        "means": pack(np.rint(levels).astype(np.uint8)),
        "largest": pack(largest),
        "rates": pack(np.ceil(255 * rates).astype(np.uint8)),
    }
