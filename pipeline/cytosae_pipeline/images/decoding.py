"""Images read and decoded in worker processes, in order, a bounded number ahead of the network."""

import hashlib
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import PurePosixPath
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self, TypeVar

import numpy as np
import numpy.typing as npt

from cytosae.backbones.images import IMAGE_SIZE, LargeImageError, UnreadableImageError, decode_image
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.images.files import UnusableFileError, read_file
from cytosae_pipeline.images.folders import JPEG_2000_ENDINGS, WEBP_ENDINGS
from cytosae_pipeline.images.image_list import DatasetError, ImageList, ImageRow, Root
from cytosae_pipeline.images.isolation import (
    DecodingError,
    Isolation,
    Limits,
    describe_end,
    killed_message,
    limit_process,
    require_free_memory,
)
from cytosae_pipeline.images.listing import resolve_inside
from cytosae_pipeline.runtime.file_limit import affordable_workers
from cytosae_pipeline.runtime.memory import available_ram
from cytosae_pipeline.runtime.workers import WorkerDiedError, WorkerPool

if TYPE_CHECKING:
    from concurrent.futures import Future

logger = logging.getLogger(__name__)

_IMAGES_PER_TASK = 8
_TASKS_AHEAD_PER_WORKER = 3
_SHARED_BYTES, _LEAST_SHARED_BYTES = 256 << 20, 64 << 20

T = TypeVar("T")
_Task = Sequence[tuple[int, ImageRow]]


class Wanted(NamedTuple):
    """How pictures are prepared; arguments of `cytosae.backbones.images.decode_image`."""

    size: int
    """Height and width in pixels."""
    resample: str = "bilinear"
    """Filter of the resize."""
    white_level: int | None = None
    """Value that stands for white in greyscale of more than 8 bits; None: the largest of its bits."""
    most_bytes: int | None = None
    """Memory that decoding may take; None: as much as for any picture that is not refused."""


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


class Deferred(NamedTuple):
    """An image that has not been decoded yet, because it takes much memory; it is decoded alone."""

    row: int
    """Row number."""
    n_bytes: int
    """Memory that it takes; 0 if there was less than it wanted."""


class ImageDecoder:
    """Decodes rows of an image list; use as a context manager.

    Pictures that take much memory are decoded one at a time, in a process of their own. So are those of a process that
    crashed or computed for too long, until it is known which of them is to blame.

    Args:
        images: The list.
        n_workers: Worker processes; 0 decodes in this one all pictures that take little memory.
        image_size: Height and width wanted, in pixels.
        resample: Filter of the resize, one of `cytosae.backbones.images.FILTERS`.
        white_level: Value that stands for white in greyscale of more than 8 bits; None: the largest of its bits.
        limits: What decoding one picture may cost; it holds in worker processes.

    Raises:
        DecodingError: If a worker was killed while it started.
    """

    def __init__(
        self,
        images: ImageList,
        *,
        n_workers: int,
        image_size: int = IMAGE_SIZE,
        resample: str = "bilinear",
        white_level: int | None = None,
        limits: Limits | None = None,
    ) -> None:
        if (affordable := affordable_workers(n_workers)) < n_workers:
            logger.info(f"decoding with {affordable} of {n_workers} processes: `ulimit -n` allows no more open files")
        n_workers = affordable
        self._images, self._n_workers = images, n_workers
        self._wanted = Wanted(image_size, resample, white_level, shared_bytes(available_ram(), n_workers))
        self._limits = limits or Limits()
        self._alone = Isolation(self._limits)
        try:
            self._pool = WorkerPool(n_workers) if n_workers else None
        except WorkerDiedError as error:
            raise self._killed() from error

    def iter_rows(self, rows: Iterable[int]) -> Iterator[Decoded]:
        """Decode rows in the order given.

        Raises:
            DecodingError: If a worker was killed, or there is too little memory for a picture.
            SourceError: If the disk fails repeatedly.
        """
        function = decode_files if self._pool is None else partial(decode_with_limits, limits=self._limits)
        for item in self._iter_tasks(function, rows, self._defer):
            yield self._decode_alone(item) if isinstance(item, Deferred) else item

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
        self._alone.close()
        if self._pool is not None:
            self._pool.shutdown()

    def _defer(self, task: _Task, error: WorkerDiedError) -> list[Decoded | Deferred]:
        """All pictures of a process that one of them ended; none if it was killed."""
        return [Deferred(row, 0) for row, _ in task] if describe_end(error, self._limits) else []

    def _decode_alone(self, deferred: Deferred) -> Decoded:
        """Decode a picture while no other large one is decoded."""
        row = self._images.rows[deferred.row]
        require_free_memory(deferred.n_bytes, row.path)
        try:
            return self._alone.run(decode_alone, self._images.root, deferred.row, row, self._wanted, self._limits)
        except UnreadableImageError as error:
            return refuse_file(self._images.root, deferred.row, row, str(error))

    def _iter_tasks(
        self,
        function: Callable[[Root, _Task, Wanted], list[T]],
        rows: Iterable[int],
        recover: Callable[[_Task, WorkerDiedError], list[T]] = lambda task, error: [],
    ) -> Iterator[T]:
        """Results of a function of a few rows at a time, in order, a bounded number ahead.

        Args:
            function: The function.
            rows: The rows.
            recover: Results of a task whose process died; if there are none, that is an error.
        """
        remaining = ((row, self._images.rows[row]) for row in rows)
        tasks = iter(lambda: list(itertools.islice(remaining, _IMAGES_PER_TASK)), [])
        root, wanted = self._images.root, self._wanted
        if self._pool is None:
            for task in tasks:
                yield from function(root, task, wanted)
            return
        pending: deque[tuple[_Task, Future[list[T]]]] = deque()
        n_new = self._n_workers * _TASKS_AHEAD_PER_WORKER
        while True:
            done = self._take(*pending.popleft(), recover) if pending else []
            for task in itertools.islice(tasks, n_new):
                pending.append((task, self._pool.submit(function, root, task, wanted)))
            yield from done
            if not pending:
                return
            n_new = 1

    def _take(
        self, task: _Task, future: "Future[list[T]]", recover: Callable[[_Task, WorkerDiedError], list[T]]
    ) -> list[T]:
        """The results of a task."""
        try:
            return future.result()
        except WorkerDiedError as error:
            if recovered := recover(task, error):
                return recovered
            raise self._killed() from error

    def _killed(self) -> DecodingError:
        """The error of a worker that was killed."""
        return DecodingError(killed_message(max(0, self._n_workers // 2)))


def shared_bytes(free: int | None, n_workers: int) -> int:
    """Memory that a picture may take to be decoded beside others; larger ones are decoded one at a time.

    Args:
        free: Free memory in bytes; None if it is not known.
        n_workers: Worker processes.
    """
    if free is None or not n_workers:
        return _SHARED_BYTES
    return max(_LEAST_SHARED_BYTES, free // (2 * n_workers))


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


def decode_files(root: Root, items: _Task, wanted: Wanted) -> list[Decoded | Deferred]:
    """Read and decode files.

    Args:
        root: Folder that all files must be inside.
        items: Row number and row of each.
        wanted: How to prepare them.

    Raises:
        SourceError: If the disk fails repeatedly.
    """
    return [_decode_file(root, number, row, wanted) for number, row in items]


def decode_with_limits(root: Root, items: _Task, wanted: Wanted, limits: Limits) -> list[Decoded | Deferred]:
    """`decode_files`, in a worker process, which ends if one of them takes too long.

    Raises:
        SourceError: If the disk fails repeatedly.
    """
    found = []
    for number, row in items:
        limit_process(limits)
        found.append(_decode_file(root, number, row, wanted))
    return found


def decode_alone(root: Root, number: int, row: ImageRow, wanted: Wanted, limits: Limits) -> Decoded:
    """Read and decode a file, however much memory it takes, in a process that does nothing else.

    Raises:
        MemoryError: If it takes more than the limit.
        SourceError: If the disk fails repeatedly.
    """
    limit_process(limits)
    decoded = _decode_file(root, number, row, wanted._replace(most_bytes=None))
    if isinstance(decoded, Deferred):
        raise MemoryError
    return decoded


def decode_data(data: bytes, wanted: Wanted, limits: Limits) -> npt.NDArray[np.uint8]:
    """Decode the bytes of a file in a process that does nothing else.

    Raises:
        UnreadableImageError: If it is not an image.
        MemoryError: If it takes more memory than the limit.
    """
    limit_process(limits)
    return decode_image(data, **wanted._asdict())


def refuse_file(root: Root, number: int, row: ImageRow, reason: str) -> Decoded:
    """A file that is set aside without decoding it.

    Raises:
        SourceError: If the disk fails repeatedly.
    """
    try:
        data = _read_inside(root, row)
    except UnusableFileError as error:
        return Decoded(number, None, None, str(error))
    return Decoded(number, None, hashlib.sha256(data).digest(), reason, len(data))


def hash_files(root: Root, items: _Task, wanted: "Wanted | None" = None) -> list[Hashed]:
    """Read and hash files; runs in a worker process.

    Args:
        root: Folder that all files must be inside.
        items: Row number and row of each.
        wanted: Not used: nothing is decoded.

    Raises:
        SourceError: If the disk fails repeatedly.
    """
    return [_hash_file(root, number, row) for number, row in items]


def _decode_file(root: Root, number: int, row: ImageRow, wanted: Wanted) -> Decoded | Deferred:
    remarks: list[str] = []
    try:
        data = _read_inside(root, row)
        digest = hashlib.sha256(data).digest()
        try:
            _check_ending(data, row.path)
            pixels = decode_image(data, **wanted._asdict(), remarks=remarks)
            return Decoded(number, pixels, digest, "", len(data), tuple(remarks))
        except UnreadableImageError as error:
            return Decoded(number, None, digest, str(error), len(data))
    except UnusableFileError as error:
        return Decoded(number, None, None, str(error))
    except LargeImageError as error:
        return Deferred(number, error.n_bytes)
    except MemoryError:
        return Deferred(number, 0)


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


def _hash_file(root: Root, number: int, row: ImageRow) -> Hashed:
    try:
        return Hashed(number, hashlib.sha256(_read_inside(root, row)).digest(), "")
    except UnusableFileError as error:
        return Hashed(number, None, str(error))


def _read_inside(root: Root, row: ImageRow) -> bytes:
    """The bytes of a row's file, if it is inside the root and the one that was listed."""
    try:
        path = resolve_inside(root, row.path)
    except DatasetError as error:
        raise UnusableFileError("leads out of the data set's folder") from error
    return read_file(path, row.seen, row.path)
