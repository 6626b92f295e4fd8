"""What can go wrong with a store; each error also inherits from the builtin that a caller would catch."""

from pathlib import Path


class StoreError(ValueError):
    """A store cannot be used as requested; the message says what was found, what was expected and what to type."""


class StoreNotFoundError(StoreError, FileNotFoundError):
    """There is no store at the path."""

    def __str__(self) -> str:
        return str(self.args[0])


class StoreUnreachableError(StoreError, OSError):
    """A remote store does not respond."""

    def __str__(self) -> str:
        return str(self.args[0])


class StoreIncompleteError(StoreError):
    """The store exists but its build has not finished."""


class StoreMismatchError(StoreError):
    """The store was made with other weights, another block, size, preprocessing or list of images."""


class StoreCorruptError(StoreError):
    """Bytes, shapes or checksums differ from what was written."""


class ChecksumError(StoreCorruptError):
    """An image's bytes differ from what was written."""


class NotFiniteError(StoreError):
    """Activations contain NaN or infinity, or values beyond the range of the store's dtype."""


class StoreBusyError(StoreError):
    """Another process is building the store right now."""


class WriteError(OSError):
    """A file or folder cannot be written; the message names it, the reason and what to do.

    Args:
        message: The message.
        code: `errno` of the disk.
        place: The file or folder.
    """

    def __init__(self, message: str, code: int | None = None, place: Path | None = None) -> None:
        super().__init__(message)
        self.errno, self.filename = code, None if place is None else str(place)

    def __str__(self) -> str:
        return str(self.args[0])
