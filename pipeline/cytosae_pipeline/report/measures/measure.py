"""Everything that a report measures of its latents on all images of a store."""

import numpy as np
import numpy.typing as npt

from cytosae.statistics.histograms import ProfileResult
from cytosae_pipeline.report.data.report_data import ReportData
from cytosae_pipeline.report.measures.compartments import measure_compartments
from cytosae_pipeline.report.measures.evidence import EvidenceMaker
from cytosae_pipeline.report.measures.extras import Extras, Measured
from cytosae_pipeline.report.measures.latent_pass import measure_latents
from cytosae_pipeline.report.measures.score_file import ScoreFile
from cytosae_pipeline.report.measures.value_correlations import columns_at_once, correlate_values
from cytosae_pipeline.runtime.progress import Progress


def measure_all(data: ReportData, latents: npt.NDArray[np.int64], extras: Extras) -> tuple[ProfileResult, Measured]:
    """Look at all readable images in one pass over the store; scores lie in a file until everything is measured.

    Args:
        data: Store, autoencoder and statistics.
        latents: The latents, shape `(M,)`.
        extras: What else is known of all latents.

    Returns:
        Profiles of the latents, and all that was measured of them.

    Raises:
        WriteError: If the disk of the scores is full or fails.
        ClusterError: If the cluster cannot be used.
    """
    rows, values = data.store.valid_rows, extras.values
    maker = EvidenceMaker(data, rows)
    with ScoreFile(data.inputs.folder, len(rows), len(latents)) as scores:
        found = measure_latents(data, latents, scores, extras.sites)
        with Progress("quantiles and labels", len(latents), "latents") as bar:
            evidence = []
            for place in range(len(latents)):
                evidence.append(maker.make(scores.column(place)))
                bar.advance()
        correlations = None
        if values is not None:
            n_blocks = -(-len(values.names) // columns_at_once(len(rows)))
            with Progress("image values", len(latents) * n_blocks, "latents") as bar:
                correlations = correlate_values(
                    values, rows, maker.halves, len(latents), scores.column, advance=bar.advance
                )
    compartments = None if extras.masks is None else measure_compartments(data, latents, extras.masks)
    profiles = data.profiles.take(latents) if data.profiles else found.profiles
    return profiles, Measured(rows, evidence, found.site_counts, correlations, compartments)
