"""HDF5 files whose writing may fail without harm: a full disk is an error, as everywhere else."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def open_hdf5(path: Path) -> Iterator[tuple[Any, Callable[[], None]]]:
    """A new, empty HDF5 file.

    Yields:
        An open group of h5py, and a function that raises if writing has failed since.

    Raises:
        OSError: If the disk is full or fails; at the end of the `with` block.
    """
    import h5py

    with path.open("w+b", buffering=0) as opened:
        file = _SteadyFile(opened)
        try:
            with h5py.File(file, "w") as group:
                yield group, file.check
        finally:
            file.check()
            opened.flush()


class _SteadyFile:
    """A file object that lets no call of HDF5 fail.

    HDF5 that cannot write crashes the process when it closes the file (segmentation fault, release 1.14). Here the
    first error is kept, and whatever is written afterwards is dropped.

    Args:
        file: An open, unbuffered binary file.
    """

    def __init__(self, file: Any) -> None:  # noqa: ANN401 - a FileIO
        self._file = file
        self.error: OSError | None = None

    def check(self) -> None:
        """Raise the error that was kept.

        Raises:
            OSError: If there was one.
        """
        if self.error is not None:
            raise self.error

    def write(self, data: bytes | memoryview) -> int:
        """Write all bytes."""
        view = memoryview(data).cast("B")
        length = len(view)
        try:
            while view and self.error is None:
                view = view[self._file.write(view) :]
        except OSError as error:
            self.error = error
        return length

    def truncate(self, size: int | None = None) -> int:
        """Set the file's length."""
        try:
            return int(self._file.truncate(size))
        except OSError as error:
            self.error = self.error or error
            return 0

    def readinto(self, buffer: bytearray | memoryview) -> int:
        """Read bytes; those that were dropped are 0."""
        view = memoryview(buffer).cast("B")
        n_read = int(self._file.readinto(view))
        view[n_read:] = bytes(len(view) - n_read)
        return len(view)

    def read(self, size: int = -1) -> bytes:
        """Read bytes."""
        return bytes(self._file.read(size))

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move to a position."""
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        """The position."""
        return int(self._file.tell())

    def flush(self) -> None:
        """Nothing: the file is not buffered."""
