"""Images read and decoded in worker processes, in order, a bounded number ahead of the network."""

import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self, TypeVar

import numpy as np
import numpy.typing as npt

from cytosae.backbones.images import IMAGE_SIZE, UnreadableImageError, decode_image
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.images.files import UnusableFileError, read_file
from cytosae_pipeline.images.folders import JPEG_2000_ENDINGS, WEBP_ENDINGS
from cytosae_pipeline.images.image_list import DatasetError, ImageList, ImageRow
from cytosae_pipeline.images.listing import resolve_inside
from cytosae_pipeline.runtime.workers import WorkerDiedError, WorkerPool

if TYPE_CHECKING:
    from concurrent.futures import Future

_IMAGES_PER_TASK = 8
_TASKS_AHEAD_PER_WORKER = 3

T = TypeVar("T")


class DecodingError(UserError):
    """A worker process died."""


class Wanted(NamedTuple):
    """How pictures are prepared; arguments of `cytosae.backbones.images.decode_image`."""

    size: int
    """Height and width in pixels."""
    resample: str = "bilinear"
    """Filter of the resize."""
    white_level: int | None = None
    """Value that stands for white in greyscale of more than 8 bits; None: the largest of its bits."""


class Decoded(NamedTuple):
    """An image as the network takes it, or the reason why it cannot be used."""

    row: int
    """Row number."""
    pixels: npt.NDArray[np.uint8] | None
    """RGB, shape `(size, size, 3)`; None if it cannot be used."""
    sha256: bytes | None
    """Digest of the file's bytes, 32 bytes; None if they could not be read."""
    reason: str
    """Why it cannot be used; '' if it can."""
    n_bytes: int = 0
    """Length of the file; 0 if it could not be read."""
    remarks: tuple[str, ...] = ()
    """What should be known about a picture that was read."""


class Hashed(NamedTuple):
    """Digest of a file, without decoding the picture."""

    row: int
    """Row number."""
    sha256: bytes | None
    """Digest of the file's bytes, 32 bytes; None if they cannot be read."""
    reason: str
    """Why they cannot be read; '' if they can."""


class ImageDecoder:
    """Decodes rows of an image list; use as a context manager.

    Args:
        images: The list.
        n_workers: Worker processes; 0 decodes in this one.
        image_size: Height and width wanted, in pixels.
        resample: Filter of the resize, one of `cytosae.backbones.images.FILTERS`.
        white_level: Value that stands for white in greyscale of more than 8 bits; None: the largest of its bits.
    """

    def __init__(
        self,
        images: ImageList,
        *,
        n_workers: int,
        image_size: int = IMAGE_SIZE,
        resample: str = "bilinear",
        white_level: int | None = None,
    ) -> None:
        self._images, self._n_workers = images, n_workers
        self._wanted = Wanted(image_size, resample, white_level)
        self._pool = WorkerPool(n_workers) if n_workers else None

    def iter_rows(self, rows: Iterable[int]) -> Iterator[Decoded]:
        """Decode rows in the order given.

        Raises:
            DecodingError: If a worker died.
            SourceError: If the disk fails repeatedly.
        """
        return self._iter_tasks(decode_files, rows)

    def iter_hashes(self, rows: Iterable[int]) -> Iterator[Hashed]:
        """Hash the files of rows in the order given.

        Raises:
            DecodingError: If a worker died.
            SourceError: If the disk fails repeatedly.
        """
        return self._iter_tasks(hash_files, rows)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def _iter_tasks(
        self, function: Callable[[Path, Sequence[tuple[int, ImageRow]], Wanted], list[T]], rows: Iterable[int]
    ) -> Iterator[T]:
        """Results of a function of a few rows at a time, in order, a bounded number ahead."""
        remaining = ((row, self._images.rows[row]) for row in rows)
        tasks = iter(lambda: list(itertools.islice(remaining, _IMAGES_PER_TASK)), [])
        root, wanted = self._images.root, self._wanted
        if self._pool is None:
            for task in tasks:
                yield from function(root, task, wanted)
            return
        pending: deque[Future[list[T]]] = deque()
        n_new = self._n_workers * _TASKS_AHEAD_PER_WORKER
        while True:
            try:
                done = pending.popleft().result() if pending else []
            except WorkerDiedError as error:
                raise DecodingError(
                    "a decoding process was killed, perhaps for lack of memory. Run the command again, without "
                    "--overwrite, to resume, "
                    f"with fewer processes: --workers {max(0, self._n_workers // 2)}"
                ) from error
            for task in itertools.islice(tasks, n_new):
                pending.append(self._pool.submit(function, root, task, wanted))
            yield from done
            if not pending:
                return
            n_new = 1


def open_decoder(store: ActivationStore, images: ImageList) -> ImageDecoder:
    """A decoder, in this process, of pictures as the encoder of a store saw them."""
    stated = store.spec.preprocessing
    return ImageDecoder(
        images,
        n_workers=0,
        image_size=stated.image_size,
        resample=stated.resample.removeprefix("pillow-"),
        white_level=stated.white_level or None,
    )


def decode_files(root: Path, items: Sequence[tuple[int, ImageRow]], wanted: Wanted) -> list[Decoded]:
    """Read and decode files; runs in a worker process.

    Args:
        root: Folder that all files must be inside.
        items: Row number and row of each.
        wanted: How to prepare them.

    Raises:
        SourceError: If the disk fails repeatedly.
    """
    return [_decode_file(root, number, row, wanted) for number, row in items]


def hash_files(root: Path, items: Sequence[tuple[int, ImageRow]], wanted: "Wanted | None" = None) -> list[Hashed]:
    """Read and hash files; runs in a worker process.

    Args:
        root: Folder that all files must be inside.
        items: Row number and row of each.
        wanted: Not used: nothing is decoded.

    Raises:
        SourceError: If the disk fails repeatedly.
    """
    return [_hash_file(root, number, row) for number, row in items]


def _decode_file(root: Path, number: int, row: ImageRow, wanted: Wanted) -> Decoded:
    try:
        data = _read_inside(root, row)
    except UnusableFileError as error:
        return Decoded(number, None, None, str(error))
    digest = hashlib.sha256(data).digest()
    remarks: list[str] = []
    try:
        _check_ending(data, row.path)
        pixels = decode_image(data, **wanted._asdict(), remarks=remarks)
        return Decoded(number, pixels, digest, "", len(data), tuple(remarks))
    except UnreadableImageError as error:
        return Decoded(number, None, digest, str(error), len(data))


def _check_ending(data: bytes, path: str) -> None:
    """Refuse WebP and JPEG 2000 under the ending of another kind.

    The spec does not say which kinds are read, and stores of the same spec and list exist in which such files were set
    aside: a list must always give the same store.
    """
    is_webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    for name, endings, is_kind in (
        ("WebP", WEBP_ENDINGS, is_webp),
        ("JPEG 2000", JPEG_2000_ENDINGS, data.startswith((b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"))),
    ):
        if is_kind and PurePosixPath(path).suffix.lower() not in endings:
            raise UnreadableImageError(f"a {name} image under another ending: rename it to {endings[0]}")


def _hash_file(root: Path, number: int, row: ImageRow) -> Hashed:
    try:
        return Hashed(number, hashlib.sha256(_read_inside(root, row)).digest(), "")
    except UnusableFileError as error:
        return Hashed(number, None, str(error))


def _read_inside(root: Path, row: ImageRow) -> bytes:
    """The bytes of a row's file, if it is inside the root and the one that was listed."""
    try:
        path = resolve_inside(root, row.path)
    except DatasetError as error:
        raise UnusableFileError("leads out of the data set's folder") from error
    return read_file(path, row.seen, row.path)
