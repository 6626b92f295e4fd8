"""What can go wrong with a store, each kind under the builtin that a caller would catch."""


class StoreError(ValueError):
    """A store cannot be used as asked; the message says what was found, what was expected and what to type."""


class StoreNotFoundError(StoreError, FileNotFoundError):
    """There is no store at the path."""

    def __str__(self) -> str:
        return str(self.args[0])


class StoreIncompleteError(StoreError):
    """The store exists but its build has not finished."""


class StoreMismatchError(StoreError):
    """The store was made with other weights, another block, size, preprocessing or list of images."""


class StoreCorruptError(StoreError):
    """Bytes, shapes or checksums are not those that were written."""


class ChecksumError(StoreCorruptError):
    """An image's bytes are not those that were written."""


class StoreBusyError(StoreError):
    """Another process is building the store right now."""
