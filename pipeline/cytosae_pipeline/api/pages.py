"""Pages and ratings in Python: `report` and `ratings`."""

from cytosae_pipeline.api.options import takes_options
from cytosae_pipeline.config import RatingsConfig, ReportConfig
from cytosae_pipeline.rating.summary import RatingsSummary, run_ratings
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


@takes_options(RatingsConfig)
def ratings(options: RatingsConfig) -> RatingsSummary:
    """How raters rated latents with `explore --rate`, and how well they agree: the verb `ratings`.

    Returns:
        `result.raters`, `result.pairs` with Cohen's kappa, `result.all_raters` with Fleiss' kappa, and `result.passed`.

    Raises:
        ValueError: If the autoencoder or store is missing or they do not fit, or there are no ratings.
    """
    return run_ratings(options)
