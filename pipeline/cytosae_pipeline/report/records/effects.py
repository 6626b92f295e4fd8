"""What a latent changes in the labels, on the page: in one image, and on average over its top images."""

import logging
from typing import Any

import numpy as np

from cytosae_cache.reading.reader import RowReader
from cytosae_pipeline.building.tail_file import find_tail, tail_bytes
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.evaluation.latent_effects import EffectMeter, make_meter
from cytosae_pipeline.report.data.report_data import ReportData

logger = logging.getLogger(__name__)

TOP_IMAGES = 5
"""Top images over which a latent's effect is averaged."""

MOST_PERCENT = 1000
"""Largest factor, in percent."""


def has_effects(data: ReportData) -> bool:
    """Whether there is what effects are computed from: a tail beside the store, and labels."""
    return tail_bytes(find_tail(data.store).path) is not None and len(data.features.labels) > 1


def open_meter(data: ReportData) -> EffectMeter | None:
    """The meter, whose probe is trained now; None if there is no tail, or the labels do not allow a probe.

    Raises:
        StoreError: If the tail is damaged or of another store; the message says what to type.
    """
    if not has_effects(data):
        return None
    try:
        return make_meter(data.inputs, data.config, verify=not data.config.no_verify)
    except UserError as error:
        # The error names the path of the store, which must not appear on a page that may be passed on.
        logger.info(f"what latents change is left out: {error}")
        return None


def effect_record(
    data: ReportData, meter: EffectMeter, reader: RowReader, row: int, latent: int, percent: int
) -> dict[str, Any]:
    """What scaling a latent changes in one image.

    Args:
        data: Store, autoencoder and statistics.
        meter: The meter.
        reader: Reader of the store.
        row: The image.
        latent: The latent.
        percent: The factor, in percent.
    """
    found = meter.measure(reader.read(np.array([row])), latent, percent / 100)
    return {
        "latent": latent,
        "percent": percent,
        "n_train": meter.n_train,
        "cosine": float(found.cosine[0]),
        "labels": _label_rows(data, meter, found.before[0].tolist(), found.after[0].tolist()),
    }


def mean_effect_record(
    data: ReportData, meter: EffectMeter | None, reader: RowReader, latent: int
) -> dict[str, Any] | None:
    """What zeroing a latent changes on average over its first top images; None without a meter or top images.

    Args:
        data: Store, autoencoder and statistics.
        meter: The meter, if there is one.
        reader: Reader of the store.
        latent: The latent.
    """
    rows = data.top_rows[latent, :TOP_IMAGES]
    rows = rows[rows >= 0]
    if meter is None or not len(rows):
        return None
    found = meter.measure(reader.read(rows), latent)
    before, after = (part.mean(dim=0).tolist() for part in (found.before, found.after))
    return {
        "n_images": len(rows),
        "n_train": meter.n_train,
        "cosine": float(found.cosine.mean()),
        "labels": _label_rows(data, meter, before, after),
    }


def _label_rows(
    data: ReportData, meter: EffectMeter, before: list[float], after: list[float]
) -> list[list[int | float]]:
    """Number of each label on the page, and its probability before and after."""
    numbers = {name: number for number, name in enumerate(data.features.labels)}
    return [[numbers[name], one, other] for name, one, other in zip(meter.classes, before, after, strict=True)]
