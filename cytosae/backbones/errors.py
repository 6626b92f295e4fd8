"""Errors of backbones."""


class BackboneError(ValueError):
    """A vision transformer cannot be used; the message states what was found and what was expected."""


class BackboneNotFoundError(BackboneError, FileNotFoundError):
    """The file or folder does not exist."""

    def __str__(self) -> str:
        return str(self.args[0])
