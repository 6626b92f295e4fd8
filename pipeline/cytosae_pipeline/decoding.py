"""Reading and decoding images in worker processes, in order, a bounded number ahead of the network."""

import hashlib
import itertools
import multiprocessing
import signal
import stat
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from cytosae.images import IMAGE_SIZE, UnreadableImageError, decode_image
from cytosae_pipeline.config import UserError
from cytosae_pipeline.datasets import DatasetError, ImageList, resolve_inside

MAX_FILE_BYTES = 1 << 30
"""Larger files are refused unread."""

_IMAGES_PER_TASK = 8
_TASKS_AHEAD_PER_WORKER = 3


class DecodingError(UserError):
    """The worker processes died."""


class Decoded(NamedTuple):
    """An image as the network takes it, or why it cannot be used."""

    row: int
    """Row number."""
    pixels: npt.NDArray[np.uint8] | None
    """RGB, shape `(size, size, 3)`; None if it cannot be used."""
    sha256: bytes | None
    """Digest of the file's bytes, 32 bytes; None if they could not be read."""
    reason: str
    """Why it cannot be used; '' if it can."""


class ImageDecoder:
    """Decodes rows of an image list; use as a context manager.

    Args:
        images: The list.
        n_workers: Worker processes; 0 decodes in this one.
        image_size: Height and width wanted, in pixels.
    """

    def __init__(self, images: ImageList, *, n_workers: int, image_size: int = IMAGE_SIZE) -> None:
        self._images, self._size, self._n_workers = images, image_size, n_workers
        self._pool: ProcessPoolExecutor | None = None
        if n_workers:
            # Not fork: the parent has threads (torch's among them), and forking those deadlocks.
            method = "spawn" if sys.platform in ("win32", "darwin") else "forkserver"
            context = multiprocessing.get_context(method)
            self._pool = ProcessPoolExecutor(n_workers, mp_context=context, initializer=_ignore_interrupts)

    def iter_rows(self, rows: Iterable[int]) -> Iterator[Decoded]:
        """Decode rows in the order given.

        Raises:
            DecodingError: If a worker died.
        """
        remaining = iter(rows)
        tasks = iter(lambda: list(itertools.islice(remaining, _IMAGES_PER_TASK)), [])
        if self._pool is None:
            for task in tasks:
                yield from self._decode(task)
            return
        pending: deque[Future[list[Decoded]]] = deque()
        n_new = self._n_workers * _TASKS_AHEAD_PER_WORKER
        while True:
            try:  # a broken pool refuses new tasks, too
                done = pending.popleft().result() if pending else []
                for task in itertools.islice(tasks, n_new):
                    pending.append(self._submit(task))
            except BrokenProcessPool as error:
                raise DecodingError(
                    "a decoding process was killed, perhaps for lack of memory. Type the command again to go on, "
                    f"with fewer processes: --workers {max(0, self._n_workers // 2)}"
                ) from error
            yield from done
            if not pending:
                return
            n_new = 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _submit(self, rows: Sequence[int]) -> "Future[list[Decoded]]":
        assert self._pool is not None
        items = [(row, self._images.rows[row].path) for row in rows]
        return self._pool.submit(decode_files, self._images.root, items, self._size)

    def _decode(self, rows: Sequence[int]) -> list[Decoded]:
        return decode_files(self._images.root, [(row, self._images.rows[row].path) for row in rows], self._size)


def decode_files(root: Path, items: Sequence[tuple[int, str]], size: int) -> list[Decoded]:
    """Read and decode files; runs in a worker process.

    Args:
        root: Folder that no file may lie outside of.
        items: Row number and relative path of each.
        size: Height and width wanted, in pixels.
    """
    return [_decode_file(root, row, relative, size) for row, relative in items]


def _decode_file(root: Path, row: int, relative: str, size: int) -> Decoded:
    try:
        path = resolve_inside(root, relative)
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            return Decoded(row, None, None, "cannot be read: not a file")
        if status.st_size > MAX_FILE_BYTES:
            return Decoded(row, None, None, f"the file is larger than {MAX_FILE_BYTES} bytes")
        data = path.read_bytes()
    except FileNotFoundError:
        return Decoded(row, None, None, "file not found")
    except DatasetError:
        return Decoded(row, None, None, "leads out of the data set's folder")
    except OSError as error:
        return Decoded(row, None, None, f"cannot be read: {error.strerror or type(error).__name__}")
    digest = hashlib.sha256(data).digest()
    try:
        return Decoded(row, decode_image(data, size=size), digest, "")
    except UnreadableImageError as error:
        return Decoded(row, None, digest, str(error))


def _ignore_interrupts() -> None:
    """Ctrl-C reaches the whole group of processes; the parent decides what happens."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
