"""The latent masking experiment on the page."""

import logging
from typing import Any

from cytosae.analysis.masking import Masking
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.report.data.report_data import ReportData
from cytosae_pipeline.statistics.masking import MaskingResult, run_masking

logger = logging.getLogger(__name__)

_CURVE_NAMES: dict[Masking, str] = {
    "kept": "only the image's k strongest",
    "removed": "without the image's k strongest",
    "random_removed": "without k random active ones",
    "class_kept": "only each label's k most typical",
    "class_removed": "without each label's k most typical",
}


def measure_masking(data: ReportData) -> tuple[dict[str, Any] | None, list[str]]:
    """Run the masking experiment.

    Args:
        data: Store, autoencoder and statistics.

    Returns:
        The record, None if the experiment was not asked for or the labels do not allow it; and messages for the page.
    """
    config = data.config
    if not config.masking_images:
        return None, []
    if len(data.features.labels) < 2:
        logger.info("the masking experiment is skipped: it needs images of at least two labels")
        return None, []
    try:
        result = run_masking(
            data.inputs, config, n_images=config.masking_images, seed=config.seed, subjects=data.subjects
        )
    except UserError as error:
        # The error names the path of the store, which must not appear on a page that may be passed on.
        logger.info(f"the masking experiment is skipped: {error}")
        return None, ["The masking experiment was skipped: it needs two labels with enough images on each side."]
    return masking_record(result), []


def masking_record(result: MaskingResult) -> dict[str, Any]:
    """The masking experiment as the page shows it, with accuracies balanced over labels."""
    accuracy = result.balanced_accuracy
    return {
        "ks": list(result.ks),
        "n_train": result.n_train,
        "n_test": result.n_test,
        "left_out": result.left_out,
        "original": accuracy.original,
        "reconstruction": accuracy.reconstruction,
        "chance": accuracy.chance,
        "curves": [
            {"name": text, "accuracy": accuracy.masked[kind].tolist(), "dashed": kind == "random_removed"}
            for kind, text in _CURVE_NAMES.items()
        ],
    }
