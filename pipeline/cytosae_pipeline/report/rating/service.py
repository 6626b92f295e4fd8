"""What the rating page requests, without anything that says which latent or image it is. Safe for several threads."""

import threading
from typing import Any

import numpy as np
import torch

from cytosae.statistics.heatmaps import LatentEncoder, make_byte_maps
from cytosae_cache.reading.reader import RowReader
from cytosae_pipeline.images.image_list import ImageList
from cytosae_pipeline.rating.answers import CONCEPTS, MAX_NAME, MOST_CONFIDENT, Answer, check_answer
from cytosae_pipeline.rating.files import read_ratings, save_answer
from cytosae_pipeline.rating.items import Item, Shown
from cytosae_pipeline.report.data.report_data import ReportData
from cytosae_pipeline.report.explore.byte_cache import ByteCache
from cytosae_pipeline.report.explore.errors import MissingError, RefusedError
from cytosae_pipeline.report.records.encoding import pack
from cytosae_pipeline.report.records.thumbnails import read_jpeg
from cytosae_pipeline.runtime.palette import palette_record
from cytosae_pipeline.statistics.notes import Subject

_PICTURE_BYTES = 64 << 20


class RatingService:
    """Serves the items of one rater; items and images are named by their place alone.

    Args:
        data: Store, autoencoder and statistics.
        images: Location of the store's images.
        reader: Reader of the store.
        items: What is rated, in the rater's order.
        rater: The rater's checked name.
    """

    def __init__(
        self, data: ReportData, images: ImageList, reader: RowReader, items: tuple[Item, ...], rater: str
    ) -> None:
        self._data, self._images, self._reader = data, images, reader
        self._items, self._rater = items, rater
        self._digests = data.store.column("images/sha256")
        self._pictures = ByteCache(_PICTURE_BYTES)
        self._computing = threading.Lock()
        self.closed = False
        """Whether the server has ended."""

    def state(self) -> dict[str, Any]:
        """How many items there are, which are rated, and what the page needs to draw."""
        answers = self._answers()
        return {
            "rater": self._rater,
            "done": [answer is not None for answer in answers],
            "grid": list(self._data.store.spec.tokens.grid),
            "palette": palette_record(),
            "limits": {"name_length": MAX_NAME, "confidence": MOST_CONFIDENT},
            "concepts": list(reversed(CONCEPTS)),
        }

    def item(self, at: int) -> dict[str, Any]:
        """An item: its examples with their heat maps, the number of images in the row, and what was answered.

        Raises:
            MissingError: If there is no such item.
        """
        item = self._find(at)
        answer = self._answers()[at]
        return {
            "groups": [
                {"title": title, "maps": [pack(self._map(shown)) for shown in group]} for title, group in item.groups
            ],
            "n_row": len(item.row),
            "answer": None if answer is None else _shown_again(answer, item),
        }

    def picture(self, at: int, group: int, place: int) -> bytes:
        """An image of an item as a JPEG file, without heat map or metadata.

        Args:
            at: The item.
            group: The group of examples; behind the last of them comes the row of the intruder test.
            place: Place in the group.

        Raises:
            MissingError: If there is no such image, or its file is missing, broken or has changed.
            SourceError: If the disk fails repeatedly.
        """
        item = self._find(at)
        groups = [*(shown for _, shown in item.groups), item.row]
        if not 0 <= group < len(groups) or not 0 <= place < len(groups[group]):
            raise MissingError
        row = groups[group][place].row
        data = self._pictures.get(str(row))
        if data is None:
            data = read_jpeg(self._data.store, self._images, row, self._digests[row])
            if data is None:
                raise MissingError
            self._pictures.put(str(row), data)
        return data

    def save(self, at: int, value: object) -> None:
        """Save an answer; it is on disk when this returns.

        Args:
            at: The item.
            value: The answer: name, concept, confidence, and the place of the image that was clicked.

        Raises:
            MissingError: If there is no such item.
            RefusedError: If the value is not an answer.
        """
        item = self._find(at)
        given = value if isinstance(value, dict) else {}
        asked = {name: given.get(name) for name in ("name", "concept", "confidence", "clicked")}
        own = {"item": item.key, "n_row": len(item.row), "found": asked["clicked"] == item.intruder}
        try:
            answer = check_answer({**asked, **own})
        except ValueError as error:
            raise RefusedError(str(error)) from error
        data = self._data
        save_answer(
            data.inputs.folder, self._rater, data.n_latents, item.latent, answer,
            subject=Subject.of(data.inputs), keep=data.config.keep_notes,
        )  # fmt: skip

    def count(self) -> tuple[int, int]:
        """Items rated by now, and all items."""
        return sum(answer is not None for answer in self._answers()), len(self._items)

    def _answers(self) -> list[Answer | None]:
        """What the file says by now about each item."""
        data = self._data
        found = read_ratings(
            data.inputs.folder, self._rater, data.n_latents, subject=Subject.of(data.inputs),
            keep=data.config.keep_notes,
        )  # fmt: skip
        return [
            found.decoys.get(item.key) if item.latent < 0 else found.latents.get(item.latent) for item in self._items
        ]

    def _find(self, at: int) -> Item:
        if not 0 <= at < len(self._items):
            raise MissingError
        return self._items[at]

    def _map(self, shown: Shown) -> Any:  # noqa: ANN401 - bytes of a map
        """The heat map of a latent over an image, uint8, shape `(n_patches,)`."""
        with self._computing:
            encoder = LatentEncoder(self._data.inputs.sae, np.array([shown.latent]))
            acts = encoder(torch.from_numpy(self._reader.read(np.array([shown.row]))[0]))
        return make_byte_maps(acts[self._data.n_prefix :]).levels[0]


def _shown_again(answer: Answer, item: Item) -> dict[str, Any]:
    """An earlier answer; the click only if the same images are shown now."""
    clicked = answer["clicked"] if answer["item"] == item.key else None
    return {
        "name": answer["name"], "concept": answer["concept"], "confidence": answer["confidence"], "clicked": clicked,
    }  # fmt: skip
