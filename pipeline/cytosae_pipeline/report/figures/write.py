"""Writing figures for papers: PNG and SVG of what the page shows. Matplotlib is an extra."""

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cytosae.analysis.differential import GroupComparison
from cytosae_pipeline.errors import UserError, install
from cytosae_pipeline.images.image_list import ImageList
from cytosae_pipeline.report.data.limits import MAX_CORRELATED
from cytosae_pipeline.report.data.report_data import ReportData
from cytosae_pipeline.report.records.comparisons import GroupPair
from cytosae_pipeline.report.records.overview import training_record
from cytosae_pipeline.runtime.progress import Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LATENTS_PER_FIGURE = 10
MAX_REFERENCE_LATENTS = 20


def require_matplotlib() -> None:
    """Check that matplotlib is installed.

    Raises:
        UserError: If it is not.
    """
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise UserError(f"figures need matplotlib: {install('figures')}") from error


def write_figures(
    folder: Path,
    data: ReportData,
    latents: npt.NDArray[np.int64],
    images: ImageList | None,
    *,
    comparisons: Sequence[tuple[GroupPair, GroupComparison]] = (),
    masking: dict[str, Any] | None = None,
) -> list[Path]:
    """Write every figure that the data allow, as PNG at 300 dpi and as SVG with text as text.

    Cell images are read for one figure at a time, so memory does not grow with their number.

    Args:
        folder: Target folder; created if it is missing.
        data: Store, autoencoder and statistics.
        latents: Latents with a page, shape `(M,)`.
        images: Location of the images; None if they were not found.
        comparisons: Comparisons of groups, in the order of the page.
        masking: Record of the masking experiment; None if it was not run.

    Returns:
        The files.

    Raises:
        UserError: If matplotlib is not installed.
        SourceError: If the disk with the images fails repeatedly.
    """
    require_matplotlib()
    from cytosae_pipeline.report.figures.style import figure_style, save_figure

    folder.mkdir(parents=True, exist_ok=True)
    plan = _plan(data, latents, images, comparisons, masking)
    files: list[Path] = []
    with figure_style(), Progress("figures", len(plan), "figures") as bar:
        for name, draw in plan:
            files += save_figure(draw(), folder, name)
            bar.advance()
    return files


def _plan(
    data: ReportData,
    latents: npt.NDArray[np.int64],
    images: ImageList | None,
    comparisons: Sequence[tuple[GroupPair, GroupComparison]],
    masking: dict[str, Any] | None,
) -> "list[tuple[str, Callable[[], Figure]]]":
    """Name and drawing function of each figure."""
    from cytosae_pipeline.report.figures.curves import draw_masking, draw_training
    from cytosae_pipeline.report.figures.latents import draw_latents, draw_reference_images
    from cytosae_pipeline.report.figures.patients import draw_barcodes, draw_comparison, draw_correlation

    plan: list[tuple[str, Callable[[], Figure]]] = [("latents", partial(draw_latents, data, latents))]
    best = latents[:MAX_REFERENCE_LATENTS]
    for number, start in enumerate(range(0, len(best), LATENTS_PER_FIGURE)):
        part = best[start : start + LATENTS_PER_FIGURE]
        plan.append((f"reference_images_{number}", partial(draw_reference_images, data, part, images)))
    cohort = data.cohort
    if cohort is not None:
        plan.append(("barcodes", partial(draw_barcodes, cohort, latents)))
        for number, (pair, found) in enumerate(comparisons):
            plan.append((f"comparison_{number}", partial(draw_comparison, cohort, pair, found)))
        if 2 <= len(cohort.names) <= MAX_CORRELATED:
            plan.append(("correlation", partial(draw_correlation, cohort)))
    training = training_record(data.config)
    if training is not None and training["curves"]:
        plan.append(("training", partial(draw_training, training)))
    if masking is not None:
        plan.append(("masking", partial(draw_masking, masking)))
    return plan
