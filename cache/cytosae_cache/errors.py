"""What can go wrong with a store; each error also inherits from the builtin that a caller would catch."""


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
