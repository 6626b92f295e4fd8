"""The page's data files, computed on request. Safe to use from several threads at once."""

import base64
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cytosae.analysis.cell_map import cosine_similarity, nearest_images
from cytosae_pipeline.images.image_list import ImageList
from cytosae_pipeline.report.data.report_data import ReportData
from cytosae_pipeline.report.explore.byte_cache import ByteCache
from cytosae_pipeline.report.explore.cohort_records import CohortRecords
from cytosae_pipeline.report.explore.effects import Effects
from cytosae_pipeline.report.explore.errors import MissingError, RefusedError
from cytosae_pipeline.report.explore.uploads import UploadReader
from cytosae_pipeline.report.measures.extras import Extras
from cytosae_pipeline.report.measures.sample_size import PROFILE_IMAGES, profile_images
from cytosae_pipeline.report.records.cell_map import CellMap, map_record, measure_map, n_score_files, scores_record
from cytosae_pipeline.report.records.encoding import to_script
from cytosae_pipeline.report.records.images import ImageBook, Kind, listing_record, rows_record
from cytosae_pipeline.report.records.latents import (
    acts_record,
    encode_image,
    image_record,
    latent_records,
    maps_of_latent,
    measure_sample,
    rows_of_latent,
)
from cytosae_pipeline.report.records.thumbnails import encode_jpeg, read_jpeg
from cytosae_pipeline.statistics.notes import LatentNote, Subject, check_note, save_note

NEAREST_SHOWN = 8
"""Cells of the store shown beside an uploaded one."""

_DATA_BYTES = 64 << 20
_PICTURE_BYTES = 64 << 20


class ExploreService:
    """Computes what the page requests; use as a context manager.

    Args:
        report_data: Store, autoencoder and statistics.
        latents: Latents with a card.
        overview: The overview's record; its notes are read from disk on every request.
        images: Location of the store's images; None if they were not found.
        uploads: Reader of new images; None if there is no vision transformer.
        book: All images of the store.
        extras: What is known of latents beside the statistics.
    """

    def __init__(
        self,
        report_data: ReportData,
        latents: npt.NDArray[np.int64],
        overview: dict[str, Any],
        images: ImageList | None,
        uploads: UploadReader | None,
        book: ImageBook,
        extras: Extras,
    ) -> None:
        self._book, self._extras = book, extras
        self._cell_map: CellMap | None = None
        self._report_data, self._latents, self._overview = report_data, latents, overview
        self._images, self._uploads = images, uploads
        self._digests = report_data.store.column("images/sha256")
        self._cohort = CohortRecords(report_data.cohort, latents, report_data.config)
        self._data, self._pictures = ByteCache(_DATA_BYTES), ByteCache(_PICTURE_BYTES)
        self.computing = threading.Lock()
        """Held while the encoder or the vision transformer is used."""
        self._comparing = threading.Lock()
        self.closed = False
        """Whether the service has ended: computations still running then fail, and no client waits for them."""
        self._reader = report_data.store.open_reader(verify=not report_data.config.no_verify)
        self._effects = Effects(report_data, self._reader, there=bool(overview.get("effects")))

    def __enter__(self) -> "ExploreService":
        return self

    def __exit__(self, *error: object) -> None:
        self.closed = True
        if self._uploads is not None:
            self._uploads.close()
        self._reader.close()

    def overview(self) -> bytes:
        """The overview, with the current notes."""
        report_data = self._report_data
        notes = report_data.read_notes()
        record = {**self._overview, "notes": {str(latent): dict(note) for latent, note in notes.items()}}
        return to_script("overview", record)

    def latent(self, latent: int) -> bytes:
        """A latent, featured or not.

        Raises:
            MissingError: If there is no latent of this number.
        """
        if not 0 <= latent < self._report_data.n_latents:
            raise MissingError
        return self._once(f"latents/{latent}", self.computing, lambda: self._make_latent(latent))

    def image(self, row: int) -> bytes:
        """An image of the store.

        Raises:
            MissingError: If the row does not exist or its image is not readable.
        """
        self._check_row(row)
        return self._once(f"images/{row}", self.computing, lambda: self._make_image(row))

    def effect(self, latent: int, row: int, percent: int) -> bytes:
        """What scaling a latent, by a factor in percent, changes in an image of the store.

        Raises:
            MissingError: If there is no such latent or image, the factor is too large, or there is no tail.
        """
        self._check_row(row)

        def make() -> dict[str, Any]:
            record = self._effects.of_image(row, latent, percent)
            if record is None:
                raise MissingError
            return record

        return self._once(f"effects/{latent}/{row}/{percent}", self.computing, make)

    def rows(self, number: int) -> bytes:
        """A file of descriptions of images.

        Raises:
            MissingError: If there is no such file.
        """
        if not 0 <= number < self._book.n_files:
            raise MissingError
        return self._once(f"rows/{number}", self._comparing, lambda: rows_record(self._book, number))

    def listing(self, kind: Kind, number: int) -> bytes:
        """A file of the images in the order of labels or patients.

        Raises:
            MissingError: If there is no such file.
        """
        if not 0 <= number < self._book.n_listing_files(kind):
            raise MissingError
        return self._once(
            f"listings/{kind}-{number}", self._comparing, lambda: listing_record(self._book, kind, number)
        )

    def map(self) -> bytes:
        """The map of cells.

        Raises:
            MissingError: If it was not asked for.
        """
        return self._once("map", self.computing, lambda: map_record(self._report_data, self._map()))

    def mapped(self, number: int) -> bytes:
        """A file of the map's scores.

        Raises:
            MissingError: If there is no such file.
        """

        def make() -> dict[str, Any]:
            found = self._map()
            if not 0 <= number < n_score_files(found):
                raise MissingError
            return scores_record(found, number)

        return self._once(f"mapped/{number}", self.computing, make)

    def patients(self) -> bytes:
        """The patients.

        Raises:
            MissingError: If the images have no patients.
        """
        return self._once("patients", self._comparing, self._cohort.patients)

    def comparison(self, number: int) -> bytes:
        """One comparison of groups.

        Raises:
            MissingError: If there is no comparison of this number.
        """
        return self._once(f"comparisons/{number}", self._comparing, lambda: self._cohort.comparison(number))

    def all_groups(self) -> bytes:
        """All groups compared at once.

        Raises:
            MissingError: If there are fewer than three.
        """
        return self._once("comparisons/all", self._comparing, self._cohort.all_groups)

    def audit(self) -> bytes:
        """What is known about the patients beside the group, and what it tells.

        Raises:
            MissingError: If the images have no patients.
        """
        return self._once("audit", self._comparing, self._cohort.audit)

    def thumbnail(self, row: int) -> bytes:
        """The picture of an image of the store, as a JPEG file.

        Raises:
            MissingError: If there is no such row, or its file is missing, broken or has changed.
            SourceError: If the disk fails repeatedly.
        """
        self._check_row(row)
        if self._images is None:
            raise MissingError
        data = self._pictures.get(str(row))
        if data is None:
            data = read_jpeg(self._report_data.store, self._images, row, self._digests[row])
            if data is None:
                raise MissingError
            self._pictures.put(str(row), data)
        return data

    def note(self, latent: int) -> LatentNote:
        """Current name and note of a latent; empty if it has none.

        Raises:
            MissingError: If there is no such latent.
        """
        if not 0 <= latent < self._report_data.n_latents:
            raise MissingError
        notes = self._report_data.read_notes()
        return notes.get(latent, LatentNote(name="", note=""))

    def save_note(self, latent: int, value: object) -> LatentNote | None:
        """Save a latent's note; it is on disk when this returns.

        Args:
            latent: The latent.
            value: Its name and note, and optionally `before`: the note that the client saw, the only one to replace.

        Returns:
            None if the note was saved; otherwise the newer note of another client, which is kept.

        Raises:
            MissingError: If there is no such latent.
            RefusedError: If the value is not a note or is too long.
        """
        if not 0 <= latent < self._report_data.n_latents:
            raise MissingError
        try:
            note = check_note(value)
            before = check_note(value["before"]) if isinstance(value, dict) and "before" in value else None
        except ValueError as error:
            raise RefusedError(str(error)) from error
        data = self._report_data
        subject, keep = Subject.of(data.inputs), data.config.keep_notes
        return save_note(data.notes_path, data.n_latents, latent, note, before=before, subject=subject, keep=keep)

    def upload(self, data: bytes) -> dict[str, Any]:
        """The record of an image that is not in the store, its picture as a JPEG file in base64, and the nearest cells.

        These are the images of the map of cells with the most similar scores, by cosine; None without a map.

        Raises:
            RefusedError: If there is no vision transformer.
            UnreadableImageError: If the data are not an image.
        """
        if self._uploads is None:
            raise RefusedError(
                "No vision transformer was given: start cytosae-cache explore with --model_path CHECKPOINT, the one "
                "that the store was built with"
            )
        pixels = self._uploads.decode(data)
        with self.computing:
            acts = encode_image(self._report_data.inputs.sae, self._uploads.compute(pixels))
            record = image_record(self._report_data, acts_record(acts, self._report_data.n_prefix), None)
            nearest = self._find_nearest(acts)
        picture = base64.b64encode(encode_jpeg(pixels)).decode("ascii")
        return {**record, "picture": picture, "nearest": nearest}

    def _once(self, name: str, lock: threading.Lock, make: Callable[[], dict[str, Any]]) -> bytes:
        """A data file from the cache, or computed while no other thread computes."""
        data = self._data.get(name)
        if data is None:
            with lock:
                data = self._data.get(name)
                if data is None:
                    data = to_script(name, make())
                    self._data.put(name, data)
        return data

    def _map(self) -> CellMap:
        """The map of cells, computed on the first request; called while no other thread computes.

        Raises:
            MissingError: If it was not asked for.
        """
        if self._cell_map is None:
            self._cell_map = measure_map(self._report_data, self._latents)
        if self._cell_map is None:
            raise MissingError
        return self._cell_map

    def _find_nearest(self, acts: torch.Tensor) -> list[dict[str, Any]] | None:
        """The images of the map that are nearest to one of these activations; called while no other thread computes."""
        if not self._overview["has_map"]:
            return None
        found, data = self._map(), self._report_data
        wanted = acts.mean(dim=0).cpu().numpy()[found.latents]
        similarity = cosine_similarity(found.scores, wanted)
        places = nearest_images(found.scores, wanted, NEAREST_SHOWN)
        return [
            {
                "row": int(data.numbers[row]),
                "label": int(data.labels[row]),
                "patient": int(data.patients[row]),
                "similarity": round(float(similarity[place]), 4),
            }
            for place, row in zip(places.tolist(), found.rows[places].tolist(), strict=True)
        ]

    def _make_latent(self, latent: int) -> dict[str, Any]:
        """A latent's record."""
        report_data, extras = self._report_data, self._extras
        sae, n_images = report_data.inputs.sae, PROFILE_IMAGES
        if sae.needs_whole_rows and sae.W_enc.device.type == "cpu":
            n_images = profile_images(report_data.store.n_tokens, sae.W_enc.numel())
        profiles, measured = measure_sample(report_data, self._reader, latent, n_images, extras)
        rows = rows_of_latent(report_data, latent, measured.evidence[0])
        maps = maps_of_latent(report_data, self._reader, latent, rows)
        record = next(latent_records(report_data, np.array([latent]), profiles, maps, extras, measured))
        return {**record, "effect": self._effects.of_latent(latent)}

    def _make_image(self, row: int) -> dict[str, Any]:
        """An image's record."""
        stored = torch.from_numpy(self._reader.read(np.array([row]))[0])
        acts = encode_image(self._report_data.inputs.sae, stored)
        return image_record(self._report_data, acts_record(acts, self._report_data.n_prefix), row)

    def _check_row(self, row: int) -> None:
        """Refuse rows that do not exist or whose image is not readable."""
        store = self._report_data.store
        if not 0 <= row < store.n_images or not store.valid[row]:
            raise MissingError
