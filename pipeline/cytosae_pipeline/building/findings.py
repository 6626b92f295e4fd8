"""What a build found out about its images: unreadable ones, odd ones, and pictures that occur more than once."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cytosae_cache.format.layout import ImageTable
from cytosae_cache.storage.atomic import make_folder, write_file
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.building.source_check import count_reasons
from cytosae_pipeline.errors import quote, say_count
from cytosae_pipeline.images.decoding import Decoded
from cytosae_pipeline.images.image_list import DatasetError, ImageList
from cytosae_pipeline.workspace.csv_files import to_csv


class Remarks:
    """Counts remarks on pictures that were read, by their kind: what is before the first colon; and unreadable ones."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, int, str]] = {}
        self.skipped: Counter[str] = Counter()
        """Images that were set aside, by the kind of reason."""

    def watch(self, decoded: Iterable[Decoded], images: ImageList) -> Iterator[Decoded]:
        """The same images, whose remarks are counted.

        Args:
            decoded: The images.
            images: The list that they are from.
        """
        for image in decoded:
            if image.reason:
                self.skipped[image.reason.partition(":")[0]] += 1
            for remark in image.remarks:
                text = f"{quote(images.rows[image.row].path)} is {remark}"
                self._add(remark.partition(":")[0], 1, image.row, text)
            yield image

    def merge(self, other: "Remarks") -> None:
        """Add what another process counted."""
        self.skipped += other.skipped
        for kind, found in other._found.items():
            self._add(kind, *found)

    def describe(self) -> list[str]:
        """One message for each kind, with its first image, in the order of these."""
        found = sorted(self._found.values(), key=lambda item: item[1])
        return [f"{n:,} image{'s' * (n > 1)} with a remark, for example {text}" for n, _, text in found]

    def _add(self, kind: str, n: int, row: int, text: str) -> None:
        """Count images of a kind, one of which is described."""
        before, first_row, first = self._found.get(kind, (0, row, text))
        self._found[kind] = (before + n, row, text) if row < first_row else (before + n, first_row, first)


class Duplicates(NamedTuple):
    """Pictures that occur more than once, byte for byte."""

    rows: list[int]
    """Rows of all of them; those of the same picture follow each other, in order of its first row."""
    picture: list[int]
    """Number of the picture of each, from 0."""

    @property
    def n_pictures(self) -> int:
        """Different pictures."""
        return self.picture[-1] + 1 if self.picture else 0

    def count_contradictions(self, names: Sequence[str]) -> tuple[int, list[int]]:
        """Pictures whose rows have different names, and two rows of the first of them."""
        groups: dict[int, dict[str, int]] = {}
        for row, picture in zip(self.rows, self.picture, strict=True):
            if names[row]:
                groups.setdefault(picture, {}).setdefault(names[row], row)
        several = [list(group.values()) for group in groups.values() if len(group) > 1]
        return len(several), several[0][:2] if several else []


def find_duplicates(digests: npt.NDArray[np.uint8], valid: npt.NDArray[np.bool_]) -> Duplicates:
    """Readable images with the same bytes.

    Args:
        digests: SHA-256 of every file, shape `(n, 32)`.
        valid: Which of them could be read, shape `(n,)`.
    """
    rows = np.flatnonzero(valid)
    keys = np.ascontiguousarray(digests[rows]).view("V32").ravel()
    _, first, number, counts = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
    repeated = counts[number] > 1
    first_row = rows[first[number[repeated]]]
    order = np.lexsort((rows[repeated], first_row))
    picture = np.unique(first_row[order], return_inverse=True)[1]
    return Duplicates(rows[repeated][order].tolist(), picture.tolist())


def describe_duplicates(duplicates: Duplicates, images: ImageTable) -> str:
    """How many duplicates there are, and those that contradict each other.

    Args:
        duplicates: The duplicates, at least two images.
        images: The table of all images.
    """
    n = duplicates.n_pictures
    lines = [f"{n:,} picture{'s occur' if n > 1 else ' occurs'} more than once ({len(duplicates.rows):,} images)"]
    for what, names in (("label", images.label), ("patient", images.patient)):
        count, rows = duplicates.count_contradictions(names)
        if count:
            example = " and ".join(f"{quote(images.path[row])} ({what} {quote(names[row])})" for row in rows)
            lines.append(f"{count:,} of them with several {what}s, for example {example}")
    return "; ".join(lines)


def write_duplicates(store: ActivationStore, path: Path) -> list[str]:
    """Write the list of pictures that occur more than once beside the store, if there are any; returns messages."""
    found = find_duplicates(store.column("images/sha256"), store.valid)
    if not found.rows:
        path.unlink(missing_ok=True)
        return []
    table = store.images
    lines = (
        [picture, row, table.path[row], table.label[row], table.patient[row]]
        for picture, row in zip(found.picture, found.rows, strict=True)
    )
    make_folder(path.parent)
    write_file(path, to_csv(["picture", "row", "path", "label", "patient"], lines))
    return [f"{describe_duplicates(found, table)}. All are listed in {path}"]


def write_skipped(store: ActivationStore, path: Path) -> Path | None:
    """Write the list of unreadable images with reasons beside the store; None if there are none."""
    rows = np.flatnonzero(~store.valid).tolist()
    if not rows:
        path.unlink(missing_ok=True)  # of an older store in its place
        return None
    reasons = store.column("images/reason")
    table = to_csv(["row", "path", "reason"], ([row, store.images.path[row], str(reasons[row])] for row in rows))
    make_folder(path.parent)
    write_file(path, table)
    return path


def require_readable(store: ActivationStore, skipped: Path | None) -> None:
    """Refuse a store in which no image could be read.

    Raises:
        DatasetError: If there is none; the message says why.
    """
    if store.n_images and not store.valid.any():
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in list(count_reasons(store).items())[:3])
        raise DatasetError(
            f"no image could be read of {say_count(store.n_images, 'image')}: {reasons}. They are listed in "
            f"{skipped}. Repair them, then build again with --overwrite"
        )
