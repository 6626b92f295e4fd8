"""Pages in Python: `report`."""

from cytosae_pipeline.api.options import takes_options
from cytosae_pipeline.config import ReportConfig
from cytosae_pipeline.report.static import ReportResult, write_report


@takes_options(ReportConfig)
def make_report(options: ReportConfig) -> ReportResult:
    """Write a page of cells, latents and patients that opens from disk, offline: the verb `report`.

    Returns:
        `result.index` is the page.

    Raises:
        ValueError: If the autoencoder or store is missing, they do not fit, or an option does not fit them.
    """
    return write_report(options)
