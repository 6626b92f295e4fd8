"""Shares of a latent's active tokens by patient or subject, and by site."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cytosae.analysis.shares import LargestShares, largest_shares
from cytosae_pipeline.report.data.report_data import ReportData
from cytosae_pipeline.report.measures.sites import Sites

_SHOWN = 6
"""Patients and sites that the page of a latent lists."""


class Sources(NamedTuple):
    """Active tokens by person."""

    unit: str
    """`patient`, or `subject` where several patients are one person."""
    names: list[str]
    """Their names on the page."""
    counts: npt.NDArray[np.int64]
    """Tokens above the threshold, shape `(P, S)`."""
    n_images: npt.NDArray[np.int64]
    """Readable images, shape `(P,)`."""
    largest: LargestShares
    """The largest share of every latent."""


def find_sources(data: ReportData) -> Sources | None:
    """Active tokens of all latents by person; None if the images have no patients."""
    cohort = data.cohort
    if cohort is None:
        return None
    if cohort.subjects is None:
        return Sources(
            "patient", cohort.names, cohort.raw, cohort.n_images, largest_shares(cohort.raw, cohort.n_images)
        )
    names, of = cohort.subjects.names, cohort.subjects.of
    counts, n_images = np.zeros((len(names), cohort.raw.shape[1]), np.int64), np.zeros(len(names), np.int64)
    np.add.at(counts, of, cohort.raw)
    np.add.at(n_images, of, cohort.n_images)
    return Sources("subject", list(names), counts, n_images, largest_shares(counts, n_images))


def sources_record(sources: Sources | None, latent: int) -> dict[str, Any] | None:
    """The persons with the largest shares of a latent, as the page shows them; None without persons."""
    if sources is None:
        return None
    return {
        "unit": sources.unit,
        "total": int(sources.counts[:, latent].sum()),
        "largest": _largest(sources.counts[:, latent], sources.n_images),
        "is_one": bool(sources.largest.is_one[latent]),
    }


def sites_record(
    sites: Sites, counts: npt.NDArray[np.int64], rows: npt.NDArray[np.int64], threshold: float
) -> dict[str, Any]:
    """The sites with the largest shares of a latent, as the page shows them.

    Args:
        sites: The sites.
        counts: The latent's tokens above the threshold by site, shape `(n_sites,)`.
        rows: Rows of the images that were counted, shape `(n,)`.
        threshold: The threshold.
    """
    of_image = sites.of_image[rows]
    n_images = np.bincount(of_image[of_image >= 0], minlength=len(sites.names))
    found = largest_shares(counts[:, None], n_images)
    return {
        "column": sites.column,
        "threshold": threshold,
        "total": int(counts.sum()),
        "largest": [{**one, "name": sites.names[one["source"]]} for one in _largest(counts, n_images)],
        "is_one": bool(found.is_one[0]),
    }


def _largest(counts: npt.NDArray[np.int64], n_images: npt.NDArray[np.int64]) -> list[dict[str, Any]]:
    """The largest shares above 0, beside the shares of the images."""
    order = np.argsort(-counts, kind="stable")[:_SHOWN]
    total, images = max(int(counts.sum()), 1), max(int(n_images.sum()), 1)
    return [
        {"source": at, "share": int(counts[at]) / total, "of_images": int(n_images[at]) / images}
        for at in order.tolist()
        if counts[at]
    ]
