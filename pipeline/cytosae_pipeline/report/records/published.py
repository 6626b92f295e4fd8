"""Records of results that another program published: latents alone, without images, patients or an autoencoder."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from cytosae_pipeline import __version__
from cytosae_pipeline.errors import say_count
from cytosae_pipeline.report.data.report_data import LatentData
from cytosae_pipeline.report.records.encoding import pack
from cytosae_pipeline.report.records.overview import common_record, training_record

MESSAGES = (
    "These results were not written by cytosae-cache: they are shown as they are. Images, heat maps, histograms, "
    "patients and similar latents need a store of the activations and the autoencoder.",
    "Row numbers of top images are those of the shuffled list of images that the results were made from.",
)
"""What readers should know first."""


def published_overview(
    data: LatentData, latents: npt.NDArray[np.int64], reason: str, dataset: str, n_files: int
) -> dict[str, Any]:
    """The overview's record.

    Args:
        data: Feature data.
        latents: Latents with a page.
        reason: Which these are, in a sentence.
        dataset: Name of the data set.
        n_files: Files that the results were read from.
    """
    facts = [["data set", dataset], ["results", f"{say_count(n_files, 'file')} of another program"]]
    return {
        **common_record(data, latents, reason, title=dataset, messages=list(MESSAGES)),
        "explore": False,
        "can_upload": False,
        "pseudonymous": False,
        "store": {
            "dataset": dataset, "images": 0, "valid": 0, "tokens": 0, "grid": [0, 0], "prefix": 0, "facts": facts,
        },
        "sae": {
            "latents": data.n_latents,
            "facts": [["latents", f"{data.n_latents:,}"], ["page made with", f"cytosae-cache {__version__}"]],
        },
        "training": training_record(data.config),
        "cards": [[] for _ in latents],
        "labels": [{"name": name, "images": 0} for name in data.features.labels],
        "images": {"rows": [], "labels": [], "patients": []},
        "image_pages": False,
        "book": None,
        "has_map": False,
        "has_patients": False,
        "patients": [],
        "thumbnails": False,
        "masking": None,
    }  # fmt: skip


def published_latents(data: LatentData, latents: npt.NDArray[np.int64]) -> Iterator[dict[str, Any]]:
    """Records of latents, with their top images by number.

    Args:
        data: Feature data.
        latents: The latents, shape `(M,)`.
    """
    no_map = pack(np.zeros(0, dtype=np.uint8))
    features = data.features
    for latent in latents.tolist():
        slots = zip(
            features.top_rows[latent].tolist(),
            features.top_values[latent].tolist(),
            features.top_labels[latent].tolist(),
            strict=True,
        )
        yield {
            "latent": latent,
            "n_images": 0,
            "top": [
                {"row": row, "value": value, "peak": 0.0, "label": label, "patient": -1, "map": no_map}
                for row, value, label in slots
                if row >= 0
            ],
            "labels": None,
            "histogram": None,
            "patients": [],
            "threshold": None,
            "neighbours": None,
            "quantiles": [],
            "n_active": 0,
            "rules": None,
            "sources": None,
            "sites": None,
            "partners": [],
            "values": None,
            "compartments": None,
        }
