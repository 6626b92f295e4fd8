"""What is known of latents beside the statistics, as far as options and columns allow it."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cytosae.analysis.compartments import CompartmentScores
from cytosae_pipeline.images.masks import Masks, find_masks
from cytosae_pipeline.report.data.report_data import ReportData
from cytosae_pipeline.report.measures.compartments import compartments_record
from cytosae_pipeline.report.measures.evidence import LatentEvidence
from cytosae_pipeline.report.measures.image_values import ImageValues, find_values
from cytosae_pipeline.report.measures.other_seeds import OtherSeed, find_partners, partner_records
from cytosae_pipeline.report.measures.sites import Sites, find_sites
from cytosae_pipeline.report.measures.sources import Sources, find_sources, sites_record, sources_record
from cytosae_pipeline.report.measures.value_correlations import ValueCorrelations, values_record


class Extras(NamedTuple):
    """What does not depend on a pass over the store."""

    sources: Sources | None
    """Active tokens by person."""
    sites: Sites | None
    """Sites of the images."""
    seeds: list[OtherSeed]
    """Nearest latents of other autoencoders."""
    values: ImageValues | None
    """Numbers known of each image."""
    masks: Masks | None
    """Masks of some images."""


class Measured(NamedTuple):
    """What was measured of M latents."""

    rows: npt.NDArray[np.int64]
    """Rows of the images that were looked at."""
    evidence: list[LatentEvidence]
    """Of each latent."""
    site_counts: npt.NDArray[np.int64] | None
    """Tokens above the threshold by site, shape `(n_sites, M)`; None without sites."""
    correlations: ValueCorrelations | None
    """With image values; None without any."""
    compartments: list[CompartmentScores] | None
    """Of each latent; None without masks."""


def find_extras(data: ReportData) -> Extras:
    """Everything that options and columns provide.

    Raises:
        ValueError: If a file of an option cannot be used.
    """
    return Extras(
        sources=find_sources(data),
        sites=find_sites(data.inputs, data.config),
        seeds=find_partners(data.inputs, data.config),
        values=find_values(data.store, data.config.image_values),
        masks=find_masks(data.store, data.config),
    )


def extras_record(extras: Extras, measured: Measured, latent: int, place: int, threshold: float) -> dict[str, Any]:
    """What the page of a latent shows of all this, beside the images at quantiles.

    Args:
        extras: Of all latents.
        measured: Of the M latents.
        latent: The latent.
        place: Its place among the M.
        threshold: Activation above which a token counts.
    """
    sites, counts, found = extras.sites, measured.site_counts, measured.correlations
    evidence = measured.evidence[place]
    return {
        "n_active": evidence.n_active,
        "rules": evidence.labels,
        "sources": sources_record(extras.sources, latent),
        "sites": None
        if sites is None or counts is None
        else sites_record(sites, counts[:, place], measured.rows, threshold),
        "partners": partner_records(extras.seeds, latent),
        "compartments": None
        if extras.masks is None or measured.compartments is None
        else compartments_record(extras.masks, measured.compartments[place]),
        "values": None if found is None else values_record(found, place),
    }
