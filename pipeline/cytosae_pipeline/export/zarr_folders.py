"""Zarr folders whose writing may fail without harm: nothing is written any more once the error is out."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import zarr
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore, WrapperStore


@contextmanager
def open_folder(path: Path) -> Iterator[tuple[Any, Callable[[], None]]]:
    """A new, empty Zarr folder, format 2.

    Yields:
        An open group of zarr, and a function that raises if writing has failed since.

    Raises:
        OSError: If the disk is full or fails; at the end of the `with` block.
    """
    store = _SteadyStore(LocalStore(path))
    try:
        yield zarr.open_group(store, mode="w", zarr_format=2), store.check
    finally:
        store.end()
        store.check()


class _SteadyStore(WrapperStore[LocalStore]):
    """A store in which no writing fails.

    zarr writes several chunks at once in threads of its own. When one fails, or Ctrl-C is pressed, it raises while the
    others are still being written, into a folder that is being removed. Here the first error is kept, and whatever is
    written afterwards is dropped.

    Args:
        store: The folder.
    """

    def __init__(self, store: LocalStore) -> None:
        super().__init__(store)
        self.error: OSError | None = None
        self._n_writing = 0
        self._ended = False
        self._changed = threading.Condition()

    def check(self) -> None:
        """Raise the error that was kept.

        Raises:
            OSError: If there was one.
        """
        if self.error is not None:
            raise self.error

    def end(self) -> None:
        """Let what is being written end, and write nothing more."""
        with self._changed:
            self._ended = True
            self._changed.wait_for(lambda: self._n_writing == 0)

    async def set(self, key: str, value: Buffer) -> None:
        """Write one file; drop it after an error."""
        with self._changed:
            if self._ended or self.error is not None:
                return
            self._n_writing += 1
        error = None
        try:
            await super().set(key, value)
        except OSError as found:
            error = found
        finally:
            with self._changed:
                self.error = self.error or error
                self._n_writing -= 1
                self._changed.notify_all()

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Write one file that is not there."""
        if not await self.exists(key):
            await self.set(key, value)

    async def _set_many(self, values: Iterable[tuple[str, Buffer]]) -> None:
        """Write several files."""
        for key, value in values:
            await self.set(key, value)
