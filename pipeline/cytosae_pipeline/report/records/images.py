"""Records of all images of the store: what is known of each, and which belong to a label or a patient.

They are cut into files of a fixed number of images, so that neither the page nor this program needs one with all.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cytosae_pipeline.report.data.report_data import ReportData
from cytosae_pipeline.report.records.encoding import pack

ROWS_PER_FILE = 1000
"""Images described in one file."""

LISTED_PER_FILE = 8192
"""Entries of one file of a listing."""

_TOPS_SHOWN = 8
"""Most latents named for an image."""

Kind = Literal["label", "patient"]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ImageBook:
    """All images by their number on the page, and the readable ones in the order of labels and of patients."""

    data: ReportData
    """Store, autoencoder and statistics."""
    rows: IntArray
    """Row of each number, shape `(n_images,)`."""
    listings: dict[Kind, IntArray]
    """Readable rows, ordered by label or patient, then number; those without one come last."""
    starts: dict[Kind, IntArray]
    """Where each label or patient begins in its listing, and where the last one ends."""
    top_starts: IntArray
    """Where the latents of each row begin in `top_places`, shape `(n_images + 1,)`."""
    top_places: IntArray
    """Flat places in the table of top images, ordered by row, then rank."""

    @property
    def n_files(self) -> int:
        """Files of descriptions."""
        return -(-len(self.rows) // ROWS_PER_FILE)

    def n_listing_files(self, kind: Kind) -> int:
        """Files of a listing."""
        return -(-len(self.listings[kind]) // LISTED_PER_FILE)


def make_image_book(data: ReportData) -> ImageBook:
    """The images of a store in the orders in which the page shows them."""
    valid = data.store.valid_rows
    columns: dict[Kind, tuple[IntArray, int]] = {
        "label": (data.labels, len(data.features.labels)),
        "patient": (data.patients, len(data.cohort.names) if data.cohort else 0),
    }
    listings: dict[Kind, IntArray] = {}
    starts: dict[Kind, IntArray] = {}
    for kind, (column, n_names) in columns.items():
        here = np.where(column[valid] < 0, n_names, column[valid])
        order = np.lexsort((data.numbers[valid], here))
        listings[kind] = valid[order]
        starts[kind] = np.searchsorted(here[order], np.arange(n_names + 1)).astype(np.int64)
    top = data.top_rows.ravel()
    rank = np.tile(np.arange(data.top_rows.shape[1]), data.n_latents)
    places = np.flatnonzero(top >= 0)
    places = places[np.lexsort((rank[places], top[places]))]
    bounds = np.searchsorted(top[places], np.arange(data.store.n_images + 1))
    return ImageBook(data, np.argsort(data.numbers), listings, starts, bounds.astype(np.int64), places)


def book_record(book: ImageBook) -> dict[str, Any]:
    """What the overview says of the files of images."""
    return {
        "rows_per_file": ROWS_PER_FILE,
        "listed_per_file": LISTED_PER_FILE,
        "label_starts": book.starts["label"].tolist(),
        "patient_starts": book.starts["patient"].tolist(),
    }


def rows_record(book: ImageBook, number: int) -> dict[str, Any]:
    """Record of one file of descriptions; paths are left out under pseudonyms.

    Args:
        book: The images.
        number: The file, from 0.
    """
    data = book.data
    rows = book.rows[number * ROWS_PER_FILE : (number + 1) * ROWS_PER_FILE]
    paths = data.store.images.path
    return {
        "valid": pack(data.store.valid[rows].astype(np.uint8)),
        "labels": pack(data.labels[rows].astype(np.int32)),
        "patients": pack(data.patients[rows].astype(np.int32)),
        "paths": None if data.pseudonymous else [paths[row] for row in rows.tolist()],
        "tops": [_tops(book, row) for row in rows.tolist()],
    }


def listing_record(book: ImageBook, kind: Kind, number: int) -> dict[str, Any]:
    """Record of one file of a listing: numbers of images, with their labels and patients.

    Args:
        book: The images.
        kind: By what the listing is ordered.
        number: The file, from 0.
    """
    rows = book.listings[kind][number * LISTED_PER_FILE : (number + 1) * LISTED_PER_FILE]
    columns = {"numbers": book.data.numbers, "labels": book.data.labels, "patients": book.data.patients}
    return {name: pack(column[rows].astype(np.int32)) for name, column in columns.items()}


def book_files(book: ImageBook) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and record of every file of images."""
    for number in range(book.n_files):
        yield f"rows/{number}", rows_record(book, number)
    for kind in book.listings:
        for number in range(book.n_listing_files(kind)):
            yield f"listings/{kind}-{number}", listing_record(book, kind, number)


def _tops(book: ImageBook, row: int) -> list[list[float]]:
    """Latents that have a row among their top images, with its score: those where it ranks first."""
    places = book.top_places[book.top_starts[row] : book.top_starts[row + 1]][:_TOPS_SHOWN]
    values = book.data.features.top_values.ravel()[places]
    latents = places // book.data.top_rows.shape[1]
    return [[latent, float(f"{value:.4g}")] for latent, value in zip(latents.tolist(), values.tolist(), strict=True)]
