"""`export`: an autoencoder, or its statistics, for other programs."""

from cytosae_pipeline.config import ExportConfig
from cytosae_pipeline.export.sae import ExportResult, export_sae
from cytosae_pipeline.export.statistics import TablesResult, export_tables


def run_export(config: ExportConfig) -> ExportResult | TablesResult:
    """Write what the format is for: the autoencoder, or its statistics on a data set.

    Raises:
        ValueError: As for `export_sae` and `export_tables`.
    """
    return export_tables(config) if config.of_statistics else export_sae(config)
