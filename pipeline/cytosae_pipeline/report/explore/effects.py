"""What latents change, for the explorer: the probe of the labels is trained when it is first needed."""

from typing import Any

from cytosae_cache.reading.reader import RowReader
from cytosae_pipeline.evaluation.latent_effects import EffectMeter
from cytosae_pipeline.report.data.report_data import ReportData
from cytosae_pipeline.report.records.effects import MOST_PERCENT, effect_record, mean_effect_record, open_meter


class Effects:
    """Records of effects, computed on request; one thread at a time.

    Args:
        data: Store, autoencoder and statistics.
        reader: Reader of the store.
        there: Whether there is what they are computed from.
    """

    def __init__(self, data: ReportData, reader: RowReader, *, there: bool) -> None:
        self._data, self._reader, self._there = data, reader, there
        self._meter: EffectMeter | None = None

    def of_image(self, row: int, latent: int, percent: int) -> dict[str, Any] | None:
        """What scaling a latent changes in a readable image; None if it cannot be computed, or the factor is too large.

        Args:
            row: The image.
            latent: The latent.
            percent: The factor, in percent.
        """
        if not 0 <= latent < self._data.n_latents or not 0 <= percent <= MOST_PERCENT:
            return None
        meter = self._find_meter()
        return None if meter is None else effect_record(self._data, meter, self._reader, row, latent, percent)

    def of_latent(self, latent: int) -> dict[str, Any] | None:
        """What zeroing a latent changes on average over its top images; None if it cannot be computed."""
        return mean_effect_record(self._data, self._find_meter(), self._reader, latent)

    def _find_meter(self) -> EffectMeter | None:
        """The meter, made on the first request."""
        if self._there and self._meter is None:
            self._meter = open_meter(self._data)
            self._there = self._meter is not None
        return self._meter
